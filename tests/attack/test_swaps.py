"""Files that are replaced or edited while they are read: what runs is what was checked, of one piece, or nothing runs."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_bundles import WEIGHTS, other_bundle, other_weights

from flashdiff.engines import build as building
from flashdiff.engines import bundle as bundles
from flashdiff.engines.build import BuildOptions, build_engine
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime import snapshot as snapshots
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.errors import BundleError
from flashdiff.families.files import base_files
from flashdiff.files import hash_file, new_folder
from flashdiff.generate import generate
from flashdiff.tasks import check_order

pytestmark = pytest.mark.slow


@pytest.fixture
def own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def place(student_bundle: Path, tmp_path: Path, own_temporary_files: Path) -> Path:
    """`served` is a bundle, `other` another one, whole and ready to take its place."""
    shutil.copytree(student_bundle, tmp_path / "served")
    other_bundle(student_bundle, tmp_path / "other")
    return tmp_path


def _images(engine: Engine) -> Any:
    """Of batches of one and of more: both are compiled when they are first asked for."""
    orders = [check_order(engine.spec, prompt=f"a dog {i}", seed=i, steps=2) for i in range(3)]
    alone = [generate(engine, [order])[0][0] for order in orders]
    return np.stack([*alone, *(images[0] for images in generate(engine, orders))])


def _swap(place: Path) -> None:
    with new_folder(place / "served", replace=True) as folder:
        shutil.copytree(place / "other", folder, dirs_exist_ok=True)


def _edit(place: Path) -> None:
    with open(place / "served" / WEIGHTS, "r+b") as file:
        content = other_weights(file.read())
        file.seek(0)
        file.write(content)


def _truncate(place: Path) -> None:
    os.truncate(place / "served" / WEIGHTS, 100)


def _remove(place: Path) -> None:
    shutil.rmtree(place / "served")


@pytest.mark.parametrize("change", [_swap, _edit, _truncate, _remove])
def test_an_opened_bundle_runs_on_what_was_checked(place: Path, change: Callable[[Path], None]) -> None:
    expected = _images(open_bundle(place / "served"))
    engine = open_bundle(place / "served")
    order = check_order(engine.spec, prompt="a dog 0", seed=0, steps=2)
    np.testing.assert_array_equal(generate(engine, [order])[0][0], expected[0])
    change(place)
    np.testing.assert_array_equal(_images(engine), expected)


def test_the_other_bundle_makes_other_images(place: Path) -> None:
    assert (_images(open_bundle(place / "served")) != _images(open_bundle(place / "other"))).any()


@pytest.mark.parametrize("after", [0, 4, 8])
def test_a_bundle_that_is_replaced_while_it_is_opened_is_the_old_one_or_the_new_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """`after` as many files have been copied."""
    expected = {read_manifest(place / name).bundle_hash: _images(open_bundle(place / name)) for name in ("served", "other")}
    copy, copied = snapshots.copy_hashed, list[Path]()

    def copy_then_swap(source: Path, target: Path) -> str:
        if len(copied) == after:
            _swap(place)
        copied.append(source)
        return copy(source, target)

    monkeypatch.setattr(snapshots, "copy_hashed", copy_then_swap)
    engine = open_bundle(place / "served")
    assert len(copied) > after
    np.testing.assert_array_equal(_images(engine), expected[engine.manifest.bundle_hash])


def test_a_bundle_that_never_stays_the_same_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = bundles._check_files

    def swap_then_check(*arguments: Any) -> None:
        shutil.copytree(place / "served", place / "third")
        _swap(place)
        shutil.rmtree(place / "other")
        (place / "third").rename(place / "other")
        check(*arguments)

    monkeypatch.setattr(bundles, "_check_files", swap_then_check)
    with pytest.raises(BundleError, match="changed while it was opened"):
        open_bundle(place / "served")


def test_a_file_that_is_edited_while_the_bundle_is_opened_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = snapshots.copy_hashed

    def edit_then_copy(source: Path, target: Path) -> str:
        if source.name == Path(WEIGHTS).name and "denoiser" in source.parts:
            _edit(place)
        return copy(source, target)

    monkeypatch.setattr(snapshots, "copy_hashed", edit_then_copy)
    with pytest.raises(BundleError, match=r"denoiser/model\.bin has changed since it was built"):
        open_bundle(place / "served")


def test_the_private_copy_goes_with_its_engine_or_when_every_bucket_is_ready(place: Path, own_temporary_files: Path) -> None:
    engine = open_bundle(place / "served")
    assert len(list(own_temporary_files.iterdir())) == 1
    del engine
    gc.collect()
    assert not list(own_temporary_files.iterdir())
    engine = open_bundle(place / "served")
    engine.measure_costs()
    assert not list(own_temporary_files.iterdir())
    _images(engine)
    (place / "served" / WEIGHTS).write_bytes(b"")
    with pytest.raises(BundleError):
        open_bundle(place / "served")
    assert not list(own_temporary_files.iterdir())


def test_the_copy_of_a_process_that_was_killed_is_removed_by_the_next(place: Path, own_temporary_files: Path) -> None:
    (own_temporary_files / "flashdiff-abandoned.open").mkdir()
    (own_temporary_files / "flashdiff-abandoned.open" / "weights").write_bytes(b"0")
    engine = open_bundle(place / "served")
    assert len(list(own_temporary_files.iterdir())) == 1
    assert engine


@pytest.fixture
def sources(tiny_base: Path, flash_lora: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(flash_lora, tmp_path / "lora", ignore=shutil.ignore_patterns("training"))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["lora/pytorch_lora_weights.safetensors", "lora/flash.json", "base/unet/config.json", "base/tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("stage", ["fuse", "parts_of"])
def test_a_source_that_is_replaced_during_a_build_ends_it(
    sources: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str
) -> None:
    run = getattr(building, stage)

    def touch_then_run(*arguments: Any) -> Any:
        shutil.copyfile(sources / name, sources / "again")
        (sources / "again").replace(sources / name)
        return run(*arguments)

    monkeypatch.setattr(building, stage, touch_then_run)
    options = BuildOptions(base=str(sources / "base"), loras=((str(sources / "lora"), 1.0),), out=sources / "out")
    with pytest.raises(BundleError, match="changed while the build read it"):
        build_engine(options, lambda _: None)
    assert not (sources / "out").exists()


def test_all_that_a_base_is_hashed_by_is_watched(tiny_base: Path) -> None:
    names = {path.relative_to(tiny_base).as_posix() for path in base_files(tiny_base)}
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"} <= names
    assert all(len(hash_file(path)) == 64 for path in base_files(tiny_base))
