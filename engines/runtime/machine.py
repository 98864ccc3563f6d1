"""What this machine is: its processor and what that can do, or its NVIDIA GPU."""

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flashdiff.engines.bundle import Machine

_CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_bf16",
    "amx_fp16",
    "amx_int8",
    "asimd",
    "asimddp",
    "asimdhp",
    "sve",
    "bf16",
)


def this_machine(uses_gpu: Callable[[], bool], gpu_index: int = 0) -> Machine:
    """Where a library runs here: on that GPU if there is one and `uses_gpu` agrees (only then is it called), else on the CPU."""
    system = f"{platform.system()} {platform.machine()}"
    gpu = nvidia_gpu(gpu_index)
    if gpu and uses_gpu():
        return Machine(system=system, processor=gpu[0], device="cuda", features=(gpu[1],))
    flags = _cpu_info("flags", "Features").split()
    features = tuple(name for name in _CPU_FEATURES if name in flags)
    processor = _cpu_info("model name") or platform.processor() or "unknown"
    return Machine(system=system, processor=processor, device="cpu", features=features)


@cache
def nvidia_gpu(index: int = 0) -> tuple[str, str] | None:
    """Name and compute capability (sm_89) of a GPU, from the driver itself; None where there is none."""
    driver = _driver()
    if driver is None:
        return None
    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    if (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device)
    ):
        return None
    return name.value.decode(), f"sm_{major.value}{minor.value}"


def count_gpus() -> int:
    """The NVIDIA GPUs that this process may use, by the driver's count."""
    driver, count = _driver(), ctypes.c_int()
    return count.value if driver is not None and not driver.cuDeviceGetCount(ctypes.byref(count)) else 0


def _driver() -> ctypes.CDLL | None:
    """The driver's library, initialised; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


@cache
def _cpu_info(*names: str) -> str:
    """The first line of /proc/cpuinfo with one of these names; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in pairs if name.strip() in names), "")
