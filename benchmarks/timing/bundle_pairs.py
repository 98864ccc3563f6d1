"""Pairs of a student's and a teacher's bundle: building one per backend, and opening those that can be compared."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from flashdiff.engines.bundle import BackendName
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.errors import BackendError, BundleError

Pair = tuple[Path, Path]
"""The folders of a student's and a teacher's bundle."""

BACKENDS: tuple[BackendName, ...] = ("openvino", "onnxruntime", "torch", "tensorrt")  # the first that runs is the main one


def build_pairs(
    base: str, lora: Path, batches: Sequence[int], more_batches: Sequence[int], folder: Path, report: Callable[[str], None]
) -> list[Pair]:
    """Pairs in `folder`, one for every backend that runs here; `report` gets a line for each that does not.

    The bundles take `batches` and `more_batches` images. The teacher's guidance is the one that the student was trained with.
    """
    from flashdiff.engines.build import BuildOptions, build_engine
    from flashdiff.lora import find_lora, read_flash_info  # imports torch, which must not be there when the server is timed

    pairs = []
    info = read_flash_info(find_lora(str(lora)))
    guidance = statistics.mean(info.guidance) if info else None
    sizes = sorted({*batches, *more_batches})
    guided = sorted({*sizes, *(2 * batch for batch in batches)})  # the teacher evaluates every image twice
    for backend in BACKENDS:
        student, teacher = folder / f"{backend}-student", folder / f"{backend}-teacher"
        try:
            build_engine(
                BuildOptions(base=base, loras=((str(lora), 1.0),), backend=backend, batch_sizes=tuple(sizes), out=student), report
            )
            build_engine(
                BuildOptions(base=base, backend=backend, batch_sizes=tuple(guided), guidance=guidance, out=teacher), report
            )
        except BackendError as error:
            report(f"without {backend}: {error}")
        else:
            pairs.append((student, teacher))
    if not pairs:
        raise BackendError("no backend runs here")
    return pairs


def open_pairs(pairs: Sequence[Pair], max_batch: int) -> list[tuple[Engine, Engine]]:
    """The engines of every pair; BundleError for bundles that cannot be compared or take fewer than `max_batch` images."""
    opened = [(open_bundle(student), open_bundle(teacher)) for student, teacher in pairs]
    for student, teacher in opened:
        _check_pair(student, teacher)
        for name, engine in (("student", student), ("teacher", teacher)):
            if max_batch * engine.spec.sampler.evaluations_per_step > engine.max_batch:
                raise BundleError(f"--batch {max_batch}: the {name} bundle takes at most {engine.max_batch} evaluations at once")
    kinds = [(student.manifest.backend, student.manifest.precision) for student, _ in opened]
    if len(set(kinds)) < len(kinds):
        raise BundleError("two students have the same backend and precision, so their measurements would have the same name")
    if len({student.manifest.base_hash for student, _ in opened}) > 1:
        raise BundleError("the students are not of one base")
    return opened


def _check_pair(student: Engine, teacher: Engine) -> None:
    """BundleError where comparing the two would mean nothing."""
    kinds = [engine.spec.sampler.kind for engine in (student, teacher)]
    if kinds != ["flash", "ode"]:
        raise BundleError(
            f"the student must be a bundle with a flash LoRA and the teacher one without, not {kinds[0]} and {kinds[1]}"
        )
    if student.manifest.backend != teacher.manifest.backend:
        raise BundleError("student and teacher must be built for the same backend, or the comparison means nothing")
    if student.manifest.base_hash != teacher.manifest.base_hash:
        raise BundleError("the teacher bundle is not of the student's base")
