"""The kinds of change that a LoRA file makes to a layer, by the roles of its tensors, and how a file scales them. No torch."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

DECOMPOSED = ("magnitude", "dora_scale")
"""The roles of DoRA's magnitudes: peft's, one an output, and that of LyCORIS, which knows two forms."""

_KINDS: dict[str, tuple[frozenset[str], ...]] = {
    # The first role decides the kind; then what it needs, and what it may have.
    "down": (frozenset({"down", "up"}), frozenset({"mid", "alpha", *DECOMPOSED, "up_bias", "diff_b"})),
    "hada_w1_a": (
        frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        frozenset({"hada_t1", "hada_t2", "alpha", *DECOMPOSED, "diff_b"}),
    ),
    "lokr": (
        frozenset(),
        frozenset({f"lokr_{factor}" for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")})
        | {"alpha", *DECOMPOSED, "diff_b"},
    ),
    "diff": (frozenset({"diff"}), frozenset({"diff_b"})),
    "diff_b": (frozenset({"diff_b"}), frozenset()),
}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a file scales its LoRA layers, where its metadata says so; else each layer has its own alpha, or the rank is taken."""

    alpha: float | None = None
    rank: int | None = None
    by_root: bool = False
    """Divide by the root of the rank (rsLoRA, arXiv 2312.03732)."""

    def factor(self, own_alpha: float | None, rank: int, weight: float = 1.0) -> float:
        """What the product of a layer of that rank is multiplied by, at `weight`; `own_alpha` is that among the layer's tensors.

        ValueError where the metadata says something else.
        """
        alpha = self.alpha if own_alpha is None else own_alpha
        if self.alpha not in (None, alpha):
            raise ValueError(f"its alpha is {alpha:g}, the metadata says {self.alpha:g}")
        if self.rank is not None and self.rank != rank:
            raise ValueError(f"the metadata says rank {self.rank}, the tensors have {rank}")
        if alpha is None:
            return weight
        return float(weight * alpha / (rank**0.5 if self.by_root else rank))


def scaling_of(settings: Mapping[str, Any], part: str, module: str) -> Scaling:
    """What peft's settings, each with its part before it (`unet.lora_alpha`), say of a layer's scale.

    TypeError or ValueError where they make no sense.
    """
    own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
    if not own:
        return Scaling()
    alphas, ranks = own.get("alpha_pattern") or {}, own.get("rank_pattern") or {}
    alpha = alphas.get(_pattern_of(alphas, module), own.get("lora_alpha", own.get("alpha")))
    rank = ranks.get(_pattern_of(ranks, module), own.get("r"))
    return Scaling(
        alpha=None if alpha is None else float(alpha),
        rank=None if rank is None else int(rank),
        by_root=bool(own.get("use_rslora")),
    )


def _pattern_of(patterns: Collection[str], module: str) -> str:
    """The first pattern that the end of a layer's name matches, as peft's `get_pattern_key` has it; else the name."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def check_layer(layer: Collection[str]) -> str | None:
    """Why tensors of these roles do not make a layer; None where they do."""
    roles = set(layer)
    kind = next((kind for kind in _KINDS if any(role.startswith(kind) for role in roles)), None)
    if roles == {"diff_b"}:
        kind = "diff_b"
    if "diff" in roles and kind != "diff":
        return "a full difference and another kind of change are for the same layer"
    if kind is None:
        return f"no weights come with its {', '.join(sorted(roles))}"
    needed, possible = _KINDS[kind]
    if missing := needed - roles:
        return f"its {', '.join(sorted(missing))} is missing"
    if alien := roles - needed - possible:
        return f"{', '.join(sorted(alien))} belongs to another kind of change than {', '.join(sorted(roles - alien))}"
    if roles.issuperset(DECOMPOSED):
        return f"of {' and '.join(DECOMPOSED)} it may have one"
    if kind == "hada_w1_a" and ("hada_t1" in roles) != ("hada_t2" in roles):
        return "of hada_t1 and hada_t2 one is missing"
    if kind == "lokr":
        for factor in ("lokr_w1", "lokr_w2"):
            if not (factor in roles) ^ ({f"{factor}_a", f"{factor}_b"} <= roles):
                return f"{factor}, or the pair {factor}_a and {factor}_b, is missing"
        if "lokr_t2" in roles and "lokr_w2" in roles:
            return "lokr_t2 needs lokr_w2_a and lokr_w2_b"
    return None
