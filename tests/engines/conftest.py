"""Bundles of every family, built once a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import MODELS, STUDENTS

from flashdiff.components import Size
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import BackendName
from flashdiff.engines.config import BuildOptions

SIZES = (Size(32, 32), Size(48, 32))


@pytest.fixture(scope="session")
def family_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, BackendName], Path]:
    """A bundle of a tiny member of a family for a backend, at two sizes; the second backend finds the exports in the cache."""
    root = tmp_path_factory.mktemp("families")

    def build(family: str, backend: BackendName) -> Path:
        base, out = root / family, root / f"{family}-{backend}"
        if not base.exists():
            (MODELS | STUDENTS)[family](base)
        if not out.exists():
            build_engine(BuildOptions(base=str(base), out=out, backend=backend, sizes=SIZES, batch_sizes=(2, 3)), print)
        return out

    return build
