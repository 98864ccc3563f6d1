"""ControlNets of SD3 and FLUX: they read the latents of their image, and each residual serves several of the base's blocks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flashdiff.components import ModelSpec
from flashdiff.families.control_kinds import ControlKind


def spread_evenly(residuals: Sequence[Tensor], blocks: int) -> list[Tensor]:
    """A residual for every block, as in SD3's transformer: each serves the same number of blocks, or one more."""
    return [residuals[int(block / (blocks / len(residuals)))] for block in range(blocks)]


def spread_in_runs(residuals: Sequence[Tensor], blocks: int) -> list[Tensor]:
    """A residual for every block, as in FLUX's transformer: runs of blocks of one length, the last of which may be shorter."""
    return [residuals[block // math.ceil(blocks / len(residuals))] for block in range(blocks)]


def _needs(own: Mapping[str, Any], base: Mapping[str, Any], *names: str) -> dict[str, tuple[Any, Any]]:
    width, wanted = (settings["num_attention_heads"] * settings["attention_head_dim"] for settings in (own, base))
    return {**{name: (own[name], base[name]) for name in names}, "width (heads x head_dim)": (width, wanted)}


def _of_sd3(own: Mapping[str, Any], base: Mapping[str, Any], _: ModelSpec) -> dict[str, tuple[Any, Any]]:
    needs = _needs(own, base, "in_channels", "patch_size", "pooled_projection_dim")
    if own["joint_attention_dim"] is not None:  # SD3.5's own ControlNets do not read the text
        needs["joint_attention_dim"] = own["joint_attention_dim"], base["joint_attention_dim"]
    if own["use_pos_embed"]:  # its positions must reach as far as the base's
        most, wanted = own["pos_embed_max_size"], base["pos_embed_max_size"]
        needs["pos_embed_max_size"] = most, wanted if most < wanted else most
    return needs


def _of_flux(own: Mapping[str, Any], base: Mapping[str, Any], _: ModelSpec) -> dict[str, tuple[Any, Any]]:
    return _needs(own, base, "in_channels", "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")


SD3_CONTROLS: Mapping[str, ControlKind] = {
    "SD3ControlNetModel": ControlKind(
        fixed={"extra_conditioning_channels": (0,)},
        nullable=("joint_attention_dim",),
        layers=("num_layers",),
        needs=_of_sd3,
        reads_latents=True,
        # As the pipeline decides: InstantX's networks were trained without both.
        is_unshifted=lambda settings: bool(settings["force_zeros_for_pooled_projection"]),
    )
}
FLUX_CONTROLS: Mapping[str, ControlKind] = {
    "FluxControlNetModel": ControlKind(
        fixed={"num_mode": (None,), "conditioning_embedding_channels": (None,), "patch_size": (1,)},
        layers=("num_layers", "num_single_layers"),
        needs=_of_flux,
        reads_latents=True,
    )
}
