"""A result row and the environment it was measured in."""

import argparse
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flashdiff
from flashdiff.engines.bundle import Manifest
from flashdiff.engines.runtime.threads import cpu_threads


def environment(manifests: dict[str, Manifest]) -> dict[str, Any]:
    """The machine, the versions and the bundles, as one record."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "flashdiff": flashdiff.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "threads": cpu_threads(),
        "load_average": os.getloadavg()[0],
        "libraries": {name: _version(name) for name in ("openvino", "onnxruntime", "torch", "diffusers", "numpy")},
        "bundles": {
            name: {"name": m.model.name, "hash": m.bundle_hash, "loras": [lora.name for lora in m.loras]}
            for name, m in manifests.items()
        },
    }


def result_file(text: str) -> Path:
    """For argparse: where results go, which is tried before anything is measured."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from None
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: it is a folder")
    return path


def timed_row(
    backend: str, precision: str, model: str, batch: int, steps: int, nfe: int, stage: str, samples_ms: Sequence[float]
) -> dict[str, Any]:
    """One row; `nfe` are the network evaluations of an image, `interval_ms` is where the median lies with 95 % confidence."""
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


def percentile(samples: Sequence[float], percent: int) -> float:
    """The smallest sample that at least so many per cent do not exceed: the nearest rank."""
    return sorted(samples)[max(0, -(-percent * len(samples) // 100) - 1)]


def median_ranks(n: int) -> tuple[int, int]:
    """Between which of n sorted samples, from 0 on, the median lies with at least 95 % confidence, whatever their distribution.

    Of so many samples below the median, a coin's number of heads, the least likely 2.5 % on either side are left out. Fewer than
    six samples are too few for that: all of them.
    """
    rank, tail = 0, 1 / 2**n
    while tail + (more := math.comb(n, rank + 1) / 2**n) <= 0.025:
        rank, tail = rank + 1, tail + more
    return rank, n - 1 - rank


def _commit() -> str | None:
    """Its hash, with `-dirty` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        where = Path(__file__).parent
        return subprocess.run(command, cwd=where, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
