"""Bundles of every family, built once a run, and GPUs that are not there."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import MODELS, STUDENTS

from flashdiff.components import Size
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import BackendName
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.runtime import machine

SIZES = (Size(32, 32), Size(48, 32))


@pytest.fixture(scope="session")
def family_bundle(once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str, BackendName], Path]:
    """A bundle of a tiny member of a family for a backend, at two sizes; the second backend finds the exports in the cache."""

    def build(family: str, backend: BackendName) -> Path:
        base = once(f"families/{family}", (MODELS | STUDENTS)[family])

        def make(out: Path) -> None:
            build_engine(BuildOptions(base=str(base), out=out, backend=backend, sizes=SIZES, batch_sizes=(2, 3)), print)

        return once(f"families/{family}-{backend}", make)

    return build


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives this machine a GPU of a generation such as sm_89, which libraries use as far as they are installed for it."""

    def install(generation: str) -> None:
        monkeypatch.setattr(machine, "nvidia_gpu", lambda *_: ("A GPU", generation))

    return install
