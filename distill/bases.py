"""The base of a run, with the frozen networks that its recipe adds: ControlNets, T2I-adapters, an IP-Adapter."""

from flashdiff.distill.config import Recipe
from flashdiff.errors import ConfigError, ModelError
from flashdiff.families import find_base, load_base
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.networks import hash_of_network
from flashdiff.files import hash_file
from flashdiff.lora_files import FLASH


def load_trained_base(recipe: Recipe) -> tuple[ModelFamily, TorchModel]:
    """The base that teacher and student share; ModelError where it is not there, ConfigError for a network that does not fit."""
    if (find_base(recipe.base) / FLASH).exists():
        raise ConfigError(f"base '{recipe.base}' is a flash student, and no teacher; distil the base that it comes from")
    family, model = load_base(recipe.base)
    try:
        return family, _with_networks(family, model, recipe)
    except ModelError as error:
        raise ConfigError(_as_keys(str(error))) from None


def _with_networks(family: ModelFamily, model: TorchModel, recipe: Recipe) -> TorchModel:
    if given := recipe.reference:
        from flashdiff.families.ip_adapter import check_adapter, find_adapter, with_adapter

        found = find_adapter(given.adapter, given.encoder)
        check_adapter(found, family, model.folder, model.spec)
        model = with_adapter(family, model, found)
        assert model.reference_encoder
        model.reference_encoder.requires_grad_(False)
    if recipe.controls:
        from flashdiff.families.control import check_control, find_control, with_controls

        places = {control.name: find_control(control.name, control.network) for control in recipe.controls}
        for name, place in places.items():
            check_control(name, place, family, model.folder, model.spec)
        model = with_controls(family, model, places)
        for network in model.controls.values():
            network.requires_grad_(False)
    return model


def hashes_of_networks(recipe: Recipe) -> dict[str, str]:
    """Of the files of the networks that the recipe adds to its base, by its keys; empty where it adds none."""
    found: dict[str, str] = {}
    if given := recipe.reference:
        from flashdiff.families.ip_adapter import encoder_hash, find_adapter

        adapter = find_adapter(given.adapter, given.encoder)
        found |= {"reference.adapter": hash_file(adapter.file), "reference.encoder": encoder_hash(adapter.encoder)}
    if recipe.controls:
        from flashdiff.families.control import find_control

        for control in recipe.controls:
            found[f"controls.{control.name}"] = hash_of_network(find_control(control.name, control.network))
    return found


_KEYS = {
    "--control ": "controls: ",
    "--reference-encoder ": "reference.encoder: ",
    "--reference ": "reference.adapter: ",
    "name the image encoder's folder with --reference-encoder": "name the image encoder's folder in reference.encoder",
}
"""A recipe's keys by the options of `build-engine` that its errors name."""


def _as_keys(message: str) -> str:
    for option, key in _KEYS.items():
        message = message.replace(option, key)
    return message
