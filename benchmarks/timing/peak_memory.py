"""Peak memory: each model makes one batch in a process of its own."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from benchmarks.new_process import call_in_new_process
from benchmarks.timing.bundle_pairs import Pair
from benchmarks.timing.configurations import in_process
from benchmarks.timing.stock_diffusers import StockModel, open_stock
from flashdiff.engines.runtime.engine import open_bundle


def measure_peak_memory(
    pairs: Sequence[Pair], batch: int, report: Callable[[str], None], stock: StockModel | None = None
) -> list[Measurement]:
    """Every model's peaks in MB, imports and opening included: main memory, and device memory where torch allocates it."""
    measurements = [call_in_new_process(_measure_bundle, bundle, batch) for pair in pairs for bundle in pair]
    if stock:
        device = open_bundle(pairs[0][0]).manifest.machine.device
        measurements.append(call_in_new_process(_measure_stock, stock, device, batch))
    titles = ("model", "backend", "batch", "peak memory, MB", "of the device, MB")
    lines = [(one["model"], one["backend"], batch, f"{one['peak_mb']:.0f}", one["device_peak_mb"] or "-") for one in measurements]
    report(f"\n{markdown_table(titles, lines)}")
    return measurements


def _measure_bundle(bundle: Path, batch: int) -> Measurement:
    engine = open_bundle(bundle)
    model = "student" if engine.spec.sampler.kind == "flash" else "teacher"
    in_process(model, engine, 1, batch, "", "").run_once(0)
    return _with_peaks(model, engine.manifest.backend, engine.manifest.precision, batch)


def _measure_stock(model: StockModel, device: str, batch: int) -> Measurement:
    configuration = open_stock(model, device=device, compiled=False)(1, batch)
    configuration.run_once(0)
    return _with_peaks(configuration.model, configuration.backend, configuration.precision, batch)


def _with_peaks(model: str, backend: str, precision: str, batch: int) -> Measurement:
    """The measurement of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    torch: Any = sys.modules.get("torch")  # not imported for this: it would add to the peak
    on_device = torch.cuda.max_memory_reserved() / 1e6 if torch and torch.cuda.is_initialized() else None
    about = {"model": model, "backend": backend, "precision": precision, "batch": batch}
    return {**about, "peak_mb": 1024 * peak_kib / 1e6, "device_peak_mb": on_device}
