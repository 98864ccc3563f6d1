"""What differs between the classes of control networks: a record for each, which families list."""

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
    """Of the network's settings and the denoiser's: pairs of values that must be equal, the network's first, by name."""
    reads_latents: bool = False
    """Whether it reads the latents of its image, and not the pixels."""
    is_unshifted: Callable[[Mapping[str, Any]], bool] = lambda _: False
    """Of the network's settings: whether it was trained on latents that are scaled but not shifted."""
