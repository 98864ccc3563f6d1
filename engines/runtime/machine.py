"""The machine: what its processor can do, whether it has an NVIDIA GPU, and whether a bundle fits it."""

import ctypes
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

from flashdiff.engines.bundle import BackendName, Machine, Manifest, Precision
from flashdiff.errors import BackendError, BundleError

_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")
_LOW_PRECISION_CPU: dict[Precision, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}
"""Any of these makes a precision worth naming; without one a CPU library would compute in float32 and not say so."""


def this_machine(backend: BackendName) -> Machine:
    """Where this backend would run here."""
    system = f"{platform.system()} {platform.machine()}"
    gpu = nvidia_gpu()
    if gpu and _uses_gpu(backend):
        return Machine(system=system, processor=gpu[0], device="cuda", features=(gpu[1],))
    flags = _cpu_info("flags", "Features").split()
    features = tuple(name for name in _CPU_FEATURES if name in flags)
    processor = _cpu_info("model name") or platform.processor() or "unknown"
    return Machine(system=system, processor=processor, device="cpu", features=features)


def _uses_gpu(backend: BackendName) -> bool:
    """Whether the backend's library, as installed, runs on a GPU that is there."""
    if backend == "torch":
        import torch

        return torch.cuda.is_available()
    if backend == "onnxruntime":
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return backend.startswith("tensorrt")


def check_backend(backend: BackendName, precision: Precision) -> None:
    """BackendError when this machine cannot run, and so not check, what would be built."""
    machine = this_machine(backend)
    if backend.startswith("tensorrt") and machine.device == "cpu":
        raise BackendError(
            f"--backend {backend}: there is no NVIDIA GPU here to check the engine on, and nothing is published unchecked; "
            "build where it will serve, or take openvino"
        )
    if backend == "onnxruntime" and precision == "bf16" and machine.device == "cpu":
        raise BackendError("--precision bf16: ONNX Runtime has no bfloat16 convolutions on CPUs; take fp32, or openvino")
    if backend == "openvino" and precision != "fp32" and not set(_LOW_PRECISION_CPU[precision]) & set(machine.features):
        raise BackendError(
            f"--precision {precision}: this processor has no such arithmetic (none of "
            f"{', '.join(_LOW_PRECISION_CPU[precision])}), OpenVINO would compute in float32; take fp32"
        )


def check_runs(backend: BackendName) -> None:
    """BackendError when the backend's library is here but opens nothing on this GPU, which takes it a second to find out."""
    if backend.startswith("tensorrt"):
        from flashdiff.engines.runtime.tensorrt_build import check_opens

        check_opens(backend)


def check_machine(manifest: Manifest) -> None:
    """BundleError, with the cause and the cure, when a bundle was made for another machine."""
    here, made = this_machine(manifest.backend), manifest.machine
    rebuild = "build it on this one with `flashdiff build-engine`"
    if made.device == "cuda" and here.device == "cpu":
        raise BundleError(f"the bundle was made for a GPU ({made.processor}), and there is none here; {rebuild}")
    if manifest.backend.startswith("tensorrt"):
        for what, then, now in (("system", made.system, here.system), ("GPU generation", made.features, here.features)):
            if then != now:
                raise BundleError(f"the plans were made for {what} {_text(then)}, this machine has {_text(now)}; {rebuild}")
        _check_version(manifest, rebuild)
    if manifest.backend == "openvino" and manifest.precision != "fp32":
        try:
            check_backend(manifest.backend, manifest.precision)
        except BackendError as error:
            raise BundleError(f"the bundle does not fit this machine: {error}") from None


def _check_version(manifest: Manifest, rebuild: str) -> None:
    package = "tensorrt" if manifest.backend == "tensorrt" else "tensorrt-rtx-cu13"
    then = manifest.library_versions.get(package)
    try:
        now = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        now = None
    if now and then and now != then and not manifest.version_compatible:
        raise BundleError(f"the plans were made with {package} {then}, here is {now}; install that version, or {rebuild}")


def _text(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else ", ".join(value) or "none"


@cache
def nvidia_gpu() -> tuple[str, str] | None:
    """Name and compute capability (sm_89) of the first GPU, asked of the driver itself; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device)
    ):
        return None
    return name.value.decode(), f"sm_{major.value}{minor.value}"


@cache
def _cpu_info(*names: str) -> str:
    """The first line of /proc/cpuinfo with one of these names; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in pairs if name.strip() in names), "")
