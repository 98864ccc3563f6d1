"""Where a run's first weights come from: `init_from`."""

from pathlib import Path

import safetensors.torch
from torch import Tensor

from flashdiff.checkpoint import load_state
from flashdiff.distill.checkpoints import checkpoints
from flashdiff.errors import ConfigError, first_line
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.lora import ADAPTER, FLASH, WEIGHTS


def first_weights(place: str, model: TorchModel, family: ModelFamily) -> dict[str, Tensor]:
    """The student's weights in a checkpoint or a run's folder, by the names of the network's parameters: those that would be
    published. ConfigError where they are not this student's."""
    found = _read(Path(place), family)
    wanted = {name: p for name, p in model.network.named_parameters() if f".{ADAPTER}." in name}
    for name, parameter in wanted.items():
        if name not in found or found[name].shape != parameter.shape:
            has = f"has the shape {list(found[name].shape)}" if name in found else "is missing"
            raise ConfigError(
                f"init_from '{place}': its '{name}' {has}, this run's has {list(parameter.shape)}; give a run with the same "
                "base, lora.rank and lora.targets"
            )
    return {name: found[name].float() for name in wanted}


def _read(place: Path, family: ModelFamily) -> dict[str, Tensor]:
    if place.suffix == ".pt":
        if not place.is_file():
            raise ConfigError(f"init_from '{place}': there is no such file")
        return _averages(place)
    if (place / FLASH).is_file() and (place / WEIGHTS).is_file():
        try:
            weights = safetensors.torch.load_file(place / WEIGHTS)
        except Exception as error:  # safetensors' errors for a damaged file
            raise ConfigError(f"init_from '{place}': {WEIGHTS} is damaged: {first_line(error)}") from None
        named = {}
        for key, value in weights.items():
            module, _, role = key.removeprefix(f"{family.lora_prefix}.").removesuffix(".weight").rpartition(".")
            named[f"{module}.{role}.{ADAPTER}.weight"] = value
        return named
    if saved := checkpoints(place / "training"):
        return _averages(saved[-1])
    raise ConfigError(f"init_from '{place}': neither a checkpoint (.pt) nor the folder of a run that has one")


def _averages(checkpoint: Path) -> dict[str, Tensor]:
    try:
        average: dict[str, Tensor] = load_state(checkpoint)["student"]["average"]
        return dict(average)
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"init_from '{checkpoint}': it is no checkpoint of a distillation") from None
