"""The denoiser of a public model at its real width, with random weights and few layers: exported to ONNX and compared with torch.

    python benchmarks/real_width.py --json real-width.json               # every model; about twenty minutes of one core
    python benchmarks/real_width.py sdxl z-image --json real-width.json  # only these

Channels, heads and widths are those of the published configuration; of every sort of block one or two are kept. The graph is
float32 with an open batch, and runs in ONNX Runtime for a batch of two images of 8x8 latent cells and prompts of two lengths.
Nothing is downloaded: random weights of up to 4 GB a model are written to a temporary folder. Each model has a process of its
own; its peak is the kernel's count, and includes the resident pages of mapped files.
"""

import argparse
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from benchmarks.new_process import call_in_new_process
from benchmarks.real_size.base import make_base
from benchmarks.real_size.measured_command import GIB
from benchmarks.real_size.networks import NETWORKS
from flashdiff.components import Size
from flashdiff.engines.backends import find_backend
from flashdiff.engines.bundle import Manifest, PartFile, PartRecord
from flashdiff.engines.runtime.device import DEFAULT_DEVICE
from flashdiff.engines.shapes import dimensions_of
from flashdiff.errors import BundleError

_BACKEND = "onnxruntime"
_BATCH = 2
_SIDE = 8  # latent cells


def measure(name: str) -> Measurement:
    """The row of one model; BundleError if its graph differs from torch by more than the first gate allows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(name, folder / name, is_cut=True)
        (folder / "graph").mkdir()
        found = call_in_new_process(compare_denoiser, folder / name, folder / "graph")
    network = NETWORKS[name]
    return {
        "model": f"{name}, random weights",
        "family": network.family,
        "backend": _BACKEND,
        "precision": "fp32",
        "batch": _BATCH,
        "stage": "export of the denoiser, and one step",
        "layers": network.layers,
        "parameters": network.parameters(is_cut=True),
        "parameters_of_all": network.parameters(),
        **found,
    }


def compare_denoiser(base: Path, folder: Path) -> dict[str, float]:
    """{"peak_gib", "cpu_s", "max_error"} of exporting a base's denoiser into `folder` and running the graph once.

    BundleError where the outputs differ by more than a build in float32 may.
    """
    import torch

    from flashdiff.engines.parts import parts_of, random_inputs, run_torch
    from flashdiff.engines.verify import difference
    from flashdiff.families import load_base

    backend = find_backend(_BACKEND)
    form = backend.graph
    assert form
    family, model = load_base(str(base))
    part = next(part for part in parts_of(family, model) if part.name == "denoiser")
    size = Size(_SIDE * model.spec.latent_factor, _SIDE * model.spec.latent_factor)
    tensors = random_inputs(model, part, _BATCH, size, torch.Generator().manual_seed(1))
    inputs = {tensor.name: values.numpy() for tensor, values in zip(part.inputs, tensors, strict=True)}
    expected = {name: values.numpy() for name, values in run_torch(part, tensors).items()}
    form.export(model, part, folder, size=size)
    record = PartRecord(files=(PartFile(file=form.file),), inputs=part.inputs, outputs=part.outputs)
    dimensions = dimensions_of(model.spec, size, _BATCH)
    del family, model, part, tensors  # the engine's weights take their place
    # The manifest is never written, so it has only the fields that the backend reads.
    fields: dict[str, Any] = {"precision": "fp32", "machine": backend.machine(), "parts": {"denoiser": record}}
    compile_part = backend.open_parts(folder, Manifest.model_construct(**fields), DEFAULT_DEVICE)
    outputs = compile_part("denoiser", folder / form.file, dimensions)(inputs)
    error = difference(outputs, expected)
    check_error(base.name, error)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"peak_gib": round(used.ru_maxrss * 1024 / GIB, 2), "cpu_s": round(used.ru_utime + used.ru_stime), "max_error": error}


def check_error(name: str, error: float) -> None:
    """BundleError for an error that a build in float32 may not have."""
    from flashdiff.engines.verify import PART_ERROR

    allowed = PART_ERROR["fp32"]
    if not error <= allowed:
        raise BundleError(f"{name}: the denoiser differs from torch by {error:.2e}, more than {allowed:.0e}")


def width_table(measurements: Sequence[Measurement]) -> str:
    """A line a model: what was kept of it, and what it took."""
    lines = [
        [
            f"`{one['model'].partition(',')[0]}`",
            one["layers"],
            f"{_millions(one['parameters'])} of {_millions(one['parameters_of_all'])}",
            f"{one['peak_gib']:.1f} GiB",
            f"{one['cpu_s']} s",
            f"{one['max_error']:.1e}",
        ]
        for one in measurements
    ]
    return markdown_table(("model", "layers of all", "parameters", "peak memory", "time of one core", "largest error"), lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M"


def run(names: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """{"environment": ..., "rows": [a measurement a model]}."""
    rows = []
    for name in names:
        rows.append(measure(name))
        report(f"{name}: {rows[-1]['peak_gib']} GiB, {rows[-1]['cpu_s']} s, error {rows[-1]['max_error']:.1e}")
    return {"environment": read_environment({}), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: all of {', '.join(NETWORKS)}")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment and measurements")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models if name not in NETWORKS]
    if unknown:
        parser.error(f"{unknown[0]}: no such model; there are {', '.join(NETWORKS)}")
    return run_command("real_width", lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    results = run(options.models or list(NETWORKS), show)
    print(width_table(results["rows"]))
    write_results(options.json, results, indent=2)


if __name__ == "__main__":
    sys.exit(main())
