"""What several tests share: a tiny random model, a LoRA trained on it for a moment, and bundles built from it once a run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models gain nothing by several threads, and on a busy machine threads that wait for each other take minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import make_tiny_sd15


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither find nor leave anything in the user's cache, but share its renders, which take minutes to draw."""
    from flashdiff.zoo.images import render_cache

    renders, cache = render_cache(), tmp_path_factory.mktemp("cache")
    renders.mkdir(parents=True, exist_ok=True)
    (cache / "flashdiff").mkdir()
    (cache / "flashdiff" / "renders").symlink_to(renders, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd15(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def flash_lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flash LoRA of the tiny model, trained for four updates with an exaggerated learning rate, so that it shows."""
    from recipes import tiny_recipe

    from flashdiff.distill.loop import distill

    out = tmp_path_factory.mktemp("lora") / "flash"
    distill(tiny_recipe(tiny_base, learning_rate=0.05), out)
    return out


@pytest.fixture(scope="session")
def student_bundle(tiny_base: Path, flash_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flashdiff.engines.build import BuildOptions, build_engine

    out = tmp_path_factory.mktemp("bundles") / "student"
    build_engine(BuildOptions(base=str(tiny_base), loras=((str(flash_lora), 1.0),), out=out, batch_sizes=(1, 2, 4)), print)
    return out


@pytest.fixture(scope="session")
def teacher_bundle(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the other backend, at two sizes, guided."""
    from flashdiff.components import Size
    from flashdiff.engines.build import BuildOptions, build_engine

    out = tmp_path_factory.mktemp("bundles") / "teacher"
    sizes = (Size(32, 32), Size(48, 32))
    build_engine(BuildOptions(base=str(tiny_base), out=out, backend="onnxruntime", batch_sizes=(2, 4), sizes=sizes), print)
    return out
