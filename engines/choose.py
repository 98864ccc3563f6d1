"""`--precision auto`: builds every precision that this machine has, times them in turns, and publishes one."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashdiff.engines.bundle import MANIFEST, Manifest, Precision, Quality, read_manifest, write_manifest
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.plan import BuildPlan, describe, plan_build
from flashdiff.engines.reference import sample_image
from flashdiff.engines.requirements import free_bytes
from flashdiff.engines.runtime.engine import Engine, usual_ms
from flashdiff.errors import BackendError, BundleError
from flashdiff.files import new_folder, shown_bytes

BUILDING, PUBLISHED = "building because", "published"
"""How two lines of a build begin, which name its folder."""
_ORDER: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
"""From the most exact one."""
WORTH = 1.1
"""How many times as fast a precision must be as a more exact one to be chosen over it."""
LOWEST_PSNR = 30.0
"""In decibels from float32's images, below which no speed is worth a precision."""
MOST_LOST = 0.02
"""The largest share of attributes that may be lost, where the embedded world's probe reads them."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A precision that was built and passed its gate."""

    precision: Precision
    ms: float
    """Of an image in up to four steps, alone."""
    quality: Quality

    def __str__(self) -> str:
        return f"{self.precision} {self.ms:.1f} ms an image, {self.quality.psnr:.1f} dB"


def choose_precision(
    options: BuildOptions, build: Callable[[BuildPlan, Callable[[str], None]], Manifest], report: Callable[[str], None]
) -> Manifest:
    """Build with `build` every precision that the backend has here, and publish the one that `best_of` names.

    A bundle that was chosen from the same inputs is left alone.
    """
    if previous := up_to_date(options):
        report(f"{options.out} is up to date: {previous.precision}, chosen before from the same inputs; nothing to do")
        return previous
    plans, reasons = plan_candidates(options)
    for reason in reasons:
        report(f"auto: {reason}")

    def report_build(line: str) -> None:
        if not line.startswith((BUILDING, PUBLISHED)):  # of a folder that will be gone
            report(line)

    with new_folder(options.out, BundleError, replace=True) as folder:
        built: dict[Precision, tuple[Path, Manifest]] = {}
        for precision in plans:
            report(f"auto: building {precision}")
            place = folder / precision
            try:
                built[precision] = place, build(plan_build(_given(options, precision, place), with_quality=True), report_build)
            except (BackendError, BundleError) as error:
                if precision == "fp32":
                    raise
                report(f"auto: without {precision}: {error}")
        candidates = _timed(built)
        best = best_of(candidates)
        chosen = f"{best.precision}, of {'; '.join(map(str, candidates))}: {_rule(best, candidates)}"
        report(f"auto: {chosen}")
        place, manifest = built[best.precision]
        for path in place.iterdir():
            path.rename(folder / path.name)
        for precision in plans:
            shutil.rmtree(folder / precision, ignore_errors=True)
        manifest = manifest.model_copy(update={"chosen": chosen, "candidates": tuple(plans)}).sealed()
        write_manifest(folder, manifest)
    report(f"published {options.out} (bundle {manifest.bundle_hash[:12]})")
    return manifest


def plan_candidates(options: BuildOptions) -> tuple[dict[Precision, BuildPlan], list[str]]:
    """The plan of every precision that can be built here, and why the others cannot."""
    plans: dict[Precision, BuildPlan] = {}
    reasons = []
    for precision in _ORDER:
        try:
            plans[precision] = plan_build(_given(options, precision, options.out), with_quality=True)
        except (BackendError, BundleError) as error:
            if precision == "fp32":
                raise
            reasons.append(f"without {precision}: {str(error).removeprefix(f'--precision {precision}: ')}")
    return plans, reasons


def describe_choice(options: BuildOptions) -> Iterator[str]:
    """What would be built, for people: the plan of the most exact precision, with what all of them take together."""
    if previous := up_to_date(options):
        yield f"to do        nothing: {options.out} is up to date ({previous.precision}, chosen before)"
        return
    plans, reasons = plan_candidates(options)
    needed = [plan.requirements for plan in plans.values()]
    yield from (line for line in describe(plans["fp32"]) if not line.startswith(("disk ", "time ", "to do ")))
    disk: dict[Path, int] = {}
    for one in needed:
        for place, size in one.disk_bytes.items():
            disk[place] = disk.get(place, 0) + size
    for place, size in disk.items():
        yield f"disk         {shown_bytes(size)} at most in {place} ({shown_bytes(free_bytes(place))} free)"
    yield f"time         about {sum(one.seconds for one in needed):.0f} s, and calibration (an estimate; one core, small models)"
    yield f"auto         builds {', '.join(plans)} in turn, measures them, and keeps one"
    for reason in reasons:
        yield f"auto         {reason}"


def up_to_date(options: BuildOptions) -> Manifest | None:
    """The bundle at `out`, where it was chosen before, its build would change nothing, and no further precision can be built."""
    if not (options.out / MANIFEST).is_file():
        return None
    try:
        previous = read_manifest(options.out)
    except BundleError:
        return None
    if not previous.chosen or plan_build(_given(options, previous.precision, options.out), with_quality=True).changes:
        return None
    further = [precision for precision in _ORDER if precision not in previous.candidates]
    return None if any(_can_build(options, precision) for precision in further) else previous


def _can_build(options: BuildOptions, precision: Precision) -> bool:
    try:
        plan_build(_given(options, precision, options.out), with_quality=True)
    except (BackendError, BundleError):
        return False
    return True


def best_of(candidates: list[Candidate]) -> Candidate:
    """The fastest precision that is good enough; `candidates` come from the most exact one, which always is.

    One that is less exact must be `WORTH` times as fast.
    """
    best = candidates[0]
    for candidate in candidates[1:]:
        if _is_good(candidate.quality) and best.ms > WORTH * candidate.ms:
            best = candidate
    return best


def _is_good(quality: Quality) -> bool:
    lost = quality.attributes[0] - quality.attributes[1] if quality.attributes else 0.0
    return quality.psnr >= LOWEST_PSNR and lost <= MOST_LOST


def _rule(best: Candidate, candidates: list[Candidate]) -> str:
    """Why the best is the best, in words."""
    poor = [candidate.precision for candidate in candidates if not _is_good(candidate.quality)]
    apart = f"; the images of {', '.join(poor)} are too far from float32's" if poor else ""
    if best is candidates[0]:
        return f"none is {WORTH:g} times as fast as it{apart}"
    return f"the fastest that is {WORTH:g} times as fast as a more exact one{apart}"


def _given(options: BuildOptions, precision: Precision, out: Path) -> BuildOptions:
    return options.model_copy(update={"precision": precision, "out": out})


def _timed(built: dict[Precision, tuple[Path, Manifest]]) -> list[Candidate]:
    """Whole images, one engine after the other in turns, so that all meet the same noise of the machine."""
    runs: dict[Precision, Callable[[], object]] = {}
    for precision, (place, manifest) in built.items():
        engine = Engine(place, manifest)
        size = manifest.model.sizes[0]
        runs[precision] = lambda engine=engine, size=size: sample_image(engine, engine.spec, size)  # type: ignore[misc]
    spent = usual_ms(runs)
    candidates = []
    for precision, (_, manifest) in built.items():
        assert manifest.quality
        candidates.append(Candidate(precision=precision, ms=spent[precision], quality=manifest.quality))
    return candidates
