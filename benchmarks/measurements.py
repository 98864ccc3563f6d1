"""Measurements, the records of a result file: made of time samples, and collected during a run."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.stats import median_ranks, percentile

Measurement = dict[str, Any]
"""What was measured under one set of conditions, both by name. Result files list them under the key `rows`."""


def stage_measurement(
    samples_ms: Sequence[float], *, model: str, backend: str, precision: str, batch: int, steps: int, nfe: int, stage: str
) -> Measurement:
    """The measurement of a stage; `nfe` is the number of network evaluations per image.

    `interval_ms` is the median's 95 % confidence interval.
    """
    ordered = sorted(samples_ms)
    quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "model": model,
        "backend": backend,
        "precision": precision,
        "batch": batch,
        "steps": steps,
        "nfe": nfe,
        "stage": stage,
        "median_ms": round(statistics.median(ordered), 4),
        "p95_ms": round(percentile(ordered, 95), 4),
        "interval_ms": [round(ordered[rank], 4) for rank in median_ranks(len(ordered))],
        "quartiles_ms": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "n": len(ordered),
        "samples_ms": [round(sample, 3) for sample in samples_ms],
    }


class MeasurementLog:
    """The measurements of a run, in order. Each is reported in a line when it is added."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.measurements: list[Measurement] = []
        self._report = report

    def add(self, measurement: Measurement) -> Measurement:
        """Keep a measurement, report its line, and return it."""
        self.measurements.append(measurement)
        self._report(" ".join(f"{name}={value}" for name, value in measurement.items() if name != "samples_ms"))
        return measurement
