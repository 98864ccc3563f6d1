"""Latency at real size, by stage: few steps against 50 guided ones, and against stock diffusers; random weights.

    python benchmarks/real_latency.py sdxl --backend torch --precision bf16 --batch 1,4 --json latency.json

The base has the public configuration's shapes (autoencoder and CLIP encoders too; T5 stands in small, so where a model has one
its text stage is too cheap) and is built by `flashdiff build-engine`, checked against torch as any bundle is. The student runs on
the teacher's engine, a flash sampler in place of the guided ODE: with random weights a LoRA would be more of the same, and
what a step takes does not depend on their values. Diffusers has the same weights and precision, eager and compiled (its denoiser,
at the first batch size). Every repeat runs each configuration in turn; from prompt to PNG bytes. Up to 25 GB of files lie in a
temporary folder meanwhile (TMPDIR).
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.latency import PROMPT, STAGES, Configuration, Stages, in_process, measure, summary
from benchmarks.real_size import NETWORKS, make_base, run_measured
from benchmarks.rows import environment, timed_row
from benchmarks.sizes import laps
from flashdiff.components import ModelSpec
from flashdiff.config import parse_numbers
from flashdiff.engines.bundle import MANIFEST, Precision, read_manifest, write_manifest
from flashdiff.engines.config import parse_batches
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.errors import FlashdiffError, first_line
from flashdiff.files import write_whole
from flashdiff.sampling import Sampler
from flashdiff.schedule import Grid
from flashdiff.server.images import encode_image

_GUIDANCE = 5.0


def student_spec(teacher: ModelSpec) -> ModelSpec:
    """The same network with a flash student's sampler."""
    sampler = Sampler(kind="flash", schedule=teacher.sampler.schedule, grid=Grid(solver_steps=32), default_steps=4)
    return teacher.model_copy(update={"sampler": sampler})


def write_student(teacher: Path, student: Path) -> None:
    """The same bundle as a flash student's, its files shared: what `benchmarks/load.py` can serve."""
    for file in (path for path in teacher.rglob("*") if path.is_file() and path.name != MANIFEST):
        (student / file.relative_to(teacher)).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, student / file.relative_to(teacher))
    manifest = read_manifest(teacher)
    write_manifest(student, manifest.model_copy(update={"model": student_spec(manifest.model)}))


def stock(base: Path, device: str, precision: Precision, compiled: bool) -> Callable[[str, int, int], Configuration]:
    """Stock diffusers on the same weights: (model, steps, batch) to a configuration; a "teacher" is guided."""
    import torch
    from diffusers import DiffusionPipeline, LCMScheduler

    from flashdiff.engines.parts import DTYPES

    pipeline: Any = DiffusionPipeline.from_pretrained(base, dtype=DTYPES[precision])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    few_steps = pipeline.scheduler
    if not hasattr(few_steps.config, "shift"):  # not a flow, whose own sampler takes few steps too
        few_steps = LCMScheduler.from_config(few_steps.config)
    guided_steps, part = pipeline.scheduler, "unet" if hasattr(pipeline, "unet") else "transformer"
    if compiled:
        setattr(pipeline, part, torch.compile(getattr(pipeline, part), dynamic=False))

    def configuration(model: str, steps: int, batch: int) -> Configuration:
        is_guided = model == "teacher"

        def once(seed: int) -> Stages:
            started = time.perf_counter()
            pipeline.scheduler = guided_steps if is_guided else few_steps
            made = pipeline(
                PROMPT,
                num_inference_steps=steps,
                guidance_scale=_GUIDANCE if is_guided else 0.0,
                num_images_per_prompt=batch,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images
            for image in made:
                encode_image((image * 255).round().astype("uint8"), "png")
            return {"total": [1000 * (time.perf_counter() - started)]}

        name = f"diffusers{', compiled' if compiled else ''}{', guided' if is_guided else ''}"
        return Configuration(name, "torch", precision, steps, batch, steps * (2 if is_guided else 1), once)

    return configuration


def configurations(
    bundle: Path, base: Path, batches: Sequence[int], teacher_steps: Sequence[int], compiles: bool, report: Callable[[str], None]
) -> tuple[Engine, list[Configuration]]:
    """The teacher's engine, and all that is timed."""
    teacher = open_bundle(bundle)
    kind, device = (teacher.manifest.backend, teacher.manifest.precision), teacher.manifest.machine.device
    student, found = copy.copy(teacher), list[Configuration]()
    student.spec = student_spec(teacher.spec)
    for batch in batches:
        found += [in_process("student", student, steps, batch, *kind) for steps in (1, 2, 3, 4)]
        found += [in_process("teacher", teacher, steps, batch, *kind) for steps in teacher_steps]
    eager = stock(base, device, kind[1], compiled=False)
    for batch in batches:
        found += [eager("student", steps, batch) for steps in (2, 4)]
    found.append(eager("teacher", teacher_steps[0], batches[0]))
    if compiles:
        compiled = stock(base, device, kind[1], compiled=True)
        made = [compiled("student", steps, batches[0]) for steps in (2, 4)]
        started = time.monotonic()
        try:
            made[0].once(0)
        except Exception as error:  # torch.compile raises many kinds
            report(f"without diffusers, compiled: {first_line(error)}")
        else:
            report(f"diffusers compiled its denoiser in {time.monotonic() - started:.0f} s")
            found += made
    return teacher, found


def run(
    name: str,
    base: Path,
    folder: Path,
    *,
    backend: str,
    precision: str,
    batches: Sequence[int],
    repeats: int,
    teacher_steps: Sequence[int] = (50,),
    compiles: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Build the base's bundle in `folder`, measure, and return {"environment": ..., "rows": [...], "build": ...}."""
    bundle = folder / "bundle"
    evaluations = sorted({*batches, *(2 * batch for batch in batches)})
    options = {"--out": bundle, "--backend": backend, "--precision": precision, "--batch": ",".join(map(str, evaluations))}
    arguments = ["build-engine", str(base), *(str(word) for pair in options.items() for word in pair)]
    if "flux" not in name:
        arguments += ["--guidance", str(_GUIDANCE)]
    peak, seconds, told = run_measured(folder, *arguments)
    report(f"built in {seconds:.0f} s")
    teacher, timed = configurations(bundle, base, batches, teacher_steps, compiles, report)
    samples = measure(timed, repeats, report)
    rows = [
        timed_row(c.backend, c.precision, c.model, c.batch, c.steps, c.nfe, stage, samples[c, stage])
        for c in timed
        for stage in STAGES
        if (c, stage) in samples
    ]
    report(summary(rows))
    manifest = teacher.manifest
    return {
        "environment": environment({"teacher": manifest}),
        "model": f"{name}, random weights, {manifest.sizes[0]}",
        "build": {
            "peak_gib": round(peak, 2),
            "command_s": round(seconds),
            "stages_s": laps(told),
            "max_error": manifest.max_error,
        },
        "costs_ms": [cost.model_dump(mode="json") for cost in manifest.step_costs],
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NETWORKS)
    parser.add_argument("--backend", default="torch", help="default: %(default)s")
    parser.add_argument("--precision", default="bf16", help="default: %(default)s")
    parser.add_argument("--batch", default="1", metavar="N[,N...]", help="images at once; default: %(default)s")
    parser.add_argument("--teacher-steps", default="50", metavar="N[,N...]", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled diffusers out: it takes a minute or more")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where base, bundle and a student's bundle for load.py stay")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    options = parser.parse_args(arguments)

    try:
        with tempfile.TemporaryDirectory() as place:
            folder = options.keep or Path(place)
            base = folder / options.model
            if not base.exists():
                make_base(options.model, base, whole=True)
            found = run(
                options.model,
                base,
                folder,
                backend=options.backend,
                precision=options.precision,
                batches=parse_batches(options.batch),
                repeats=options.repeats,
                teacher_steps=parse_numbers("--teacher-steps", options.teacher_steps),
                compiles=not options.no_compile,
                report=lambda line: print(line, flush=True),
            )
            if options.keep:
                write_student(folder / "bundle", folder / "student")
        write_whole(options.json, json.dumps(found) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"real_latency.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
