"""From a part's exported graph to the files that its backend reads."""

from collections.abc import Callable
from pathlib import Path

from flashdiff.components import Size
from flashdiff.engines.bundle import ONNX_GRAPH, BuildInputs, PartFile, PartSpec, graph_file
from flashdiff.engines.cache import cached
from flashdiff.engines.plan import Export, key_of
from flashdiff.engines.runtime import bucket_shapes, dimensions_of
from flashdiff.files import cache_folder


def compile_export(
    part: PartSpec, export: Export, inputs: BuildInputs, folder: Path, report: Callable[[str], None]
) -> list[PartFile]:
    """Turn the graph in `folder` into its backend's files there; their names are relative to `folder`.

    OpenVINO and ONNX Runtime read the graph itself, TensorRT one plan a bucket. BackendError when the backend cannot.
    """
    if inputs.backend in ("openvino", "onnxruntime"):
        return [PartFile(file=graph_file(inputs.backend), size=export.size)]
    files = [
        _plan(part, export, inputs, folder, size, batch, report)
        for size in _sizes(part, export, inputs)
        for batch in inputs.batch_sizes
    ]
    for path in folder.glob(f"{ONNX_GRAPH}*"):
        path.unlink()
    return files


def _sizes(part: PartSpec, export: Export, inputs: BuildInputs) -> tuple[Size | None, ...]:
    return (None,) if not part.is_spatial else (export.size,) if export.size else inputs.sizes


def _plan(
    part: PartSpec,
    export: Export,
    inputs: BuildInputs,
    folder: Path,
    size: Size | None,
    batch: int,
    report: Callable[[str], None],
) -> PartFile:
    """One TensorRT plan, for one bucket: built when the cache has none, so a build that was killed goes on where it was."""
    from flashdiff.engines.runtime.tensorrt_build import build_plan

    shapes = bucket_shapes(part.inputs, dimensions_of(inputs.model, size, batch))
    deciding = {
        "graph": export.key,
        "backend": inputs.backend,
        "versions": inputs.library_versions,
        "machine": inputs.machine.model_dump(mode="json"),
        "shapes": shapes,
        "version_compatible": inputs.version_compatible,
    }
    file = f"batch{batch}.plan" if size is None else f"batch{batch}-{size}.plan"

    def make(target: Path) -> None:
        build_plan(
            inputs.backend,
            folder / ONNX_GRAPH,
            shapes,
            target / file,
            timings=_timings(inputs),
            version_compatible=inputs.version_compatible,
            report=report,
        )

    cached(key_of(f"plan-{export.part}", deciding), make, folder)
    return PartFile(file=file, size=size, batch=batch)


def _timings(inputs: BuildInputs) -> Path:
    """Kernel timings are good for one version of the library on one kind of GPU."""
    versions = {name: version for name, version in inputs.library_versions.items() if "tensorrt" in name}
    return cache_folder() / key_of("timings", {**versions, "processor": inputs.machine.processor})
