"""Bundles are opened under the names of their folders."""

from pathlib import Path

import pytest

from flashdiff.engines.bundle import read_manifest
from flashdiff.errors import ConfigError
from flashdiff.server.opening import open_models


def test_a_bundle_is_served_under_its_folders_name_and_its_repository_can_give_it_again(student_bundle: Path) -> None:
    models = open_models([student_bundle], student_bundle.parent)
    identity = models.get().identity
    manifest = read_manifest(student_bundle)
    assert (identity.name, identity.bundle_hash, identity.backend) == ("student", manifest.bundle_hash, "openvino")
    size = models.get().components.spec.sizes[0]
    assert models.get().costs.current[size]["denoiser"].keys() == set(manifest.batch_sizes)
    models.unload("student")
    models.load("student")
    assert list(models.served) == ["student"]


def test_two_bundles_of_one_name_are_refused_before_either_is_opened() -> None:
    with pytest.raises(ConfigError, match="two bundles have the same folder name: student, student"):
        open_models([Path("a/student"), Path("b/student")], None)
