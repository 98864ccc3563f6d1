"""What differs between backends, as one record. A backend is a library that runs the parts of a bundle.

Records are cheap to import: a backend's functions import its library when they are called.
"""

import importlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Size
from flashdiff.engines.bundle import BuildInputs, Machine, Manifest, PartFile, PartRecord, Precision
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device
from flashdiff.engines.runtime.machine import this_machine
from flashdiff.errors import BackendError, BundleError, install

if TYPE_CHECKING:
    from flashdiff.engines.parts import Part
    from flashdiff.families.base import TorchModel

REBUILD = "build it on this one with `flashdiff build-engine`"

CompiledPart = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[np.float32]]]
"""One part at one fixed shape: named inputs of exactly that shape to named outputs, which belong to the caller."""

CompilePart = Callable[[str, Path, Mapping[str, int]], CompiledPart]
"""Makes a part, by name, ready to run from one of its files, with its named dimensions filled."""


class ExportPart(Protocol):
    def __call__(self, model: "TorchModel", part: "Part", folder: Path, *, size: Size, precision: Precision = "fp32") -> None:
        """Write a part's graph into `folder`, which exists; inputs and outputs stay float32. BackendError when it cannot.

        `size` is the size of the example, and the only one that a part of fixed size will take. Below float32 the part's own
        weights may be cast, and at any precision its network may be folded: see `folding`. Read what you need of it first.
        """


@dataclass(frozen=True, kw_only=True)
class GraphForm:
    """A form that parts are exported to."""

    name: str
    file: str
    """The graph's file name; its weights lie next to it."""
    packages: tuple[str, ...]
    """Distributions whose versions decide what is exported."""
    export: ExportPart
    as_float32: tuple[Precision, ...] = ()
    """Precisions whose graphs are those of float32."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """One graph that a build needs."""

    part: str
    size: Size | None
    """The only size it serves; None: all."""
    key: str
    """Names its content in the cache."""
    is_cached: bool


CompileGraph = Callable[[PartRecord, Export, BuildInputs, Path, Callable[[str], None]], list[PartFile]]
"""Turns the exported graph of a part in a folder into the backend's files there, whose names are relative to the folder; the last
argument gets a line per phase. BackendError when the backend cannot."""


QuantizeGraph = Callable[[Path, Path, Sequence[Mapping[str, NDArray[Any]]], Collection[str]], Mapping[str, float]]
"""Writes a graph with rounded layers to another path, calibrated on rows of its inputs; the layers named last stay as they are.
Returns the noise by rounded layer: how far rounding moves what is rounded there, root mean square, as a share of its own.
BackendError when it cannot."""

_NOISE_ROWS = 8


def noise_rows(rows: Sequence[Mapping[str, NDArray[Any]]]) -> list[Mapping[str, NDArray[Any]]]:
    """The rows that a quantized graph's noise is measured on: spread over all, which come step by step."""
    return [rows[place] for place in np.linspace(0, len(rows) - 1, min(_NOISE_ROWS, len(rows))).astype(int)]


_FP8_SINCE = (8, 9)
"""The compute capability of the first GPUs with fp8: Ada, then Hopper and Blackwell."""
_INT8_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")


def check_int8(here: Machine) -> None:
    """BackendError on a processor without int8 arithmetic, where int8 would be slower, and sums may overflow."""
    if not {*_INT8_FEATURES} & {*here.features}:
        raise BackendError(
            f"--precision int8: this processor has no such arithmetic (none of {', '.join(_INT8_FEATURES)}), int8 would not be "
            "faster; take fp32"
        )


def check_fp8(here: Machine) -> None:
    """BackendError where there is no GPU that computes in fp8."""
    what = here.features[0] if here.device == "cuda" else "a CPU"
    if here.device == "cpu" or _capability(what) < _FP8_SINCE:
        raise BackendError(
            f"--precision fp8: it needs an NVIDIA GPU of compute capability 8.9 or later, and this is {what}; take bf16 or fp16"
        )


def _capability(name: str) -> tuple[int, int]:
    """(8, 9) for sm_89."""
    digits = name.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


SaveModel = Callable[["TorchModel", Sequence["Part"], Path, BuildInputs, Callable[[str], None]], dict[str, tuple[PartFile, ...]]]
"""Writes a fused model into a folder as the inputs of the build say, and returns the files of each part, relative to that folder;
the last argument gets a line per phase."""


def _always(*_: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to run a bundle. A backend that needs an `if` outside this folder misses a field here.

    Either `graph` or `save` is given: the backend reads exported graphs, or the fused model as torch saves it.
    """

    name: str
    extra: str
    """What to install for it: an extra of the project."""
    modules: tuple[str, ...]
    """What it imports to open a bundle."""
    telemetry: tuple[str, ...] = ()
    """What these import to report their use to their makers, and do without; `import_modules` keeps it from them."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions count in a bundle's fingerprint, in addition to the exporters'."""

    graph: GraphForm | None = None
    """The form its parts are exported to."""
    compile_graph: CompileGraph | None = None
    """None: it reads the graph itself."""
    quantize: Mapping[Precision, QuantizeGraph] = field(default_factory=dict)
    """Makes the denoiser of a bundle in such a precision out of its graph."""
    quantizer_packages: tuple[str, ...] = ()
    """Distributions whose versions count in the fingerprint of a bundle that is quantized."""
    tried_by: str | None = None
    """The backend that runs its quantized graphs on a CPU, to gate them before they are compiled; None: it runs them itself."""
    rest: Mapping[Precision, Precision] = field(default_factory=lambda: {"int8": "fp32"})
    """What is not rounded in a bundle of such a precision: the other parts, and the other layers of the denoiser."""
    save: SaveModel | None = None
    open_parts: Callable[[Path, Manifest, Device], CompilePart]
    """Opens a bundle's folder on a device; any error may be raised. The threads that open and run it are pinned already."""

    uses_gpu: Callable[[], bool] = lambda: False
    """Whether the library, as installed, runs on an NVIDIA GPU; called only where there is one."""
    gpu_extra: str | None = None
    """What to install in the place of a library that, as installed, runs on CPUs alone; None: it is the same one."""
    check_precision: Callable[[Precision, Machine], None] = _always
    """BackendError when a machine does not compute in a precision that it has, to build a bundle or to open one."""
    check_build: Callable[[Precision, Machine], None] = _always
    """BackendError when this machine cannot build, or not run and so not check, what would be built at a precision."""
    check_compile: Callable[[Precision], None] | None = None
    """BackendError when this machine cannot compile its parts ahead of time, at a precision; None: it has no `--compile`."""
    has_version_compatible: bool = False
    """Whether `--version-compatible` means something to it."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Precisions that it has on no machine, and why."""
    check_runs: Callable[[], None] = _always
    """BackendError when the library is here but opens nothing on this GPU; the check takes a second."""
    check_bundle: Callable[[Manifest, Machine], None] = _always
    """BundleError, with the cause and the cure, when a bundle does not fit this machine, whose device is of the right kind."""

    exact_rows_on_cpu: bool = False
    """Whether a row in float32 on a CPU must not depend, bit for bit, on its batch."""
    parallel_decode_on_gpu: bool = False
    """Whether decoding on a GPU may run in parallel with other calls, because parts have streams of their own."""
    weight_bytes: Mapping[Precision, int] = field(default_factory=lambda: {"fp32": 4, "fp16": 2, "bf16": 2})
    """Bytes of a weight in its files, in every precision that it has."""
    files_per_bucket: bool = False
    """Whether the file of every bucket holds the weights again."""
    memory_per_bucket: bool = True
    """Whether every bucket that is ready holds the weights again."""

    def __post_init__(self) -> None:
        assert (self.graph is None) != (self.save is None)

    def import_modules(self) -> None:
        """Before anything else of the backend's; BackendError says what to install when a library is missing."""
        for module in self.telemetry:
            sys.modules.setdefault(module, None)  # type: ignore[arg-type]  # an import of it now fails
        try:
            for module in self.modules:
                importlib.import_module(module)
        except ImportError as error:
            raise self._lacks_module(error) from None

    def _lacks_module(self, error: ImportError) -> BackendError:
        return BackendError(f"backend '{self.name}' needs '{error.name}', which is not here: {install(self.extra)}")

    def precision_of(self, manifest: Manifest, part: str) -> Precision:
        """A part's own: int8 and fp8 are the denoiser's alone."""
        if manifest.precision not in self.rest:
            return manifest.precision
        done = manifest.quantization
        rounded = {done.part} if done else {denoiser.name for denoiser in manifest.model.denoisers}
        return manifest.precision if part in rounded else self.rest[manifest.precision]

    def graph_precision(self, precision: Precision) -> Precision:
        """That of the graphs that a bundle is made of."""
        assert self.graph
        made_of = self.rest.get(precision, precision)
        return "fp32" if made_of in self.graph.as_float32 else made_of

    def machine(self, device: Device = DEFAULT_DEVICE) -> Machine:
        """Where it would run here; BackendError where there is a GPU and its library is missing."""

        def uses_gpu() -> bool:
            try:
                return self.uses_gpu()
            except ImportError as error:
                raise self._lacks_module(error) from None

        return this_machine(uses_gpu, device.gpu_index)

    def check_computes(self, precision: Precision, here: Machine) -> None:
        """BackendError where it has no such precision, or not on this machine."""
        if reason := self.lacks.get(precision):
            raise BackendError(f"--precision {precision}: {reason}")
        if precision not in self.weight_bytes:
            raise BackendError(f"--precision {precision}: backend '{self.name}' does not have it; take fp32")
        self.check_precision(precision, here)

    def idle_gpu(self, device: Device = DEFAULT_DEVICE) -> str | None:
        """Why it leaves a GPU alone that is here, and the cure; None where it does not, or there is none."""
        here, with_gpu = self.machine(device), this_machine(lambda: True, device.gpu_index)
        if self.gpu_extra is None or here.device == with_gpu.device:
            return None
        return f"{self.name} as installed runs on CPUs alone: uninstall it, then {install(self.gpu_extra)}"

    def check_machine(self, manifest: Manifest, device: Device = DEFAULT_DEVICE) -> None:
        """BundleError, with the cause and the cure, when a bundle was made for another machine or kind of device."""
        here, made = self.machine(device), manifest.machine
        if device.cores and made.device == "cuda":
            raise BundleError(f"the bundle was made for a GPU ({made.processor}), and {device.name} is not one; {REBUILD}")
        if device.gpu is not None and made.device == "cpu":
            raise BundleError(
                f"the bundle was made for a CPU, and {device.name} is not one; give --device as cpu:CORES, or {REBUILD}"
            )
        if made.device == "cuda" and here.device == "cpu":
            reason = self.idle_gpu(device) or f"there is none here; {REBUILD}"
            raise BundleError(f"the bundle was made for a GPU ({made.processor}), and {reason}")
        if made.device == "cpu" and here.device == "cuda":  # a CPU's bundle runs on the CPU where there is a GPU too
            here = this_machine(lambda: False)
        try:
            self.check_computes(manifest.precision, here)
        except BackendError as error:
            raise BundleError(f"the bundle does not fit this machine: {error}") from None
        self.check_bundle(manifest, here)


EXPORTERS = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
"""Distributions whose versions count in the fingerprint of every bundle."""


def _export_onnx(model: "TorchModel", part: "Part", folder: Path, *, size: Size, precision: Precision = "fp32") -> None:
    from flashdiff.engines.export import export_onnx

    export_onnx(model, part, folder, size=size, precision=precision)


ONNX = GraphForm(name="ONNX", file="model.onnx", packages=EXPORTERS, export=_export_onnx)
