"""The environment of a measurement: machine, versions, commit and bundles."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flashdiff
from flashdiff.engines.bundle import Manifest
from flashdiff.engines.runtime.threads import cpu_threads


def read_environment(manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """The environment as a result file records it; `manifests` are those of the bundles by their name in the file."""
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


def describe_machine(environment: Mapping[str, Any]) -> str:
    """Threads, CPU and engine library in one line."""
    libraries = environment.get("libraries", {})
    engine = f", OpenVINO {libraries['openvino']}" if libraries.get("openvino") else ""
    return f"{environment['threads']} threads of {environment['cpu']}{engine}"


def _commit() -> str | None:
    """The checkout's commit hash, with `-dirty` if tracked files have changed since; None outside a checkout."""
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
