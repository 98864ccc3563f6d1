"""Bundles are opened under the names of their folders."""

from pathlib import Path

import pytest

from flashdiff.engines.bundle import read_manifest
from flashdiff.errors import BundleError, ConfigError
from flashdiff.server.opening import ExpectedBundles, open_models


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


def test_a_bundle_of_another_hash_is_refused_before_it_is_opened(student_bundle: Path) -> None:
    found, other = read_manifest(student_bundle).bundle_hash, "0" * 64
    with pytest.raises(BundleError, match=f"student has the hash {found}, and --expect-bundle allows {other} alone"):
        open_models([student_bundle], None, expected=ExpectedBundles((other,)))
    ExpectedBundles((other, found[:12])).check(student_bundle)
    ExpectedBundles().check(student_bundle)


def test_a_bundle_that_is_replaced_after_the_check_is_refused(student_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpectedBundles, "check", lambda *_: None)  # as if another bundle had been there
    with pytest.raises(BundleError, match="and --expect-bundle allows 0000"):
        open_models([student_bundle], None, expected=ExpectedBundles(("0" * 64,)))


def test_a_repository_gives_no_bundle_of_another_hash(student_bundle: Path) -> None:
    models = open_models([], student_bundle.parent, expected=ExpectedBundles(("0" * 64,)))
    with pytest.raises(BundleError, match="and --expect-bundle allows 0000"):
        models.load("student")


@pytest.mark.parametrize("text", ["", "0" * 11, "0" * 65, "A" * 12, "x" * 12])
def test_what_is_no_hash_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--expect-bundle {text}: give 12 to 64 digits of a bundle's hash"):
        ExpectedBundles((text,))
