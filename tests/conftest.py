"""What several tests share: a tiny random model, a LoRA trained on it for a moment, and bundles built from it once a run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models gain nothing by several threads, and on a busy machine threads that wait for each other take minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

# No clock decides a test: hypothesis would fail one whose examples are slow to make or to run.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")
# httpx gives up after five seconds, unless a call says otherwise.
vars(httpx2._config.DEFAULT_TIMEOUT_CONFIG).update(dict.fromkeys(("connect", "read", "write", "pool"), 600.0))

Once = Callable[[str, Callable[[Path], object]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the tests of shared bundles: with two processes, one builds while the other does something else."""
    built = {"student_bundle", "teacher_bundle"}
    items.sort(key=lambda item: built.isdisjoint(getattr(item, "fixturenames", ())))


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


@pytest.fixture
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor of every precision, for what is planned or refused without such an engine being run."""
    monkeypatch.setattr("flashdiff.engines.runtime.machine._cpu_info", lambda *_: "avx2 avx512_vnni avx512_bf16 avx512_fp16")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder with `make(folder)` once a run, whichever of pytest's parallel processes needs it first."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # theirs in common

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / "once" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                make(folder)
        return folder

    return once


@pytest.fixture(scope="session")
def tiny_base(once: Once) -> Path:
    from tiny import make_tiny_sd15

    return once("tiny", make_tiny_sd15)


@pytest.fixture(scope="session")
def flash_lora(tiny_base: Path, once: Once) -> Path:
    """A flash LoRA of the tiny model, trained for four updates with an exaggerated learning rate, so that it shows."""
    from recipes import tiny_recipe

    from flashdiff.distill.loop import distill

    return once("flash", lambda out: distill(tiny_recipe(tiny_base, learning_rate=0.05), out))


@pytest.fixture(scope="session")
def student_bundle(tiny_base: Path, flash_lora: Path, once: Once) -> Path:
    return once("student", lambda out: _build(out, tiny_base, loras=((str(flash_lora), 1.0),), batch_sizes=(1, 2, 4)))


@pytest.fixture(scope="session")
def teacher_bundle(tiny_base: Path, once: Once) -> Path:
    """Of the other backend, at two sizes, guided."""
    from flashdiff.components import Size

    sizes = (Size(32, 32), Size(48, 32))
    return once("teacher", lambda out: _build(out, tiny_base, backend="onnxruntime", batch_sizes=(2, 4), sizes=sizes))


def _build(out: Path, base: Path, **options: Any) -> None:
    from flashdiff.engines.build import BuildOptions, build_engine

    build_engine(BuildOptions(base=str(base), out=out, **options), print)
