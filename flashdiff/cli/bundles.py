"""Bundles for the commands that take one: a folder, the embedded model by name, or one built into the user's cache for --base."""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flashdiff.cli.build_options import build_command
from flashdiff.cli.shared import need, parse_control, parse_lora
from flashdiff.errors import ConfigError
from flashdiff.files import cache_folder

NAME = "avatars"
_LORA = "avatars-flash"
_MANIFEST = "manifest.json"
_MAX_LISTED = 10
_LONGEST_NAME = 100


def find_bundles(named: Sequence[Path]) -> list[Path]:
    """The folders unchanged, and the embedded model's bundle for its name; ConfigError for a wrong name lists others."""
    for path in named:
        if not path.exists() and str(path) != NAME:
            raise ConfigError(f"{path}: no such bundle; there are {', '.join(_nearby(path))}")
    return [path if path.exists() else _built(["build-engine", NAME, f"--lora={_LORA}"], _bundles() / NAME) for path in named]


def bundle_of_base(options: argparse.Namespace, *, without: frozenset[str] = frozenset()) -> Path:
    """The bundle that `build-engine` makes of these options, in the cache, brought up to date."""
    command = build_command(options, without=without)
    loras = [parse_lora(text) for text in options.lora]
    places = [options.base, *(name for name, _ in loras)]
    controls = [] if "control" in without else [parse_control(text)[1] for text in options.controls]
    reference = [] if "reference" in without else [options.reference, options.reference_encoder]
    # Two folders of one name are two models, and so are two settings of one model.
    deciding = [
        command,
        [
            os.path.realpath(place)
            for place in (*places, options.vae or "", *controls, *reference)
            if place and Path(place).exists()
        ],
    ]
    key = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]
    name = "+".join(re.sub(r"[^\w.-]", "-", Path(place).name.removesuffix(".safetensors")) for place in places)
    return _built(command, _bundles() / key / name[:_LONGEST_NAME])


def _bundles() -> Path:
    return cache_folder() / "bundles"


def _nearby(path: Path) -> list[str]:
    found = sorted(str(manifest.parent) for manifest in path.parent.glob(f"*/{_MANIFEST}"))
    return [f"{NAME} (the embedded model)", *found[:_MAX_LISTED], *(["..."] if len(found) > _MAX_LISTED else [])]


def _built(command: list[str], bundle: Path) -> Path:
    """The bundle, brought up to date where this machine can build."""
    if not importlib.util.find_spec("torch") and (bundle / _MANIFEST).is_file():
        return bundle
    need("distill", "torch", "diffusers", "peft", "onnx", "onnxscript")
    # In a process of its own, so that this one does not keep torch's memory.
    # Its lines are not what this command prints, so they go to the log's stream.
    status = subprocess.run([sys.executable, "-m", "flashdiff", *command, "--out", str(bundle)], stdout=sys.stderr).returncode
    if status:
        sys.exit(status)  # the build has printed its error
    return bundle
