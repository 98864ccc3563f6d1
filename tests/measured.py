"""Made-up measurements and result files, for tests of tables and reports."""

import json
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "cpu": "a cpu",
    "threads": 2,
    "system": "linux",
    "libraries": {"openvino": "1"},
    "bundles": {"student": {"hash": "s"}, "teacher": {"hash": "t"}},
}


def timed(model: str, steps: int, nfe: int, total: float, *, backend: str = "openvino", **stages: float) -> list[dict[str, Any]]:
    """The measurements of one configuration: a median per stage, from 20 samples."""
    about = {"model": model, "backend": backend, "precision": "fp32", "batch": 1, "steps": steps, "nfe": nfe}
    return [{**about, "stage": name, "median_ms": ms, "p95_ms": ms, "n": 20} for name, ms in {**stages, "total": total}.items()]


def estimate(value: float) -> dict[str, float]:
    """A metric with its confidence interval."""
    return {"value": value, "low": value - 1, "high": value + 1}


def write_result(folder: Path, name: str, **content: Any) -> Path:
    """Write a result file with this environment."""
    file = folder / name
    file.write_text(json.dumps({"environment": ENVIRONMENT, **content}))
    return file
