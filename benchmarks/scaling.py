"""How the cost of a step grows with parameters, image size and batch, and how well a line foretells it.

    python benchmarks/scaling.py --json scaling.json      # about three minutes on two cores; --quick for the code paths alone

Networks of the embedded model's kind, of other widths and random weights, through the exporter and the OpenVINO backend that
bundles use. Every round runs each network at each size and batch once, in turn, so that a noisy machine is noisy for all of them.

The server's admission fits nothing: it has a table of measured costs, one per batch size, and takes the smallest batch size that
holds the rows. The line, a + b * batch for one network and size, is what such a table looks like: `a` is what a batch saves.
"""

import argparse
import json
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

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.rows import environment, result_file, timed_row
from flashdiff.components import Size
from flashdiff.engines.backends import find_backend
from flashdiff.engines.bundle import Manifest, PartFile, PartSpec
from flashdiff.engines.shapes import bucket_shapes, dimensions_of
from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.files import write_whole

_BACKEND = "openvino"
_WIDTHS = (32, 64, 128, 256)  # of the first level: 1, 4, 16 and 64 million parameters; 64 is the embedded model's
_SIZES = (Size(64, 64), Size(128, 128))
_BATCHES = (1, 2, 4, 8)
_WARM_UP_ROUNDS = 1

Step = Callable[[], object]


def networks(widths: Sequence[int], sizes: Sequence[Size], batches: Sequence[int]) -> Iterator[tuple[int, Size, int, Step]]:
    """(parameters, size, batch, one denoise step at that bucket) of a random network of every width."""
    from diffusers import UNet2DConditionModel

    from flashdiff.engines.parts import parts_of
    from flashdiff.families import find_base, load_base

    backend = find_backend(_BACKEND)
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
            spec = PartSpec(files=(PartFile(file=form.file),), inputs=part.inputs, outputs=part.outputs)
            # No bundle is published, so its manifest has only what the backend reads.
            read: dict[str, Any] = {"precision": "fp32", "parts": {part.name: spec}}
            compile_part = backend.open_parts(Path(name), Manifest.model_construct(**read))
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
    """{"environment": ..., "rows": [...]}: rows as in latency.py, with `parameters` and `size`."""
    steps: dict[tuple[int, Size, int], Step] = {}
    for parameters, size, batch, step in networks(widths, sizes, batches):
        steps[parameters, size, batch] = step
        if (size, batch) == (sizes[-1], batches[-1]):
            report(f"compiled {_millions(parameters)}")
    record = environment({})
    samples: dict[tuple[int, Size, int], list[float]] = defaultdict(list)
    for index in range(-_WARM_UP_ROUNDS, repeats):
        for key, step in steps.items():
            started = time.perf_counter()
            step()
            if index >= 0:
                samples[key].append(1000 * (time.perf_counter() - started))
        report(f"round {index + 1} of {repeats}")
    rows = [
        timed_row(
            _BACKEND, "fp32", f"unet {_millions(parameters)}", batch, 1, 1, "denoise_step", samples[parameters, size, batch]
        )
        | {"parameters": parameters, "size": list(size)}
        for parameters, size, batch in steps
    ]
    return {"environment": record, "rows": rows}


def line(batches: Sequence[int], costs_ms: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, largest relative error) of ms = a + b * batch, fitted to relative errors so that small batches count as much."""
    known = np.array(costs_ms)
    terms = np.stack([np.ones(len(batches)), np.array(batches, dtype=float)], axis=1)
    (a, b), *_ = np.linalg.lstsq(terms / known[:, None], np.ones(len(batches)), rcond=None)
    return float(a), float(b), float(np.abs((a + b * np.array(batches)) / known - 1).max())


def table_error(samples_ms: Sequence[float]) -> float:
    """How far off a measured cost is as a forecast: the median of every other sample against that of the rest."""
    return abs(statistics.median(samples_ms[::2]) / statistics.median(samples_ms[1::2] or samples_ms) - 1)


def fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every network and size: the line over batches, its error and the table's, each the worst of its batches."""
    cells: dict[tuple[int, tuple[int, int]], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["parameters"], tuple(row["size"])].append(row)
    found = []
    for (parameters, size), cell in cells.items():
        a, b, error = line([row["batch"] for row in cell], [row["median_ms"] for row in cell])
        table = max(table_error(row["samples_ms"]) for row in cell)
        found.append({"parameters": parameters, "size": size, "a_ms": a, "b_ms": b, "error": error, "table_error": table})
    return found


def exponent(rows: Sequence[dict[str, Any]], size: Sequence[int], batch: int) -> float | None:
    """The power of the number of parameters with which a step's cost grows; None of one network."""
    known = [(r["parameters"], r["median_ms"]) for r in rows if (list(r["size"]), r["batch"]) == (list(size), batch)]
    if len(known) < 2:
        return None
    return float(np.polyfit([math.log(parameters) for parameters, _ in known], [math.log(ms) for _, ms in known], 1)[0])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """What the rows say, and a line per network and size: measured milliseconds by batch, the fit, and both errors."""
    batches = sorted({row["batch"] for row in rows})
    lines = []
    for size, batch in product(sorted({tuple(row["size"]) for row in rows}), (batches[0], batches[-1])):
        power = exponent(rows, size, batch)
        if power is not None:
            lines.append(f"- at {Size(*size)}, batch {batch}, a step's cost grows as parameters to the power of {power:.2f}")
    titles = ("parameters", "size", *(f"batch {batch}, ms" for batch in batches))
    lines += [
        "",
        f"| {' | '.join(titles)} | a + b * batch | the line is off by | the table by |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for fit in fits(rows):
        of = {r["batch"]: r["median_ms"] for r in rows if (r["parameters"], tuple(r["size"])) == (fit["parameters"], fit["size"])}
        cells = (_millions(fit["parameters"]), str(Size(*fit["size"])), *(f"{of[batch]:.2f}" for batch in batches))
        model = f"{fit['a_ms']:.2f} + {fit['b_ms']:.2f} * batch"
        lines.append(f"| {' | '.join(cells)} | {model} | {fit['error']:.0%} | {fit['table_error']:.0%} |")
    return "\n".join(lines)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6, help="rounds that count; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one small network and round: does it run, not what it measures")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, rows and every sample")
    options = parser.parse_args()
    try:
        if options.repeats < 1:
            raise ConfigError(f"--repeats {options.repeats}: give a number from 1 on")
        widths, sizes, batches = (_WIDTHS[:1], _SIZES[:1], _BATCHES[:2]) if options.quick else (_WIDTHS, _SIZES, _BATCHES)
        repeats = 1 if options.quick else options.repeats
        report = run(widths, sizes, batches, repeats, lambda line: print(line, flush=True))
        print(markdown(report["rows"]))
        if options.json:
            write_whole(options.json, json.dumps(report) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
