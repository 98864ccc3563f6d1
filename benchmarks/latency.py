"""Latency by stage: the student at a few steps against the guided teacher at 50, on the same engine, interleaved in one run.

    python benchmarks/latency.py --base avatars --lora avatars-flash --json latency.json    # on every backend that runs here
    python benchmarks/latency.py --student STUDENT_BUNDLE --teacher TEACHER_BUNDLE          # with bundles that you built
    ... --base avatars --lora avatars-flash                                                 # and with stock diffusers too

    ... --matrix --base avatars --lora avatars-flash --json matrix.json    # every backend and precision, at batch 1 and 8

`--base` with `--lora` adds the alternative to flashdiff: stock diffusers, eager and, with a C++ compiler, compiled. The base must
be of Stable Diffusion 1's kind. (docs/engines.md says why optimum-intel is left out.) Several bundles after --student and
--teacher are pairs in order, one per backend.

`--matrix` makes one table of the student in four steps: every backend and precision that runs here, or the bundles after
--student, with the time of a step and of an image, the ratio to stock diffusers, and the quality that the build measured.

Every repeat runs each configuration in turn, so that all meet the same noise of the machine. Times are from prompt to PNG bytes;
`served` is the student behind a server in a process of its own, as its client sees it. Finally each model makes one batch in a
process of its own, for its peak memory.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import check_repeats, command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.timing.bundle_pairs import Pair, build_pairs, open_pairs
from benchmarks.timing.configurations import (
    Configuration,
    behind_server,
    in_process,
    stage_measurements,
    time_configurations,
)
from benchmarks.timing.matrix import build_matrix, matrix_table, run_matrix
from benchmarks.timing.peak_memory import measure_peak_memory
from benchmarks.timing.speedup import summary
from benchmarks.timing.stock_diffusers import StockModel, check_stock_base, open_stock_variants
from benchmarks.traffic.server_process import start_server
from flashdiff.config import parse_numbers
from flashdiff.errors import ConfigError
from flashdiff.server.client import Client


def run(
    pairs: Sequence[Pair],
    *,
    batches: Sequence[int],
    repeats: int,
    report: Callable[[str], None],
    steps: Sequence[int] = (1, 2, 4),
    teacher_steps: Sequence[int] = (50,),
    with_server: bool = False,
    stock: StockModel | None = None,
    with_compiled: bool = True,
) -> dict[str, Any]:
    """Time the pairs, one per backend; {"environment": ..., "rows": [...]}.

    `with_server` times the first student behind a server too, and `stock` is timed in stock diffusers.
    """
    opened = open_pairs(pairs, max(batches))
    kinds = [(student.manifest.backend, student.manifest.precision) for student, _ in opened]
    first = opened[0][0].manifest
    steps = [count for count in steps if count <= first.model.sampler.max_steps]
    with ExitStack() as stack:
        client = None
        if with_server:
            client = stack.enter_context(Client(stack.enter_context(start_server(pairs[0][0])).address))
        variants = []
        if stock:
            variants = open_stock_variants(
                stock, device=first.machine.device, with_compiled=with_compiled and repeats > 1, steps=steps[0], report=report
            )
        configurations = list[Configuration]()
        for batch in batches:
            for (student, teacher), kind in zip(opened, kinds, strict=True):
                configurations += [in_process("student", student, count, batch, *kind) for count in steps]
                if kind == kinds[0]:
                    configurations += [behind_server(client, count, batch, *kind) for count in steps if client]
                    configurations += [new_configuration(count, batch) for new_configuration in variants for count in steps]
                configurations += [in_process("teacher", teacher, count, batch, *kind) for count in teacher_steps]
        environment = read_environment(
            {
                name if kind == kinds[0] else f"{name}, {' '.join(kind)}": engine.manifest
                for pair, kind in zip(opened, kinds, strict=True)
                for name, engine in zip(("student", "teacher"), pair, strict=True)
            }
        )
        samples = time_configurations(configurations, repeats, report)
    return {"environment": environment, "rows": stage_measurements(configurations, samples)}


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--student",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="default: built from --base and --lora for every backend",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="of the same base and backend, without the flash LoRA",
    )
    parser.add_argument("--steps", default="1,2,3,4", metavar="N[,N...]", help="of the student; default: %(default)s")
    parser.add_argument("--teacher-steps", default="50,25", metavar="N[,N...]", help="default: %(default)s")
    parser.add_argument("--batch", metavar="N[,N...]", help="images at once; default: 1, and 1,8 with --matrix")
    parser.add_argument("--base", metavar="BASE", help="with --lora: time stock diffusers too")
    parser.add_argument("--lora", type=Path, metavar="FOLDER")
    parser.add_argument("--matrix", action="store_true", help="one table of every backend and precision, without teachers")
    parser.add_argument(
        "--calibration-prompts", type=Path, metavar="FILE", help="with --matrix, of a base that is not the embedded model"
    )
    parser.add_argument(
        "--no-compiled", action="store_true", help="neither stock diffusers nor torch bundles compiled, which takes minutes"
    )
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="one repeat of few steps: exercises the code, the numbers mean nothing"
    )
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, measurements and every sample")
    options = parser.parse_args()
    return run_command("latency.py", lambda: (_measure_matrix if options.matrix else _measure)(options))


def _measure_matrix(options: argparse.Namespace) -> None:
    """The same for `--matrix`."""
    from flashdiff.engines.config import parse_batches

    check_repeats(options.repeats)
    if options.teacher:
        raise ConfigError("--matrix is of students: give no --teacher")
    if (options.base is None) != (options.lora is None):
        raise ConfigError("--base and --lora go together")
    if not options.student and not options.base:
        raise ConfigError("--matrix: give --student, or --base and --lora")
    if options.base:
        check_stock_base(options.base)
    batches, repeats = parse_batches(options.batch or "1,8"), 1 if options.quick else options.repeats
    with_compiled = repeats > 1 and not options.no_compiled
    with tempfile.TemporaryDirectory() as folder:
        bundles = options.student or build_matrix(
            options.base,
            options.lora,
            batches,
            options.calibration_prompts,
            Path(folder),
            with_compiled=with_compiled,
            report=show,
        )
        results = run_matrix(
            bundles,
            batches=batches,
            repeats=repeats,
            with_compiled=with_compiled,
            report=show,
            stock=StockModel(options.base, options.lora) if options.base else None,
        )
    print(matrix_table(results))
    write_results(options.json, results)


def _measure(options: argparse.Namespace) -> None:
    """Check the options, build what they name no bundles for, measure, print and write."""
    from flashdiff.engines.config import BuildOptions, parse_batches

    check_repeats(options.repeats)
    if options.calibration_prompts:
        raise ConfigError(f"--calibration-prompts {options.calibration_prompts}: it is for --matrix")
    if (options.base is None) != (options.lora is None):
        raise ConfigError("--base and --lora go together")
    if len(options.student) != len(options.teacher):
        raise ConfigError("--student and --teacher take the same number of bundles, pairs in order")
    if not options.student and not options.base:
        raise ConfigError("give --student and --teacher, or --base and --lora")
    if options.base:
        check_stock_base(options.base)
    batches = parse_batches(options.batch or "1")
    # The default batch sizes of `build-engine`, so that the measurements can be compared with those of other benchmarks.
    more_batches = () if options.quick else BuildOptions.model_fields["batch_sizes"].default
    with tempfile.TemporaryDirectory() as folder:
        pairs = [*zip(options.student, options.teacher, strict=True)]
        pairs = pairs or build_pairs(options.base, options.lora, batches, more_batches, Path(folder), print)
        stock = StockModel(options.base, options.lora) if options.base else None
        results = run(
            pairs,
            batches=batches,
            repeats=1 if options.quick else options.repeats,
            report=print,
            steps=[1] if options.quick else parse_numbers("--steps", options.steps),
            teacher_steps=[2] if options.quick else parse_numbers("--teacher-steps", options.teacher_steps),
            with_server=True,
            stock=stock,
            with_compiled=not options.no_compiled,
        )
        print(summary(results["rows"]))
        results["memory"] = measure_peak_memory(pairs, max(batches), print, stock)
    write_results(options.json, results)


if __name__ == "__main__":
    sys.exit(main())
