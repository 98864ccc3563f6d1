"""What each device call takes: measured when the model is opened, then followed as the machine speeds up or slows down."""

from collections.abc import Mapping

from flashdiff.components import Costs, ModelSpec, Size
from flashdiff.parts import Phase

ByBatch = Mapping[int, float]
"""Milliseconds by batch size, in ascending order."""

_OWN_WEIGHT = 0.1  # of a call, in the cost of its own batch size
_OTHER_WEIGHT = 0.02  # in those of the part's other batch sizes
_STALL = 3.0  # a call counts as at most this many times the usual
_FORGIVEN = 0.9


class CostTable:
    """The costs of one model. Only the device thread calls `replace`, `follow` and `forgive`; any thread reads `current`.

    `current` is a frozen table: for each size, milliseconds by batch of every part, and of the phases "step" and "finish" as
    a whole. A call is named so too: by the part that prepares, or by its phase; a step with another part in the place of the
    usual one as `step_call` says.
    """

    def __init__(self, spec: ModelSpec, measured: Costs) -> None:
        self._phases: dict[str, tuple[str, ...]] = {
            step_call(replacing): tuple(part.name for part in spec.step_parts(replacing))
            for replacing in (None, *(part.name for part in spec.replacements))
        }
        self._phases[Phase.FINISH] = tuple(part.name for part in spec.parts_in(Phase.FINISH))
        self._parts_of = {part.name: (part.name,) for part in spec.parts} | self._phases
        self._everywhere = {part for part, size in measured if size is None}
        parts = {
            size: {part: dict(sorted(by_batch.items())) for (part, of), by_batch in measured.items() if of in (None, size)}
            for size in spec.sizes
        }
        self.first: Mapping[Size, Mapping[str, ByBatch]] = {size: self._with_phases(of) for size, of in parts.items()}
        self.current = self.first

    def size_of(self, call: str, size: Size) -> Size | None:
        """The image size that the call's cost depends on; None for a part whose tensors do not depend on it."""
        return None if call in self._everywhere else size

    @property
    def learned(self) -> Costs:
        """The current costs, in the form in which they were measured."""
        return {
            (part, self.size_of(part, size)): dict(by_batch)
            for size, costs in self.current.items()
            for part, by_batch in costs.items()
            if part not in self._phases
        }

    def replace(self, part: str, size: Size, by_batch: ByBatch) -> None:
        """Take these milliseconds as the part's costs from now on: at this size, or everywhere if the part has no sizes."""
        sizes = self.current if part in self._everywhere else (size,)
        self.current = {**self.current, **{of: self._with_phases({**self.current[of], part: by_batch}) for of in sizes}}

    def usual_ms(self, call: str, size: Size, slots: int) -> dict[str, float]:
        """What each part of a call with `slots` slots usually takes."""
        costs, parts = self.current[size], self._parts_of[call]
        bucket = bucket_of(costs[call], slots)
        if len(parts) == 1:
            return {parts[0]: costs[call][bucket]}
        return {part: costs[part][bucket] for part in parts}

    def follow(self, part: str, size: Size, slots: int, spent_ms: float) -> None:
        """Learn from a call with `slots` slots.

        A single stall must not cause the next deadlines to be refused, so it counts as three times the usual. The other batch
        sizes follow more slowly: one that looked expensive would never be tried again.
        """
        costs, first = self.current[size][part], self.first[size][part]
        bucket = bucket_of(costs, slots)
        own = costs[bucket] + _OWN_WEIGHT * (min(spent_ms, _STALL * costs[bucket] + 1) - costs[bucket])
        ratio = own / first[bucket] if first[bucket] else 1.0
        fresh = {batch: ms + _OTHER_WEIGHT * (first[batch] * ratio - ms) for batch, ms in costs.items()}
        self.replace(part, size, {**fresh, bucket: own})

    def forgive(self) -> None:
        """Move the costs towards those first measured. An idle server that refuses measures nothing, so high costs would stay."""
        self.current = {
            size: {
                name: {batch: min(ms, max(self.first[size][name][batch], _FORGIVEN * ms)) for batch, ms in by_batch.items()}
                for name, by_batch in costs.items()
            }
            for size, costs in self.current.items()
        }

    def _with_phases(self, parts: Mapping[str, ByBatch]) -> dict[str, ByBatch]:
        """The costs of the parts with those of the phases, which call their parts one after the other."""
        whole = dict(parts)
        for phase, (first, *others) in self._phases.items():
            whole[phase] = parts[first]
            if others:
                whole[phase] = {batch: ms + sum(parts[other][batch] for other in others) for batch, ms in parts[first].items()}
        return whole


def step_call(replacing: str | None) -> str:
    """The call that takes a step, with the part `replacing` in the place of the one that it replaces."""
    return f"{Phase.STEP} with {replacing}" if replacing else Phase.STEP


def bucket_of(by_batch: ByBatch, slots: int) -> int:
    """The smallest batch size that holds `slots`."""
    for batch in by_batch:
        if batch >= slots:
            return batch
    raise ValueError(f"no batch holds {slots}")
