"""What differs between the classes of control networks, as one record each, which a family lists."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flashdiff.components import ModelSpec
from flashdiff.families.settings import Fixed


@dataclass(frozen=True, kw_only=True)
class ControlKind:
    """One class of diffusers' control networks."""

    fixed: Fixed
    """Settings that flashdiff follows at these values alone."""
    nullable: Collection[str] = ()
    """Settings that may be null, whatever the class's signature says."""
    layers: tuple[str, ...] = ()
    """Settings that count the blocks which give residuals: one of them is above 0. Empty: the class always has some."""
    needs: Callable[[Mapping[str, Any], Mapping[str, Any], ModelSpec], dict[str, tuple[Any, Any]]]
    """What has to be equal, by name: the network's and the base's, of the network's settings and the denoiser's."""
    reads_latents: bool = False
    """Whether it reads the latents of an image, in the place of its pixels."""
    is_unshifted: Callable[[Mapping[str, Any]], bool] = lambda _: False
    """Whether the latents are scaled, but not shifted, of the network's settings."""
