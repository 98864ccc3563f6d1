"""What needs an NVIDIA GPU: captured CUDA graphs, TensorRT and ONNX Runtime's CUDA provider. Run with -m gpu."""

from pathlib import Path

import numpy as np
import pytest

from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import BackendName
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.generate import check_order, generate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("backend", "module"),
    [("torch", "torch"), ("onnxruntime", "onnxruntime"), ("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")],
)
def test_a_bundle_passes_the_gate_on_the_gpu_and_repeats_itself(
    tiny_base: Path, tmp_path: Path, backend: BackendName, module: str, precision: str
) -> None:
    pytest.importorskip(module)
    options = BuildOptions(base=str(tiny_base), out=tmp_path / "b", backend=backend, precision=precision, batch_sizes=(2, 4))
    manifest = build_engine(options, print)  # verified against torch, graphs captured and replayed
    assert manifest.machine.device == "cuda"
    engine = open_bundle(tmp_path / "b")
    orders = [check_order(engine.spec, prompt=f"prompt {index}", seed=index, steps=2) for index in range(2)]
    for first, second in zip(generate(engine, orders), generate(engine, orders), strict=True):
        np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("backend", ["torch", "tensorrt"])
def test_outputs_of_a_replayed_graph_belong_to_the_caller(tiny_base: Path, tmp_path: Path, backend: BackendName) -> None:
    pytest.importorskip(backend)
    build_engine(BuildOptions(base=str(tiny_base), out=tmp_path / "b", backend=backend, batch_sizes=(2,)), print)
    engine = open_bundle(tmp_path / "b")
    latents = np.random.default_rng(0).standard_normal((2, *engine.spec.latent_shape(engine.spec.sizes[0])), dtype=np.float32)
    first = engine.decode(latents)
    kept = first.copy()
    engine.decode(-latents)
    np.testing.assert_array_equal(first, kept)
