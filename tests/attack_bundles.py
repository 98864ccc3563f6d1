"""A second bundle for the tests of swaps and kills, without building one."""

import shutil
from pathlib import Path

import numpy as np

from flashdiff.engines.bundle import read_manifest, write_manifest
from flashdiff.files import hash_file

WEIGHTS = "denoiser/model.bin"


def other_bundle(bundle: Path, target: Path) -> Path:
    """A copy with other weights and the hashes that go with them: another bundle, as sound as the first."""
    shutil.copytree(bundle, target)
    (target / WEIGHTS).write_bytes(other_weights((bundle / WEIGHTS).read_bytes()))
    manifest = read_manifest(bundle)
    write_manifest(target, manifest.model_copy(update={"files": {**manifest.files, WEIGHTS: hash_file(target / WEIGHTS)}}))
    return target


def other_weights(content: bytes) -> bytes:
    """Constants of a graph with its larger floats nudged: integers, read as floats, are far smaller."""
    values = np.frombuffer(content[: len(content) // 4 * 4], np.float32).copy()
    is_weight = (np.abs(values) > 1e-6) & (np.abs(values) < 1)
    values[is_weight] *= np.float32(0.9)
    return values.tobytes() + content[len(content) // 4 * 4 :]
