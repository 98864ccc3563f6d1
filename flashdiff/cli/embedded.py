"""The embedded model by name where a command takes a bundle: built into the user's cache on first use."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flashdiff.cli.shared import need
from flashdiff.errors import ConfigError
from flashdiff.files import cache_folder

NAME = "avatars"
_LORA = "avatars-flash"
_MANIFEST = "manifest.json"
_MAX_LISTED = 10


def find_bundles(named: Sequence[Path]) -> list[Path]:
    """The folders unchanged, and the embedded model's bundle for its name; ConfigError for a wrong name lists others."""
    for path in named:
        if not path.exists() and str(path) != NAME:
            raise ConfigError(f"{path}: no such bundle; there are {', '.join(_nearby(path))}")
    return [path if path.exists() else _embedded() for path in named]


def _nearby(path: Path) -> list[str]:
    found = sorted(str(manifest.parent) for manifest in path.parent.glob(f"*/{_MANIFEST}"))
    return [f"{NAME} (the embedded model)", *found[:_MAX_LISTED], *(["..."] if len(found) > _MAX_LISTED else [])]


def _embedded() -> Path:
    """The bundle of the embedded model with its flash LoRA, brought up to date where this machine can build."""
    bundle = cache_folder() / "bundles" / NAME
    if not importlib.util.find_spec("torch") and (bundle / _MANIFEST).is_file():
        return bundle
    need("distill", "torch", "diffusers", "peft", "onnx", "onnxscript")
    # In a process of its own, so that this one does not keep torch's memory.
    command = ["build-engine", NAME, "--lora", _LORA, "--out", str(bundle)]
    status = subprocess.run([sys.executable, "-m", "flashdiff", *command]).returncode
    if status:
        sys.exit(status)  # the build has printed its error
    return bundle
