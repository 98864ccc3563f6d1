"""TensorRT and TensorRT-RTX: each bucket of an ONNX graph becomes a plan, their word for an engine, for one kind of GPU."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from flashdiff.components import Size
from flashdiff.engines.backends import tensorrt_builder
from flashdiff.engines.backends.base import ONNX, REBUILD, Backend, CompilePart, Export, check_fp8
from flashdiff.engines.bundle import QUANTIZED, BackendName, BuildInputs, Machine, Manifest, PartFile, PartRecord, Precision
from flashdiff.engines.cache import cached, key_of
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.shapes import bucket_shapes, dimensions_of
from flashdiff.errors import BackendError, BundleError, install
from flashdiff.files import cache_folder, hash_files


def compile_graph(
    part: PartRecord, export: Export, inputs: BuildInputs, folder: Path, report: Callable[[str], None]
) -> list[PartFile]:
    """Put a plan for every bucket in the place of the graph in `folder`."""
    graph = hash_files(folder, [*folder.glob(f"{ONNX.file}*")])  # what was exported, or what it was rounded to
    files = [
        _plan(part, export, inputs, folder, graph, size, batch, report)
        for size in _sizes(part, export, inputs)
        for batch in inputs.batch_sizes
    ]
    for path in folder.glob(f"{ONNX.file}*"):
        path.unlink()
    return files


def _sizes(part: PartRecord, export: Export, inputs: BuildInputs) -> tuple[Size | None, ...]:
    return (None,) if not part.is_spatial else (export.size,) if export.size else inputs.model.sizes_of(export.part)


def _plan(
    part: PartRecord,
    export: Export,
    inputs: BuildInputs,
    folder: Path,
    graph: str,
    size: Size | None,
    batch: int,
    report: Callable[[str], None],
) -> PartFile:
    """The plan of one bucket: built when the cache has none, so a killed build resumes with the next plan."""
    shapes = bucket_shapes(part.inputs, dimensions_of(inputs.model, size, batch))
    deciding = {
        "graph": graph,
        "backend": inputs.backend,
        "versions": inputs.library_versions,
        "machine": inputs.machine.model_dump(mode="json"),
        "shapes": shapes,
        "version_compatible": inputs.version_compatible,
        "code": inputs.code,
    }
    file = f"batch{batch}.plan" if size is None else f"batch{batch}-{size}.plan"

    def make(target: Path) -> None:
        tensorrt_builder.build_plan(
            inputs.backend,
            folder / ONNX.file,
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


def _open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
    from flashdiff.engines.backends.tensorrt_runner import open_parts

    return open_parts(folder, manifest, device)


def _quantize(
    kind: Literal["int8", "fp8"],
    graph: Path,
    target: Path,
    rows: Sequence[Mapping[str, NDArray[Any]]],
    kept: Collection[str],
) -> dict[str, float]:
    from flashdiff.engines.backends.tensorrt_quantizer import quantize

    return quantize(kind, graph, target, rows, kept)


def _check_precision(precision: Precision, here: Machine) -> None:
    if precision == "fp8" and here.device == "cuda":  # that there is no GPU is said of every precision
        check_fp8(here)


def _check_build(backend: BackendName, precision: Precision, here: Machine) -> None:
    if here.device == "cpu":
        raise BackendError(
            f"--backend {backend}: there is no NVIDIA GPU here to check the engine on, and nothing is published unchecked; "
            "build where it will serve, or take openvino"
        )
    if precision in QUANTIZED and importlib.util.find_spec("onnxruntime") is None:
        raise BackendError(f"--precision {precision} needs 'onnxruntime' to calibrate, which is not here: {install('cpu')}")


def _check_bundle(package: str, manifest: Manifest, here: Machine) -> None:
    made = manifest.machine
    for what, then, now in (("system", made.system, here.system), ("GPU generation", made.features, here.features)):
        if then != now:
            raise BundleError(f"the plans were made for {what} {_text(then)}, this machine has {_text(now)}; {REBUILD}")
    version = manifest.library_versions.get(package)
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return
    if version and installed != version and not manifest.version_compatible:
        raise BundleError(
            f"the plans were made with {package} {version}, here is {installed}; install that version, or {REBUILD}"
        )


def _text(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else ", ".join(value) or "none"


RECORDS = tuple(
    Backend(
        name=name,
        extra=name,
        modules=("cuda.bindings.runtime",),
        packages=(library.package,),
        graph=ONNX,
        compile_graph=compile_graph,
        quantize={"int8": partial(_quantize, "int8"), "fp8": partial(_quantize, "fp8")},
        quantizer_packages=("onnxruntime", "onnxruntime-gpu"),
        tried_by="onnxruntime",  # which takes float16 on CPUs, and no bfloat16
        rest={"int8": "fp16", "fp8": "fp16"},
        open_parts=_open_parts,
        uses_gpu=lambda: True,
        check_precision=_check_precision,
        check_build=partial(_check_build, name),
        check_runs=partial(tensorrt_builder.check_opens, name),
        check_bundle=partial(_check_bundle, library.package),
        parallel_decode_on_gpu=True,
        # In int8 and fp8 the graph is there twice for a while, rounded and not.
        weight_bytes={"fp32": 4, "fp16": 2, "bf16": 2, "int8": 3, "fp8": 3},
        files_per_bucket=True,
        has_version_compatible=True,
    )
    for name, library in tensorrt_builder.LIBRARIES.items()
)
