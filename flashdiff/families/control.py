"""Control networks: found, checked against a base, and fused with its denoiser.

They read an image and give residuals, which the denoiser adds to its own values. They run in every step, in one graph with it:
their residuals never leave the device.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.controls import steered, unsteered
from flashdiff.errors import ModelError, first_line
from flashdiff.families import ZOO
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.codec import shift_of
from flashdiff.families.control_kinds import ControlKind
from flashdiff.families.files import base_hash
from flashdiff.families.loading import load_part, read_config
from flashdiff.families.made_for import MadeFor
from flashdiff.families.networks import find_network, hash_of_network
from flashdiff.families.settings import check_config, check_types, default_settings
from flashdiff.lora_requests import unslotted

RECORD = "control.json"
"""The file in a network's folder that says what it was trained for; published networks have none."""


class ControlInfo(MadeFor):
    """What control.json holds."""

    control: str
    """What its images show, such as edges."""


def find_control(name: str, place: str) -> Path:
    """The folder of a control network: a path, one that ships with flashdiff, or a hub id; ModelError when there is none."""
    option = f"--control {name}={place}"
    shipped = sorted(path.parent.name for path in ZOO.glob(f"*/{RECORD}"))
    if not Path(place).is_dir() and place in shipped:
        return ZOO / place
    inside = ("controlnet", "t2iadapter")
    try:
        return find_network(option, place, what="ControlNet or T2I-adapter", inside=inside, shipped=shipped)
    except ModelError as error:
        raise error if option in str(error) else ModelError(f"{option}: {error}") from None


def check_control(name: str, folder: Path, family: ModelFamily, base: Path, spec: ModelSpec) -> str:
    """The class of a control network; ModelError for one that cannot steer this base, with the reason and both hashes."""
    option = f"--control {name}={folder}"
    if not family.controls:
        raise ModelError(f"{option}: models of the family {family.name} are not steered by control networks")
    config = read_config(folder.parent, folder.name)
    class_name = str(config.get("_class_name"))
    kind = family.controls.get(class_name)
    if kind is None:
        raise ModelError(f"{option}: it is a {class_name}; {spec.name} can be steered by {' and '.join(family.controls)}")
    if sequence := [condition.name for condition in spec.conditions if condition.enters == "sequence"]:
        raise ModelError(f"{option}: {spec.name} reads {sequence[0]} in its sequence, where a control network has no part")
    path, settings = f"{folder}/config.json", {**default_settings(class_name), **config}
    check_config(path, config, class_name, kind.fixed)
    check_types(path, config, class_name, kind.nullable)
    if kind.layers and not any(settings[name] > 0 for name in kind.layers):
        counts = " and ".join(f"'{name}' is {settings[name]}" for name in kind.layers)
        raise ModelError(f"{path}: {counts}; one block at least must give residuals")
    for setting, (own, wanted) in _needs(kind, settings, family, base, spec).items():
        if _plain(own) != _plain(wanted):
            hashes = f"the control is {hash_of_network(folder)[:12]}, the base {base_hash(base)[:12]}"
            raise ModelError(f"{option} was made for another base: its {setting} is {own}, {spec.name} needs {wanted} ({hashes})")
    if info := ControlInfo.read(folder / RECORD):
        info.check(option, f"the control is {hash_of_network(folder)[:12]}", base, spec)
    return class_name


def _needs(
    kind: ControlKind, settings: Mapping[str, Any], family: ModelFamily, base: Path, spec: ModelSpec
) -> dict[str, tuple[Any, Any]]:
    """What has to be equal, by name; ModelError where the base's own settings make no sense."""
    config = read_config(base, family.lora_prefix)
    denoiser = {**default_settings(next(iter(family.networks[family.lora_prefix]))), **config}
    try:
        return kind.needs(settings, denoiser, spec)
    except Exception as error:  # the network's settings were checked: whatever the base's say
        raise ModelError(f"{base}/{family.lora_prefix}/config.json lacks or misstates {first_line(error)}") from None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def with_controls(family: ModelFamily, model: TorchModel, controls: Mapping[str, Path]) -> TorchModel:
    """The model with these control networks by name, loaded from their folders."""
    if not controls:
        return model
    import diffusers

    networks, kinds, offsets = {}, {}, []
    vae = model.weights["vae"]
    for name, folder in controls.items():
        kinds[name] = str(read_config(folder.parent, folder.name).get("_class_name"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers warns about its own code
            networks[name] = load_part(folder.parent, folder.name, getattr(diffusers, kinds[name]))
        is_unshifted = family.controls[kinds[name]].is_unshifted(networks[name].config)
        offsets.append(shift_of(vae) * vae.config.scaling_factor if is_unshifted else 0.0)
    plain = unsteered(unslotted(model.spec))  # a build's spec has its controls and slots from the start
    spec, own = steered(plain, list(networks), reads_latents(family, kinds)), len(plain.step_parts()[-1].inputs) - 2
    denoiser = SteeredDenoiser(model.denoiser, list(networks.values()), own, offsets).eval()
    return replace(model, spec=spec, controls=networks, denoiser_control=denoiser)


def reads_latents(family: ModelFamily, kinds: Mapping[str, str]) -> list[str]:
    """The names of the controls whose networks read the latents of their image; `kinds` are the classes, by name."""
    return [name for name, kind in kinds.items() if family.controls[kind].reads_latents]


class SteeredDenoiser(nn.Module):
    """A denoiser and its control networks as one."""

    def __init__(self, denoiser: Any, networks: Sequence[Any], own: int, offsets: Sequence[float]) -> None:
        """`own`: the number of the denoiser's own inputs after latents and times; `offsets` are added to the networks' images."""
        super().__init__()
        self.denoiser, self.networks, self.own, self.offsets = denoiser, nn.ModuleList(networks), own, offsets
        for network in networks:
            denoiser.adopt(network)

    def forward(self, *inputs: Tensor) -> Tensor:
        """`inputs`: the denoiser's own, latents and times first; then an image [B, 3, H, W] in [-1, 1], or its latents
        [B, C, h, w], and a scale [B] for each network."""
        latents, times, *inputs = inputs  # type: ignore[assignment]
        own, images, scales = inputs[: self.own], inputs[self.own :: 2], inputs[self.own + 1 :: 2]
        residuals: dict[str, list[Tensor]] = {}
        for network, image, scale, offset in zip(self.networks, images, scales, self.offsets, strict=True):
            given = image + offset if offset else image
            for place, values in self.denoiser.residuals_of(network, latents, times, own, given, scale).items():
                before = residuals.get(place)
                residuals[place] = values if before is None else [one + other for one, other in zip(before, values, strict=True)]
        output: Tensor = self.denoiser(latents, times, *own, residuals=residuals)
        return output
