"""SD1.5 at real size on a CPU, random weights: flashdiff's OpenVINO engine, OpenVINO GenAI and stock diffusers in turns.

    python benchmarks/peers/real_cpu.py --genai PYTHON --precision fp32 --json real-cpu.json      # or make bench-real-cpu

PYTHON belongs to an environment with openvino-genai and optimum-intel (`make bench-real-cpu` makes it). optimum-intel exports the
model of GenAI's pipeline from the same diffusers directory. All make images of 512x512 without guidance, alone, in one and in
four steps, from prompt to PNG bytes; each has all cores of this process. Every round runs each configuration in turn.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.command import check_repeats, command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from benchmarks.peers.processes import package_versions
from benchmarks.real_size.base import make_base
from benchmarks.real_size.stock_pipelines import pipeline_configuration
from benchmarks.timing.configurations import (
    PROMPT,
    Configuration,
    StageTimes,
    in_process,
    stage_measurements,
    time_configurations,
)
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import BackendError

SIDE = 512
STEPS = (1, 4)
_PACKAGES = ("openvino-genai", "openvino", "optimum-intel", "torch", "diffusers")
_APP = Path(__file__).with_name("genai_app.py")


def run(python: Path, *, precision: str, repeats: int, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """{"environment": ..., "rows": [...]}; models and engines are kept in `folder`, and made when they are missing."""
    versions = package_versions(python, _PACKAGES)  # so that a missing one is reported now, not after minutes of building
    base, bundle, exported = folder / "sd15", folder / f"bundle-{precision}", folder / "genai"
    if not base.exists():
        make_base("sd15", base)
    if not bundle.exists():
        report("building the bundle")
        options = ["--size", f"{SIDE}x{SIDE}", "--batch", "1", "--guidance", "1", "--precision", precision, "--out", str(bundle)]
        _do(sys.executable, "-m", "flashdiff", "build-engine", str(base), *options)
    if not exported.exists():
        report("exporting for GenAI")
        command = "from optimum.commands.optimum_cli import main; main()"
        options = [
            "export",
            "openvino",
            "--model",
            str(base),
            "--task",
            "text-to-image",
            "--weight-format",
            "fp32",
            str(exported),
        ]
        _do(str(python), "-c", command, *options)

    environment = read_environment({"student": read_manifest(bundle)}) | {"genai": versions}
    engine, pipeline = open_bundle(bundle), _stock_pipeline(base, precision)
    with _genai(python, exported, precision) as generate:
        configurations = list[Configuration]()
        for steps in STEPS:
            configurations += [
                in_process("flashdiff", engine, steps, 1, "openvino", precision),
                Configuration("GenAI", "openvino", precision, steps, 1, steps, lambda seed, steps=steps: generate(seed, steps)),  # type: ignore[misc]
                pipeline_configuration(pipeline, "diffusers", precision, steps, 1, guided=False),  # type: ignore[arg-type]
            ]
        measurements = stage_measurements(configurations, time_configurations(configurations, repeats, report))
    report(table(measurements))
    return {"environment": environment, "rows": measurements}


def table(measurements: Sequence[Measurement]) -> str:
    """A line per pipeline and number of steps: medians, and how many times as long as flashdiff it takes."""
    medians = {(one["model"], one["steps"], one["stage"]): one["median_ms"] for one in measurements}
    lines = []
    for model, steps, stage in medians:
        if stage == "total":
            step, total = medians.get((model, steps, "denoise_step")), medians[model, steps, stage]
            ratio = total / medians["flashdiff", steps, stage]
            lines.append([model, steps, f"{step:.0f}" if step else "", f"{total:.0f}", f"{ratio:.2f}x"])
    return markdown_table(("pipeline", "steps", "one step, ms", "image, ms", "relative to flashdiff"), lines)


def _do(*command: str) -> None:
    """Run a command, its output to stderr; BackendError when it fails."""
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise BackendError(f"{' '.join(command[:4])} ... failed; its output is above")


def _stock_pipeline(base: Path, precision: str) -> Any:
    from diffusers import StableDiffusionPipeline

    from flashdiff.engines.parts import DTYPES

    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=DTYPES[precision], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _genai(python: Path, model: Path, precision: str) -> Iterator[Callable[[int, int], StageTimes]]:
    """GenAI's pipeline in a process of its own; makes an image from a seed and a number of steps, and gives its time."""
    command = [str(python), str(_APP), str(model), "--precision", precision, "--side", str(SIDE), "--prompt", PROMPT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin
        assert stdout

        def generate(seed: int, steps: int) -> StageTimes:
            with suppress(BrokenPipeError):
                print(json.dumps({"seed": seed, "steps": steps}), file=stdin, flush=True)
            if not (line := stdout.readline()):
                raise BackendError("GenAI's process ended; its output is above")
            return {"total": [json.loads(line)["ms"]]}

        try:
            yield generate
        finally:
            process.terminate()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--genai", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the model and the engines for another run, 13 GB")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, measurements and every sample")
    options = parser.parse_args(arguments)

    def work() -> None:
        check_repeats(options.repeats)
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            found = run(options.genai, precision=options.precision, repeats=options.repeats, folder=folder, report=show)
        write_results(options.json, found)

    return run_command("real_cpu", work)


if __name__ == "__main__":
    sys.exit(main())
