"""What `flashdiff build-engine` takes at real size: seconds and peak memory, random weights of the public configurations.

    python benchmarks/sizes.py sd15 --json sizes.json

sd15 is Stable Diffusion 1.5, whole, for OpenVINO at 512x512. Of sdxl, pixart (PixArt-XL-2) and sd3 (SD3-medium) only the
network is of real size; they are exported in float16 and checked on ONNX Runtime, on small images, since a step of the real
size takes many seconds on a CPU. Nothing is downloaded: up to 6 GB of weights, and graphs of twice that, lie in a temporary
folder meanwhile. The build is a process of its own, batch 1, and its peak is the kernel's own count; what pages of mapped
files are in memory counts too.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.real_size import NETWORKS, make_base, run_measured, tell
from benchmarks.rows import environment, result_file
from flashdiff.engines.bundle import read_manifest

_BUILDS = {
    "sd15": ("openvino", "fp32", "512x512"),
    "sdxl": ("onnxruntime", "fp16", "64x64"),
    "pixart": ("onnxruntime", "fp16", "64x64"),
    "sd3": ("onnxruntime", "fp16", "64x64"),
}
_LAP = re.compile(r"(\w+) +([\d.]+) s  (\w+)")


def run(name: str) -> dict[str, Any]:
    """{"environment": ..., "rows": [one row]}; FlashdiffError when the build fails."""
    backend, precision, size = _BUILDS[name]
    with tempfile.TemporaryDirectory() as place:
        folder, bundle = Path(place), Path(place) / "bundle"
        counts = make_base(name, folder / name)
        options = {"--out": bundle, "--backend": backend, "--precision": precision, "--size": size, "--batch": 1, "--guidance": 1}
        arguments = ["build-engine", str(folder / name), *(str(word) for pair in options.items() for word in pair)]
        peak, seconds, told = run_measured(folder, *arguments)
        manifest = read_manifest(bundle)
        row = {
            "model": f"{name}, random weights",
            "backend": backend,
            "precision": precision,
            "size": size,
            "batch": 1,
            "stage": "flashdiff build-engine",
            "parameters": counts,
            "peak_gib": round(peak, 2),
            "command_s": round(seconds),
            "stages_s": laps(told),
            "bundle_gb": round(sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 1e9, 2),
            "max_error": manifest.max_error,
            "costs_ms": {cost.part: cost.ms for cost in manifest.step_costs},
        }
    return {"environment": environment({}), "rows": [row]}


def laps(told: str) -> dict[str, float]:
    """Seconds by stage from what a build says; exporting and compiling by part."""
    found = [match.groups() for line in told.splitlines() if (match := _LAP.match(line))]
    return {f"{stage} {what}" if stage in ("export", "compile") else stage: float(taken) for stage, taken, what in found}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NETWORKS)
    parser.add_argument("--json", type=result_file, required=True, help="where the row goes")
    options = parser.parse_args(arguments)
    return tell(lambda: run(options.model), options.json)


if __name__ == "__main__":
    sys.exit(main())
