"""Latency by stage: the student at a few steps against the guided teacher at 50, on the same engine, interleaved in one run.

    python benchmarks/latency.py --student STUDENT_BUNDLE --teacher TEACHER_BUNDLE --json latency.json

Every repeat runs each configuration once, in turn, so that a noisy machine is noisy for all of them. Times are of this
process alone, without gRPC: prompt to PNG bytes.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import environment, row
from flashdiff.components import Components
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import BundleError, FlashdiffError
from flashdiff.files import write_whole
from flashdiff.generate import check_order, decode_rows, denoise_rows, encode_prompts, new_row, unconditional_of
from flashdiff.server.images import encode_image

STAGES = ("text", "denoise_step", "decode", "image_encoding", "total")
_PROMPT = "a green monster with horns and a grin on a blue background"
_WARM_UP_ROUNDS = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Configuration:
    """What is timed: one model at one number of steps and one batch."""

    model: str
    engine: Components
    steps: int
    batch: int


Samples = dict[tuple[Configuration, str], list[float]]


def measure(configurations: Sequence[Configuration], repeats: int, report: Callable[[str], None]) -> Samples:
    """Milliseconds by configuration and stage; warm-up rounds are not counted."""
    samples: Samples = defaultdict(list)
    for index in range(-_WARM_UP_ROUNDS, repeats):
        for configuration in configurations:
            stages = _run_once(configuration, seed=max(index, 0))
            if index >= 0:
                for stage, times in stages.items():
                    samples[configuration, stage] += times
        if index >= 0 and (index + 1) % max(1, repeats // 4) == 0:
            report(f"round {index + 1} of {repeats}")
    return samples


def _run_once(configuration: Configuration, seed: int) -> dict[str, list[float]]:
    """One batch from prompts to PNG bytes, each stage timed."""
    engine, stages = configuration.engine, defaultdict[str, list[float]](list)

    def timed(stage: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        stages[stage].append(1000 * (time.perf_counter() - started))
        return result

    unconditional = unconditional_of(engine)  # of the empty prompt: a server encodes it once, so it is not part of a request
    order = check_order(engine.spec, prompt=_PROMPT, seed=seed, steps=configuration.steps, count=configuration.batch)
    started = time.perf_counter()
    conditioning = timed("text", lambda: encode_prompts(engine, [order.prompt])[0])
    rows = [new_row(engine.spec, order, index, conditioning, unconditional) for index in range(order.count)]
    for _ in range(order.steps):
        timed("denoise_step", lambda: denoise_rows(engine, rows))
    images = timed("decode", lambda: decode_rows(engine, rows))
    timed("image_encoding", lambda: [encode_image(image, "png") for image in images])
    stages["total"].append(1000 * (time.perf_counter() - started))
    return stages


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The totals as a table, each student row with its speed-up over the teacher and the ideal one."""
    teachers = {r["batch"]: r for r in rows if r["model"] == "teacher" and r["stage"] == "total"}
    lines = [
        "| model | batch | steps | evaluations | text | one step | decode | PNG | total, median (p95) ms | speed-up | ideal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for total in (r for r in rows if r["stage"] == "total"):
        key = ("model", "batch", "steps")
        stage = {r["stage"]: r["median_ms"] for r in rows if all(r[name] == total[name] for name in key)}
        teacher = teachers[total["batch"]]
        lines.append(
            f"| {total['model']} | {total['batch']} | {total['steps']} | {total['nfe']} | "
            + " | ".join(f"{stage[name]:.2f}" for name in STAGES[:-1])
            + f" | {total['median_ms']:.1f} ({total['p95_ms']:.1f}) | {teacher['median_ms'] / total['median_ms']:.1f}x"
            + f" | {teacher['nfe'] / total['nfe']:.0f}x |"
        )
    return "\n".join(lines)


def run(student: Path, teacher: Path, *, batches: Sequence[int], repeats: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Open both bundles, measure, and return {"environment": ..., "rows": [...]}."""
    engines = {"student": open_bundle(student), "teacher": open_bundle(teacher)}
    kinds = [engines[name].spec.sampler.kind for name in ("student", "teacher")]
    if kinds != ["flash", "ode"]:
        raise BundleError(
            f"the student must be a bundle with a flash LoRA and the teacher one without, not {kinds[0]} and {kinds[1]}"
        )
    if engines["student"].manifest.backend != engines["teacher"].manifest.backend:
        raise BundleError("student and teacher must be built for the same backend, or the comparison says nothing")
    if engines["student"].manifest.base_hash != engines["teacher"].manifest.base_hash:
        raise BundleError("the teacher bundle is not of the student's base")
    steps = {"student": [s for s in (1, 2, 4) if s <= engines["student"].spec.sampler.max_steps], "teacher": [50]}
    for name, engine in engines.items():
        if max(batches) * engine.spec.sampler.evaluations_per_step > engine.max_batch:
            raise BundleError(f"--batch {max(batches)}: the {name} bundle takes at most {engine.max_batch} evaluations at once")
    configurations = [
        Configuration(name, engine, count, batch)
        for batch in batches
        for name, engine in engines.items()
        for count in steps[name]
    ]
    record = environment({name: engine.manifest for name, engine in engines.items()})
    samples = measure(configurations, repeats, report)
    rows = [
        row(engines[c.model].manifest, c.model, c.batch, c.steps, stage, samples[c, stage])
        for c in configurations
        for stage in STAGES
    ]
    return {"environment": record, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--teacher", type=Path, required=True, metavar="BUNDLE", help="of the same base and backend, without the flash LoRA"
    )
    parser.add_argument("--batch", default="1", metavar="N[,N...]", help="images at once; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows")
    options = parser.parse_args()
    from flashdiff.engines.build import parse_batches

    try:
        if options.repeats < 1:
            raise BundleError(f"--repeats {options.repeats}: give a number from 1 on")
        report = run(
            options.student, options.teacher, batches=parse_batches(options.batch), repeats=options.repeats, report=print
        )
        print(markdown(report["rows"]))
        if options.json:
            write_whole(options.json, json.dumps(report, indent=2) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"latency.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
