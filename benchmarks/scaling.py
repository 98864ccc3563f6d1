"""How the cost of a step grows with parameters, image size and batch, and how well a linear fit predicts it.

    python benchmarks/scaling.py --json scaling.json      # about three minutes on two cores; --quick only exercises the code

The networks are of the embedded model's kind, with other widths and random weights. Like bundles, they go through the exporter
and the OpenVINO backend. Every round runs each network at each size and batch in turn, so that all meet the same noise of the
machine.

The server's admission fits nothing: it has a table of measured costs by batch size, and uses the smallest batch size that holds
the rows. The linear fit, a + b * batch per network and size, describes such a table: `a` is what batching saves.
"""

import argparse
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.command import check_repeats, command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement, stage_measurement
from flashdiff.components import Size
from flashdiff.engines.backends import find_backend
from flashdiff.engines.bundle import Manifest, PartFile, PartRecord
from flashdiff.engines.runtime.device import DEFAULT_DEVICE
from flashdiff.engines.shapes import bucket_shapes, dimensions_of

BACKEND = "openvino"
_WIDTHS = (32, 64, 128, 256)  # of the first level: 1, 4, 16 and 64 million parameters; 64 is the embedded model's
_SIZES = (Size(64, 64), Size(128, 128))
_BATCHES = (1, 2, 4, 8)
_WARM_UP_ROUNDS = 1

Step = Callable[[], object]


def networks(widths: Sequence[int], sizes: Sequence[Size], batches: Sequence[int]) -> Iterator[tuple[int, Size, int, Step]]:
    """(parameters, size, batch, one denoise step of that bucket) of a random network of every width."""
    from diffusers import UNet2DConditionModel

    from flashdiff.engines.parts import parts_of
    from flashdiff.families import find_base, load_base

    backend = find_backend(BACKEND)
    form = backend.graph
    assert form
    backend.import_modules()
    for width in widths:
        with tempfile.TemporaryDirectory() as name:
            base = Path(shutil.copytree(find_base("avatars"), Path(name, "base")))
            config = UNet2DConditionModel.load_config(base / "unet")
            network: Any = UNet2DConditionModel.from_config({**config, "block_out_channels": [width, 2 * width]})
            network.save_pretrained(base / "unet")
            family, model = load_base(str(base))
            part = next(part for part in parts_of(family, model) if part.name == "denoiser")
            form.export(model, part, Path(name), size=sizes[0])
            spec = PartRecord(files=(PartFile(file=form.file),), inputs=part.inputs, outputs=part.outputs)
            # The manifest is never written, so it has only the fields that the backend reads.
            fields: dict[str, Any] = {"precision": "fp32", "parts": {part.name: spec}}
            compile_part = backend.open_parts(Path(name), Manifest.model_construct(**fields), DEFAULT_DEVICE)
            for size, batch in product(sizes, batches):
                dimensions = dimensions_of(model.spec, size, batch)
                compiled = compile_part(part.name, Path(name, form.file), dimensions)
                rng, shapes = np.random.default_rng(0), bucket_shapes(part.inputs, dimensions)
                inputs = {t.name: rng.standard_normal(shapes[t.name]).astype(t.dtype) for t in part.inputs}
                inputs["times"] = np.full(batch, 500)
                yield network.num_parameters(), size, batch, lambda run=compiled, given=inputs: run(given)  # type: ignore[misc]


def run(
    widths: Sequence[int], sizes: Sequence[Size], batches: Sequence[int], repeats: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """{"environment": ..., "rows": [...]}: measurements as latency.py's, with `parameters` and `size`."""
    steps: dict[tuple[int, Size, int], Step] = {}
    for parameters, size, batch, step in networks(widths, sizes, batches):
        steps[parameters, size, batch] = step
        if (size, batch) == (sizes[-1], batches[-1]):
            report(f"compiled {_millions(parameters)}")
    environment = read_environment({})
    samples: dict[tuple[int, Size, int], list[float]] = defaultdict(list)
    for index in range(-_WARM_UP_ROUNDS, repeats):
        for key, step in steps.items():
            started = time.perf_counter()
            step()
            if index >= 0:
                samples[key].append(1000 * (time.perf_counter() - started))
        report(f"round {index + 1} of {repeats}")
    measurements = [
        stage_measurement(
            samples[parameters, size, batch],
            model=f"unet {_millions(parameters)}",
            backend=BACKEND,
            precision="fp32",
            batch=batch,
            steps=1,
            nfe=1,
            stage="denoise_step",
        )
        | {"parameters": parameters, "size": list(size)}
        for parameters, size, batch in steps
    ]
    return {"environment": environment, "rows": measurements}


def fit_line(batches: Sequence[int], costs_ms: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, largest relative error) of ms = a + b * batch, fitted to relative errors, so that small batches count as much."""
    known = np.array(costs_ms)
    terms = np.stack([np.ones(len(batches)), np.array(batches, dtype=float)], axis=1)
    (a, b), *_ = np.linalg.lstsq(terms / known[:, None], np.ones(len(batches)), rcond=None)
    return float(a), float(b), float(np.abs((a + b * np.array(batches)) / known - 1).max())


def table_error(samples_ms: Sequence[float]) -> float:
    """The relative error of a measured cost as a prediction: the median of every other sample against that of the rest."""
    return abs(statistics.median(samples_ms[::2]) / statistics.median(samples_ms[1::2] or samples_ms) - 1)


def fit_all(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """For every network and size: the linear fit over batches, and the largest errors of the fit and of the table."""
    cells: dict[tuple[int, tuple[int, int]], list[Measurement]] = defaultdict(list)
    for one in measurements:
        cells[one["parameters"], tuple(one["size"])].append(one)
    fits = []
    for (parameters, size), cell in cells.items():
        a, b, error = fit_line([one["batch"] for one in cell], [one["median_ms"] for one in cell])
        worst = max(table_error(one["samples_ms"]) for one in cell)
        fits.append({"parameters": parameters, "size": size, "a_ms": a, "b_ms": b, "error": error, "table_error": worst})
    return fits


def exponent(measurements: Sequence[Measurement], size: Sequence[int], batch: int) -> float | None:
    """The power of the number of parameters with which a step's cost grows; None for a single network."""
    known = [
        (one["parameters"], one["median_ms"]) for one in measurements if (list(one["size"]), one["batch"]) == (list(size), batch)
    ]
    if len(known) < 2:
        return None
    return float(np.polyfit([math.log(parameters) for parameters, _ in known], [math.log(ms) for _, ms in known], 1)[0])


def scaling_table(measurements: Sequence[Measurement]) -> str:
    """The growth with parameters, and a line per network and size: milliseconds by batch, the linear fit, and both errors."""
    batches = sorted({one["batch"] for one in measurements})
    growth = []
    for size, batch in product(sorted({tuple(one["size"]) for one in measurements}), (batches[0], batches[-1])):
        power = exponent(measurements, size, batch)
        if power is not None:
            growth.append(f"- at {Size(*size)}, batch {batch}, a step's cost grows as parameters to the power of {power:.2f}")
    lines = []
    for fit in fit_all(measurements):
        key = (fit["parameters"], fit["size"])
        medians = {one["batch"]: one["median_ms"] for one in measurements if (one["parameters"], tuple(one["size"])) == key}
        lines.append(
            [
                _millions(fit["parameters"]),
                Size(*fit["size"]),
                *(f"{medians[batch]:.2f}" for batch in batches),
                f"{fit['a_ms']:.2f} + {fit['b_ms']:.2f} * batch",
                f"{fit['error']:.0%}",
                f"{fit['table_error']:.0%}",
            ]
        )
    titles = ("parameters", "size", *(f"batch {batch}, ms" for batch in batches))
    table = markdown_table((*titles, "a + b * batch", "the line is off by", "the table by"), lines)
    return "\n".join([*growth, "", table])


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M"


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=6, help="rounds that count; default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="one small network and round: exercises the code, the numbers mean nothing"
    )
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, measurements and every sample")
    options = parser.parse_args()
    return run_command("scaling.py", lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    check_repeats(options.repeats)
    widths, sizes, batches = (_WIDTHS[:1], _SIZES[:1], _BATCHES[:2]) if options.quick else (_WIDTHS, _SIZES, _BATCHES)
    results = run(widths, sizes, batches, 1 if options.quick else options.repeats, show)
    print(scaling_table(results["rows"]))
    write_results(options.json, results)


if __name__ == "__main__":
    sys.exit(main())
