"""GPUs that are not there: what bundles say that were made on one, and TensorRT-RTX plans, which are built without one."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest

from flashdiff.engines.backends.tensorrt_builder import build_plan
from flashdiff.engines.bundle import Machine, Manifest, Precision, read_manifest
from flashdiff.engines.shapes import bucket_shapes, dimensions_of

needs_rtx = pytest.mark.skipif(
    not importlib.util.find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed: pip install -e '.[dev]'"
)


def made_on_gpu(bundle: Path, backend: str, precision: Precision, generation: str = "sm_89") -> Manifest:
    """The manifest of a bundle, as if a backend had made it on a GPU."""
    manifest = read_manifest(bundle)
    made_on = Machine(system=manifest.machine.system, processor="Another GPU", device="cuda", features=(generation,))
    return manifest.model_copy(update={"backend": backend, "precision": precision, "machine": made_on})


def build_rtx_plan(graph: Path, shapes: Mapping[str, tuple[int, ...]], plan: Path, said: list[str] | None = None) -> None:
    """The plan of a graph at these shapes; `said` gets the lines of its phases."""
    report = (said if said is not None else []).append
    build_plan("tensorrt-rtx", graph, shapes, plan, timings=plan.parent / "timings", version_compatible=False, report=report)


def denoiser_of(bundle: Path) -> tuple[Path, dict[str, tuple[int, ...]]]:
    """The graph of a bundle's denoiser at its first size, and the shapes of its inputs in a batch of two."""
    manifest = read_manifest(bundle)
    part, size = manifest.parts["denoiser"], manifest.sizes[0]
    return bundle / part.file_for(size, 2), bucket_shapes(part.inputs, dimensions_of(manifest.model, size, 2))
