"""The registry of the student's losses: what a recipe may set for each, what it costs, and how it is built.

A new loss is an entry in `TERMS` and a subclass of `StudentLoss`, which `build` imports: a recipe is checked without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flashdiff.distill.losses.settings import AdversarialSettings, DistillationSettings, DistributionMatchingSettings

if TYPE_CHECKING:
    from flashdiff.distill.losses.base import Setup, StudentLoss

S = TypeVar("S")

TRAINED_PASS = 3
"""Cost of a forward pass with the backward pass that trains a LoRA in it, in forward passes."""
FROZEN_PASS = 2
"""The same where the gradient only passes through. Both are what they take on a CPU: 2.7 and 2.0."""
TAPPED_SHARE = 0.5
"""Share of a pass that ends at the block in the middle: 0.41 of the embedded UNet's forward, 0.53 with its backward."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Forward passes of the network that a loss takes, per sample and update, its opponent's training included."""

    in_use: float = 0
    """In phases that give the loss a weight."""
    throughout: float = 0
    """In every phase of a run that uses the loss in any, in addition."""
    guided: float = 0
    """Guided evaluations of the teacher in phases that give the loss a weight; each takes a pass for every branch of guidance."""
    kept_passes: int = 0
    """How many passes keep their activations for the student's backward pass."""


@dataclass(frozen=True, kw_only=True)
class Term(Generic[S]):
    """One loss of the student: its keys in a recipe, its cost, and how it is built."""

    name: str
    """Its key in `[[phases]]`, where the value is its weight, and in `[loss]`; its name in the log."""
    default_weight: float | None = None
    """The weight in a phase that names none. None: 0, and the key stays out of a resolved recipe, whose hash then does not
    change when the loss is registered."""
    settings: Any = None
    """The type of its key in `[loss]`; None: it has no such key."""
    default_settings: S
    cost: Callable[[S], Cost]
    build: Callable[["Setup", S], "StudentLoss"]

    @property
    def title(self) -> str:
        """Its name in text: the dry run, the published card."""
        return self.name.replace("_", " ")


def _distillation_cost(settings: DistillationSettings) -> Cost:
    # The features of the student's samples and of the teacher's. Decoding is not counted: it runs another network.
    return Cost(in_use=(FROZEN_PASS + 1) * TAPPED_SHARE, kept_passes=1) if settings.kind == "perceptual" else Cost()


def _build_distillation(setup: "Setup", settings: DistillationSettings) -> "StudentLoss":
    from flashdiff.distill.losses.distillation import Distillation

    return Distillation(setup, settings)


def _adversarial_cost(settings: AdversarialSettings) -> Cost:
    # The student's loss sees samples and real latents. The head's sees both, and real ones with noise for R1; it needs no
    # gradient of the network.
    share = max(settings.taps, default=TAPPED_SHARE)
    return Cost(in_use=(FROZEN_PASS + 1) * share, throughout=(3 if settings.r1_weight else 2) * share, kept_passes=1)


def _build_adversarial(setup: "Setup", settings: AdversarialSettings) -> "StudentLoss":
    from flashdiff.distill.losses.adversarial import Adversarial

    return Adversarial(setup, settings)


def _distribution_matching_cost(settings: DistributionMatchingSettings) -> Cost:
    critic = TRAINED_PASS * settings.critic_updates if settings.fake_score == "lora" else 0
    # The fake score's, the teacher's guided one and, where that is at another time, its conditional one.
    return Cost(in_use=1 + settings.decoupled, guided=1, throughout=critic)


def _build_distribution_matching(setup: "Setup", settings: DistributionMatchingSettings) -> "StudentLoss":
    from flashdiff.distill.losses.distribution_matching import DistributionMatching

    return DistributionMatching(setup, settings)


_BUILT_IN: tuple[Term[Any], ...] = (
    Term(
        name="distillation",
        default_weight=1.0,
        settings=DistillationSettings,
        default_settings=DistillationSettings(),
        cost=_distillation_cost,
        build=_build_distillation,
    ),
    Term(
        name="adversarial",
        default_weight=0.0,
        settings=AdversarialSettings,
        default_settings=AdversarialSettings(),
        cost=_adversarial_cost,
        build=_build_adversarial,
    ),
    Term(
        name="distribution_matching",
        default_weight=0.0,
        settings=DistributionMatchingSettings,
        default_settings=DistributionMatchingSettings(),
        cost=_distribution_matching_cost,
        build=_build_distribution_matching,
    ),
)

TERMS: dict[str, Term[Any]] = {term.name: term for term in _BUILT_IN}
"""All losses by name, in the order in which an update computes them and draws their random numbers."""
