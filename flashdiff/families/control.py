"""ControlNets (arXiv 2302.05543) and T2I-adapters (arXiv 2302.08453): checked against a base, and fused with its denoiser.

Both read an image and give residuals, which the UNet adds to its own values. They run in every step, in one graph with the UNet:
their residuals never leave the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.controls import steered, unsteered
from flashdiff.errors import ModelError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.files import base_hash
from flashdiff.families.loading import load_part, read_config
from flashdiff.families.networks import find_network, hash_of_network
from flashdiff.families.settings import Fixed, check_config, default_settings
from flashdiff.lora_requests import unslotted

UNET_CONTROLS = ("ControlNetModel", "T2IAdapter")
"""What Stable Diffusion's UNets can be steered by."""

_FIXED: Mapping[str, Fixed] = {
    "ControlNetModel": {
        "global_pool_conditions": (False, None),
        "class_embed_type": (None,),
        "conditioning_channels": (3,),
        "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    },
    "T2IAdapter": {"in_channels": (1, 3)},
}
_SHARED = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type",
           "projection_class_embeddings_input_dim", "encoder_hid_dim")  # fmt: skip
"""Settings of a ControlNet that are the UNet's own."""


def find_control(name: str, place: str) -> Path:
    """The folder of a control network; ModelError when there is none."""
    option = f"--control {name}={place}"
    try:
        return find_network(option, place, what="ControlNet or T2I-adapter", inside=("controlnet", "t2iadapter"))
    except ModelError as error:
        raise error if option in str(error) else ModelError(f"{option}: {error}") from None


def check_control(name: str, folder: Path, family: ModelFamily, base: Path, spec: ModelSpec) -> str:
    """The class of a control network; ModelError for one that cannot steer this base, with the reason and both hashes."""
    option = f"--control {name}={folder}"
    if not family.controls:
        raise ModelError(f"{option}: models of the family {family.name} are not steered by control networks")
    config = read_config(folder.parent, folder.name)
    kind = str(config.get("_class_name"))
    if kind not in family.controls:
        raise ModelError(f"{option}: it is a {kind}; {spec.name} can be steered by {' and '.join(family.controls)}")
    check_config(f"{folder}/config.json", config, kind, _FIXED[kind])
    settings = {**default_settings(kind), **config}
    unet = {**default_settings("UNet2DConditionModel"), **read_config(base, family.lora_prefix)}
    differing = _of_t2i(settings, unet, spec) if kind == "T2IAdapter" else _of_controlnet(settings, unet, spec)
    for setting, (own, wanted) in differing.items():
        if _plain(own) != _plain(wanted):
            hashes = f"the control is {hash_of_network(folder)[:12]}, the base {base_hash(base)[:12]}"
            raise ModelError(f"{option} was made for another base: its {setting} is {own}, {spec.name} needs {wanted} ({hashes})")
    return kind


def _of_controlnet(settings: Mapping[str, Any], unet: Mapping[str, Any], spec: ModelSpec) -> dict[str, tuple[Any, Any]]:
    """What has to be equal: the network's and the base's."""
    halvings = len(settings["conditioning_embedding_out_channels"] or ()) - 1
    return {
        **{name: (settings[name], unet[name]) for name in _SHARED},
        "in_channels": (settings["in_channels"], spec.latent_channels),
        "pixels a latent cell": (2**halvings, spec.latent_factor),
    }


def _of_t2i(settings: Mapping[str, Any], unet: Mapping[str, Any], spec: ModelSpec) -> dict[str, tuple[Any, Any]]:
    *levels, middle = _places_of_unet(unet, spec.latent_factor)
    kind, features = str(settings["adapter_type"]), _features_of_t2i(settings)
    own, further = features[: len(levels)], features[len(levels) :]
    kinds = ("full_adapter", "light_adapter") if "CrossAttn" in str(unet["down_block_types"][0]) else ("full_adapter_xl",)
    # A further feature of the other types is too small for the middle: the UNet drops it.
    wanted_further = [middle][: len(further)] if kind == "full_adapter_xl" else further[:1]
    added = " with the level that it adds" if kind == "light_adapter" else ""
    return {
        "adapter_type": (kind, kind if kind in kinds else " or ".join(kinds)),
        "channels" + added: ([width for width, _ in own], [width for width, _ in levels]),
        "downscale_factor": (settings["downscale_factor"], levels[0][1]),
        "pixels a cell of each level": ([pixels for _, pixels in own], [pixels for _, pixels in levels]),
        "further levels (channels, pixels a cell)": (further, wanted_further),
    }


def _features_of_t2i(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Channels, and pixels a cell, of what an adapter gives."""
    widths, factor = list(settings["channels"]), settings["downscale_factor"]
    if settings["adapter_type"] == "full_adapter_xl":  # halves once, before its third level
        return [(width, factor * (1 if level < 2 else 2)) for level, width in enumerate(widths)]
    added = widths[-1:] if settings["adapter_type"] == "light_adapter" else []
    return [(width, factor * 2**level) for level, width in enumerate(widths + added)]


def _places_of_unet(unet: Mapping[str, Any], factor: int) -> list[tuple[int, int]]:
    """Channels, and pixels a cell, where a UNet adds features: in each of its levels, and in the middle.

    It adds one before a level with attention is halved, and after a level without it was.
    """
    places, last = [], len(unet["block_out_channels"]) - 1
    for level, (width, block) in enumerate(zip(unet["block_out_channels"], unet["down_block_types"], strict=True)):
        halved = factor if level == last else 2 * factor
        places.append((width, factor if "CrossAttn" in block else halved))
        factor = halved
    return [*places, (unet["block_out_channels"][-1], factor)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def with_controls(model: TorchModel, controls: Mapping[str, Path]) -> TorchModel:
    """The model with these control networks by name, loaded from their folders."""
    if not controls:
        return model
    import diffusers

    networks = {}
    for name, folder in controls.items():
        kind = str(read_config(folder.parent, folder.name).get("_class_name"))
        networks[name] = load_part(folder.parent, folder.name, getattr(diffusers, kind))
    plain = unsteered(unslotted(model.spec))  # a build's spec has its controls and slots from the start
    spec, own = steered(plain, list(networks)), len(plain.step_parts()[-1].inputs) - 2
    return replace(
        model, spec=spec, controls=networks, denoiser_control=SteeredDenoiser(model.denoiser, list(networks.values()), own).eval()
    )


class SteeredDenoiser(nn.Module):
    """A UNet's denoiser and its control networks as one."""

    def __init__(self, denoiser: Any, networks: Sequence[Any], own: int) -> None:
        """`own` is the number of inputs that the denoiser takes itself, but for latents and times."""
        super().__init__()
        self.denoiser, self.networks, self.own = denoiser, nn.ModuleList(networks), own

    def forward(self, *inputs: Tensor) -> Tensor:
        """`inputs`: the denoiser's own, latents and times first; then an image [B, 3, H, W] in [-1, 1] and a scale [B] for each
        network."""
        latents, times, *inputs = inputs  # type: ignore[assignment]
        own, images, scales = inputs[: self.own], inputs[self.own :: 2], inputs[self.own + 1 :: 2]
        texts = self.denoiser.texts(latents, *own)
        residuals: dict[str, list[Tensor]] = {}
        for network, image, scale in zip(self.networks, images, scales, strict=True):
            for place, values in _residuals(network, latents, times, texts, image / 2 + 0.5, scale[:, None, None, None]).items():
                before = residuals.get(place)
                residuals[place] = values if before is None else [one + other for one, other in zip(before, values, strict=True)]
        output: Tensor = self.denoiser(latents, times, *own, residuals=residuals)
        return output


def _residuals(
    network: Any, latents: Tensor, times: Tensor, texts: Mapping[str, Any], image: Tensor, scale: Tensor
) -> dict[str, list[Tensor]]:
    """A network's residuals, by the place in the UNet where they are added; the image is in [0, 1]."""
    if hasattr(network, "adapter"):
        if network.config.in_channels == 1:
            # As Pillow turns color into grey (ITU-R 601). A CUDA graph cannot capture a tensor made from Python's numbers.
            image = 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]
        return {"down_intrablock_additional_residuals": [values * scale for values in network(image)]}
    down, mid = network(latents, times, controlnet_cond=image, conditioning_scale=scale, return_dict=False, **texts)
    return {"down_block_additional_residuals": list(down), "mid_block_additional_residual": [mid]}


def as_unet_takes(residuals: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    """Residuals as the UNet's arguments; it empties the lists that it is given."""
    return {place: values[0] if place == "mid_block_additional_residual" else values for place, values in residuals.items()}
