"""The student's speed-up over its teacher: how it is computed, its table, and why it falls short of the ideal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from benchmarks.timing.configurations import STAGES

_STAGE_TITLES = {"denoise_step": "one step", "image_encoding": "PNG"}
_MIN_SAMPLES_FOR_P95 = 20  # with fewer, the 95th percentile is the largest sample


def of_main_backend(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements of the first pair of bundles, and those of stock diffusers."""
    return [
        one
        for one in measurements
        if _is_stock(one) or all(one[name] == measurements[0][name] for name in ("backend", "precision"))
    ]


def speedup_table(measurements: Sequence[Measurement]) -> str:
    """A line per configuration: stages, total, speed-up over its teacher at the most steps, and the ideal speed-up."""
    measured = {one["stage"] for one in measurements} - {"total"}
    stages = [stage for stage in STAGES if stage in measured]
    has_backends = len({one["backend"] for one in measurements if one["model"] == "teacher"}) > 1
    has_p95 = all(one["n"] >= _MIN_SAMPLES_FOR_P95 for one in measurements if one["stage"] == "total")
    titles = ["model", *(["backend"] if has_backends else []), "batch", "steps", "evaluations"]
    titles += [_STAGE_TITLES.get(stage, stage) for stage in stages]
    titles += ["total, median (p95) ms" if has_p95 else "total, median ms", "speed-up", "ideal"]
    lines = []
    for total, stage_ms, teacher in against_teachers(measurements):
        conditions = [total["model"], *([total["backend"]] if has_backends else []), total["batch"], total["steps"], total["nfe"]]
        p95 = f" ({total['p95_ms']:.1f})" if has_p95 else ""
        lines.append(
            [
                *conditions,
                *(f"{stage_ms[stage]:.2f}" if stage in stage_ms else "" for stage in stages),
                f"{total['median_ms']:.1f}{p95}",
                f"{teacher.stage_ms['total'] / total['median_ms']:.1f}x",
                f"{teacher.nfe / total['nfe']:.0f}x",
            ]
        )
    return markdown_table(titles, lines)


@dataclass(frozen=True)
class IdealGap:
    """Why a student is slower than ideal, in milliseconds.

    Ideal is the teacher's total times the student's share of the teacher's evaluations.
    """

    total: Measurement
    """The student's total."""
    ideal: float
    fixed: float
    """Text, decoding and PNG: fewer steps do not shorten them."""
    evaluations: float
    """The cost of single evaluations above that of the teacher's guided pairs, which run as one batch each."""
    serving: float
    """Queue and wire."""

    @property
    def other(self) -> float:
        """What no other term explains, in milliseconds."""
        return float(self.total["median_ms"]) - self.ideal - self.fixed - self.evaluations - self.serving

    @property
    def share_of_ideal(self) -> float:
        """The speed-up as a share of the ideal one."""
        return self.ideal / float(self.total["median_ms"])


def ideal_gaps(measurements: Sequence[Measurement]) -> list[IdealGap]:
    """The gap of every student whose stages were timed."""
    gaps = []
    for total, stage_ms, teacher in against_teachers(measurements):
        if "denoise_step" in stage_ms and total["model"] != "teacher":
            share = total["nfe"] / teacher.nfe
            fixed = sum(stage_ms[name] - share * teacher.stage_ms[name] for name in ("text", "decode", "image_encoding"))
            evaluations = total["steps"] * stage_ms["denoise_step"] - share * teacher.steps * teacher.stage_ms["denoise_step"]
            serving = stage_ms.get("queue", 0.0) + stage_ms.get("wire", 0.0)
            gaps.append(IdealGap(total, share * teacher.stage_ms["total"], fixed, evaluations, serving))
    return gaps


def summary(measurements: Sequence[Measurement]) -> str:
    """The speed-ups, and a second table of the gaps to the ideal."""
    titles = ("model", "backend", "batch", "steps", "ideal, ms", "+ text, decode, PNG", "+ single evaluations", "+ queue, wire")
    lines = []
    for gap in ideal_gaps(measurements):
        conditions = [gap.total[name] for name in ("model", "backend", "batch", "steps")]
        spent = (gap.ideal, gap.fixed, gap.evaluations, gap.serving, gap.other, gap.total["median_ms"])
        lines.append([*conditions, *(f"{ms:.1f}" for ms in spent), f"{gap.share_of_ideal:.2f}"])
    table = markdown_table((*titles, "+ other", "= measured, ms", "of the ideal"), lines)
    rest = ["", "Where the rest of the ideal speed-up went:", "", table] if lines else []
    return "\n".join([speedup_table(measurements), *rest])


@dataclass(frozen=True)
class Teacher:
    """What a configuration is compared with."""

    steps: int
    nfe: int
    stage_ms: Mapping[str, float]


def against_teachers(measurements: Sequence[Measurement]) -> Iterator[tuple[Measurement, dict[str, float], Teacher]]:
    """Every configuration's total, its medians by stage, and its teacher.

    The teacher is the one with the most steps on the same backend at the same batch. Stock diffusers is compared with that of the
    first backend.
    """

    def stage_ms(total: Measurement) -> dict[str, float]:
        key = ("model", "backend", "precision", "batch", "steps")
        return {one["stage"]: one["median_ms"] for one in measurements if all(one[name] == total[name] for name in key)}

    totals = [one for one in measurements if one["stage"] == "total"]
    for total in totals:
        teachers = [one for one in totals if one["model"] == "teacher" and one["batch"] == total["batch"]]
        own = [one for one in teachers if all(one[name] == total[name] for name in ("backend", "precision"))]
        if _is_stock(total) or not own:
            own = [one for one in teachers if one["backend"] == teachers[0]["backend"]]
        teacher = max(own, key=lambda one: int(one["steps"]))
        yield total, stage_ms(total), Teacher(teacher["steps"], teacher["nfe"], stage_ms(teacher))


def _is_stock(measurement: Measurement) -> bool:
    return str(measurement["model"]).startswith("diffusers")
