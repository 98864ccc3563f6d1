"""The cost of `flashdiff build-engine` at real size: seconds and peak memory, with random weights.

    python benchmarks/sizes.py sd15 --json sizes.json

sd15 is all of Stable Diffusion 1.5, for OpenVINO at 512x512. Of sdxl, pixart (PixArt-XL-2) and sd3 (SD3-medium) only the network
is of real size; they are exported in float16 and checked on ONNX Runtime with small images, since a step at full image size takes
many seconds on a CPU. Nothing is downloaded; the temporary folder needs up to 6 GB for weights and twice that for graphs. The
build runs in a process of its own, at batch 1. Its peak is the kernel's count, and includes the resident pages of mapped files.
"""

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import command_parser, result_file, run_command, write_and_print_results
from benchmarks.environment import read_environment
from benchmarks.measurements import Measurement
from benchmarks.real_size.base import make_base
from benchmarks.real_size.measured_command import run_measured
from flashdiff.engines.bundle import read_manifest

_BUILDS = {
    "sd15": ("openvino", "fp32", "512x512"),
    "sdxl": ("onnxruntime", "fp16", "64x64"),
    "pixart": ("onnxruntime", "fp16", "64x64"),
    "sd3": ("onnxruntime", "fp16", "64x64"),
}
_STAGE_LINE = re.compile(r"(\w+) +([\d.]+) s  (\w+)")


def run(name: str) -> dict[str, Any]:
    """{"environment": ..., "rows": [one measurement]}; FlashdiffError if the build fails."""
    backend, precision, size = _BUILDS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = folder / "bundle"
        counts = make_base(name, folder / name)
        options = {"--out": bundle, "--backend": backend, "--precision": precision, "--size": size, "--batch": 1, "--guidance": 1}
        arguments = ["build-engine", str(folder / name), *(str(word) for pair in options.items() for word in pair)]
        peak, seconds, output = run_measured(folder, *arguments)
        manifest = read_manifest(bundle)
        measurement: Measurement = {
            "model": f"{name}, random weights",
            "backend": backend,
            "precision": precision,
            "size": size,
            "batch": 1,
            "stage": "flashdiff build-engine",
            "parameters": counts,
            "peak_gib": round(peak, 2),
            "command_s": round(seconds),
            "stages_s": stage_seconds(output),
            "bundle_gb": round(sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 1e9, 2),
            "max_error": manifest.max_error,
            "costs_ms": {cost.part: cost.ms for cost in manifest.step_costs},
        }
    return {"environment": read_environment({}), "rows": [measurement]}


def stage_seconds(output: str) -> dict[str, float]:
    """Seconds by stage, and for export and compile by part, from the output of a build."""
    found = [match.groups() for line in output.splitlines() if (match := _STAGE_LINE.match(line))]
    return {f"{stage} {part}" if stage in ("export", "compile") else stage: float(seconds) for stage, seconds, part in found}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("model", choices=_BUILDS)
    parser.add_argument("--json", type=result_file, required=True, help="where the measurement goes")
    options = parser.parse_args(arguments)
    return run_command("sizes", lambda: write_and_print_results(options.json, run(options.model)))


if __name__ == "__main__":
    sys.exit(main())
