"""What text, one denoise step and decoding cost on every backend and batch, interleaved in one run, against torch.

    python benchmarks/backends.py openvino-bundle onnxruntime-bundle torch-bundle --batch 1,4 --json backends.json

The bundles are of one base and its LoRAs. Every round calls each of them once, in turn, so that a noisy machine is noisy
for all; before it, rounds that are not counted. The ratio is torch's median, of the same precision where there is one, over
the backend's.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.rows import environment, row
from flashdiff.engines.config import parse_batches
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.errors import BundleError, FlashdiffError
from flashdiff.files import write_whole

STAGES = ("text", "denoise_step", "decode")
_PROMPT = "a dog"  # ids are padded to one length: a longer text costs the same
_WARM_UP_ROUNDS = 3


def calls(engine: Engine, batch: int) -> dict[str, Callable[[], object]]:
    """The three calls of a model at one batch size, on inputs of the default size."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, *engine.spec.latent_shape(engine.spec.sizes[0])), dtype=np.float32)
    times = np.linspace(0, engine.spec.sampler.schedule.num_train_timesteps - 1, batch).astype(np.int64)
    conditioning = engine.encode([_PROMPT] * batch)
    return {
        "text": lambda: engine.encode([_PROMPT] * batch),
        "denoise_step": lambda: engine.denoise(latents, times, conditioning),
        "decode": lambda: engine.decode(latents),
    }


def run(bundles: Sequence[Path], *, batches: Sequence[int], repeats: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Open the bundles, measure, and return {"environment": ..., "rows": [...]}."""
    engines = {bundle.name: open_bundle(bundle) for bundle in bundles}
    if len(engines) < len(bundles):
        raise BundleError("two bundles have the same name: rows are told apart by it")
    if len({(e.manifest.base_hash, e.manifest.loras, e.spec.sizes[0]) for e in engines.values()}) > 1:
        raise BundleError("the bundles differ in base, LoRAs or size: their costs cannot be compared")
    for name, engine in engines.items():
        if max(batches) > engine.max_batch:
            raise BundleError(f"--batch {max(batches)}: {name} takes at most {engine.max_batch} rows at once")
    work = {
        (name, batch, stage): call
        for batch in batches
        for name, engine in engines.items()
        for stage, call in calls(engine, batch).items()
    }
    record = environment({name: engine.manifest for name, engine in engines.items()})
    samples: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for index in range(-_WARM_UP_ROUNDS, repeats):
        for key, call in work.items():
            started = time.perf_counter()
            call()
            if index >= 0:
                samples[key].append(1000 * (time.perf_counter() - started))
        if index >= 0 and (index + 1) % max(1, repeats // 4) == 0:
            report(f"round {index + 1} of {repeats}")
    rows = [row(engines[name].manifest, name, batch, 1, stage, samples[name, batch, stage]) for name, batch, stage in work]
    return {"environment": record, "rows": rows}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line per backend, precision and batch: median milliseconds, and how much faster than torch."""

    def median(backend: str, precision: str, batch: int, stage: str) -> float | None:
        kind = {"backend": backend, "precision": precision, "batch": batch, "stage": stage}
        return next((r["median_ms"] for r in rows if all(r[name] == value for name, value in kind.items())), None)

    lines = ["| backend | precision | batch | text | one step | decode |", "|---|---|---|---|---|---|"]
    for backend, precision, batch in dict.fromkeys((r["backend"], r["precision"], r["batch"]) for r in rows):
        cells = []
        for stage in STAGES:
            own = median(backend, precision, batch, stage)
            reference = median("torch", precision, batch, stage) or median("torch", "fp32", batch, stage)
            assert own is not None
            cells.append(f"{own:.2f}" + (f" ({reference / own:.1f}x)" if reference and backend != "torch" else ""))
        lines.append(f"| {backend} | {precision} | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--batch", default="1,4", metavar="N[,N...]", help="rows at once; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one round of batch 1: does it run, not what it measures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows")
    options = parser.parse_args()
    try:
        if options.repeats < 1:
            raise BundleError(f"--repeats {options.repeats}: give a number from 1 on")
        batches, repeats = ([1], 1) if options.quick else (parse_batches(options.batch), options.repeats)
        report = run(options.bundles, batches=batches, repeats=repeats, report=print)
        print(markdown(report["rows"]))
        if options.json:
            write_whole(options.json, json.dumps(report, indent=2) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"backends.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
