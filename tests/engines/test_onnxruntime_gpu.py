"""ONNX Runtime's CUDA provider: what is asked of a library that is installed for GPUs, and what is said where none is."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from gpus import made_on_gpu
from numpy.typing import NDArray

from flashdiff.engines.backends import find_backend
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.describe import describe
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import Engine
from flashdiff.errors import BackendError, BundleError

Arrays = Mapping[str, NDArray[Any]]


class _Session:
    """What a library that is built for GPUs does: it leaves a provider out that does not start."""

    starts = True
    asked: list[Any]

    def __init__(self, file: str, options: Any, providers: list[Any]) -> None:
        type(self).asked = providers

    def get_providers(self) -> list[str]:
        names = [name if isinstance(name, str) else name[0] for name in self.asked]
        return names if self.starts else names[-1:]

    def run(self, names: list[str], inputs: Arrays) -> list[NDArray[np.float32]]:
        return [np.zeros((len(next(iter(inputs.values()))), 4, 8, 8), dtype=np.float32) for _ in names]


@pytest.fixture
def for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu in the place of onnxruntime."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", _Session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)


@pytest.mark.usefixtures("for_gpus")
def test_onnx_runtime_for_gpus_runs_a_bundle_on_the_gpu(
    teacher_bundle: Path, on_gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu("sm_80")
    backend = find_backend("onnxruntime")
    assert backend.machine().device == "cuda"
    assert backend.idle_gpu() is None
    engine = Engine(teacher_bundle, made_on_gpu(teacher_bundle, "onnxruntime", "fp16", "sm_80"))
    latents = np.zeros((2, 4, 8, 8), dtype=np.float32)
    engine.call("decoder", {"latents": latents})
    assert _Session.asked == [("CUDAExecutionProvider", {"device_id": 0, "use_tf32": 0}), "CPUExecutionProvider"]

    # It would run on the CPU, thirty times as slowly, when the libraries of CUDA are missing.
    monkeypatch.setattr(_Session, "starts", False)
    engine = Engine(teacher_bundle, made_on_gpu(teacher_bundle, "onnxruntime", "fp16", "sm_80"))
    with pytest.raises(BackendError, match=r"its CUDA provider did not start; .* pip install '\.\[onnxruntime-gpu\]'"):
        engine.call("decoder", {"latents": latents})

    # A bundle of a CPU stays on the CPU.
    monkeypatch.setattr(_Session, "starts", True)
    Engine(teacher_bundle, read_manifest(teacher_bundle)).call("decoder", {"latents": latents})
    assert _Session.asked == ["CPUExecutionProvider"]


def test_a_gpu_whose_library_is_missing_is_one_line(
    teacher_bundle: Path,
    on_gpu: Callable[[str], None],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu("sm_80")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    missing = r"backend 'onnxruntime' needs 'onnxruntime', which is not here: pip install"
    manifest = made_on_gpu(teacher_bundle, "onnxruntime", "fp16", "sm_80")
    with pytest.raises(BackendError, match=missing):
        find_backend("onnxruntime").check_machine(manifest)
    with pytest.raises(BackendError, match=missing):
        plan_build(BuildOptions(base=str(tiny_base), backend="onnxruntime", out=tmp_path / "b"))
    assert any(line.startswith("fits here    no: backend 'onnxruntime' needs") for line in describe(teacher_bundle, manifest))


def test_onnx_runtime_for_cpus_says_what_to_install_for_a_gpu(
    teacher_bundle: Path, on_gpu: Callable[[str], None], tiny_base: Path, tmp_path: Path
) -> None:
    backend, manifest = find_backend("onnxruntime"), made_on_gpu(teacher_bundle, "onnxruntime", "fp16")
    with pytest.raises(BundleError, match=r"made for a GPU \(Another GPU\), and there is none here; build it"):
        backend.check_machine(manifest)
    on_gpu("sm_80")
    cure = r"onnxruntime as installed runs on CPUs alone: uninstall it, then pip install '\.\[onnxruntime-gpu\]'"
    with pytest.raises(BundleError, match=rf"made for a GPU \(Another GPU\), and {cure}"):
        backend.check_machine(manifest)
    plan = plan_build(BuildOptions(base=str(tiny_base), backend="onnxruntime", out=tmp_path / "b"))
    assert plan.inputs.machine.device == "cpu"
    assert any("onnxruntime as installed runs on CPUs alone" in warning for warning in plan.warnings)
