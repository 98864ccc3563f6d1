"""ControlNets (arXiv 2302.05543) and T2I-adapters (arXiv 2302.08453) of Stable Diffusion's UNets.

Both read the pixels of an image and give residuals, which the UNet adds to its own values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from flashdiff.components import ModelSpec
from flashdiff.families.control_kinds import ControlKind

_SHARED = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type",
           "projection_class_embeddings_input_dim", "encoder_hid_dim")  # fmt: skip
"""Settings of a ControlNet that are the UNet's own."""


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


class SteerableUnet:
    """What a UNet's denoiser has for `SteeredDenoiser`."""

    texts: Callable[..., dict[str, Any]]
    """What the UNet and its control networks take of the text alike: of the latents and the conditions."""

    def adopt(self, network: Any) -> None:
        """A control network is used as it is."""

    def residuals_of(
        self, network: Any, latents: Tensor, times: Tensor, conditions: Sequence[Tensor], image: Tensor, scale: Tensor
    ) -> dict[str, list[Tensor]]:
        """A network's residuals, by the place in the UNet where they are added; the image [B, 3, H, W] is in [-1, 1]."""
        image, scale = image / 2 + 0.5, scale[:, None, None, None]
        if hasattr(network, "adapter"):
            if network.config.in_channels == 1:
                # As Pillow turns color into grey (ITU-R 601). A CUDA graph cannot capture a tensor made from Python's numbers.
                image = 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]
            return {"down_intrablock_additional_residuals": [values * scale for values in network(image)]}
        texts = self.texts(latents, *conditions)
        down, mid = network(latents, times, controlnet_cond=image, conditioning_scale=scale, return_dict=False, **texts)
        return {"down_block_additional_residuals": list(down), "mid_block_additional_residual": [mid]}


def as_unet_takes(residuals: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    """Residuals as the UNet's arguments; it empties the lists that it is given."""
    return {place: values[0] if place == "mid_block_additional_residual" else values for place, values in residuals.items()}


UNET_CONTROLS: Mapping[str, ControlKind] = {
    "ControlNetModel": ControlKind(
        fixed={
            "global_pool_conditions": (False, None),
            "class_embed_type": (None,),
            "conditioning_channels": (3,),
            "controlnet_conditioning_channel_order": ("rgb", "bgr"),
        },
        needs=_of_controlnet,
    ),
    "T2IAdapter": ControlKind(fixed={"in_channels": (1, 3)}, needs=_of_t2i),
}
