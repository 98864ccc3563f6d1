"""Latency at real size, by stage: few steps against 50 guided ones, and against stock diffusers; random weights.

    python benchmarks/real_latency.py sdxl --precision bf16 --batch 1,4 --json latency.json

Networks, autoencoders and CLIP encoders have the shapes of the public configurations; a small T5 takes the place of the real one,
so the text stage of a model that has one is too fast. Weights are made on the device and run by the torch backend, as those of a
bundle would be (on a GPU: CUDA graphs); no bundle is written. The student is the teacher's engine with a flash sampler instead of
the guided ODE: the time of a step does not depend on the values of weights. Diffusers runs networks of the same shapes and
precision, eager and compiled (its denoiser, at the first batch size). Every repeat runs each configuration in turn, from prompt
to PNG bytes.

Finally the server's worker makes images of 2 and 4 steps from a queue that is never empty, with finished rows decoded in parallel
with the steps of others, as it does where the engine gains from it, and in turn with them.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import check_repeats, command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.real_size.base import write_base
from benchmarks.real_size.random_engine import open_random_teacher, student_spec
from benchmarks.real_size.stock_pipelines import compiled_configurations, open_pipeline, pipeline_configuration
from benchmarks.timing.configurations import Configuration, in_process, stage_measurements, time_configurations
from benchmarks.timing.speedup import summary
from benchmarks.traffic.worker_rate import measure_worker_rate
from flashdiff.config import parse_numbers
from flashdiff.engines.bundle import Precision
from flashdiff.engines.config import parse_batches

_MODELS = ("sd15", "sdxl", "pixart", "sd3")
_WORKER_S = 10.0


def run(
    name: str,
    base: Path,
    *,
    precision: Precision,
    batches: Sequence[int],
    repeats: int,
    teacher_steps: Sequence[int] = (50,),
    with_compiled: bool = True,
    worker_s: float = _WORKER_S,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure a base that `write_base` made without weights; {"environment": ..., "rows": [...], "worker": [...]}."""
    teacher = open_random_teacher(base, precision, sorted({*batches, *(2 * batch for batch in batches)}))
    student = copy.copy(teacher)
    student.spec = student_spec(teacher.spec)
    costs = student.measure_costs()
    report("engine ready")
    configurations = list[Configuration]()
    for batch in batches:
        configurations += [in_process("student", student, steps, batch, "torch", precision) for steps in (1, 2, 3, 4)]
        configurations += [in_process("teacher", teacher, steps, batch, "torch", precision) for steps in teacher_steps]
    device = teacher.manifest.machine.device
    eager = open_pipeline(base, device, precision)
    for batch in batches:
        configurations += [pipeline_configuration(eager, "diffusers", precision, n, batch, guided=False) for n in (2, 4)]
    configurations.append(
        pipeline_configuration(eager, "diffusers, guided", precision, teacher_steps[0], batches[0], guided=True)
    )
    if with_compiled:
        configurations += compiled_configurations(base, device, precision, batches[0], report)
    environment = read_environment({}) | {"gpu": teacher.manifest.machine.processor if device == "cuda" else None}
    measurements = stage_measurements(configurations, time_configurations(configurations, repeats, report))
    report(summary(measurements))
    worker = [measure_worker_rate(student, costs, worker_s, parallel_decode=parallel) for parallel in (True, False) * 2]
    report("\n".join(f"worker, decoding {one['decoding']}: {one['images_per_s']} images/s" for one in worker))
    return {
        "environment": environment,
        "model": f"{name}, random weights, {teacher.spec.sizes[0]}",
        "rows": measurements,
        "costs_ms": [[part, batch, ms] for (part, _), by_batch in costs.items() for batch, ms in by_batch.items()],
        "worker": worker,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("model", choices=_MODELS)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16", help="default: %(default)s")
    parser.add_argument("--batch", default="1", metavar="N[,N...]", help="images at once; default: %(default)s")
    parser.add_argument("--teacher-steps", default="50", metavar="N[,N...]", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled diffusers, which takes a minute or more")
    parser.add_argument("--json", type=result_file, required=True, help="where the measurements go")
    options = parser.parse_args(arguments)
    return run_command("real_latency.py", lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    check_repeats(options.repeats)
    batches, teacher_steps = parse_batches(options.batch), parse_numbers("--teacher-steps", options.teacher_steps)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, options.model)
        write_base(options.model, base, is_whole=True, weights=False)
        results = run(
            options.model,
            base,
            precision=options.precision,
            batches=batches,
            repeats=options.repeats,
            teacher_steps=teacher_steps,
            with_compiled=not options.no_compile,
            report=show,
        )
    write_results(options.json, results)


if __name__ == "__main__":
    sys.exit(main())
