"""int8 and fp8 for GPUs: rounded graphs and layers against arithmetic of their own, and what is refused where."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gpus import made_on_gpu
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from flashdiff.engines.backends import find_backend
from flashdiff.engines.backends import torch as on_torch
from flashdiff.engines.backends.tensorrt_quantizer import quantize
from flashdiff.engines.backends.torch_fp8 import round_linears
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import Precision, read_manifest
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import BackendError, BundleError

Kind = Literal["int8", "fp8"]
Arrays = Mapping[str, NDArray[Any]]
LARGEST = {"int8": 127, "fp8": 448}


# --- graphs for TensorRT ---

INPUTS = {"narrow": (3, 5, 5), "conv": (16, 5, 5), "product": (4, 16), "gemm": (32,)}
"""The shape of a row, by the layer that reads it."""
WEIGHTS = {"narrow": (16, 3, 1, 1), "conv": (16, 16, 3, 3), "product": (16, 32), "gemm": (48, 32)}
OUTPUT_AXES = {"narrow": 0, "conv": 0, "product": 1, "gemm": 0}
COMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "narrow": functional.conv2d,
    "conv": lambda x, weight: functional.conv2d(x, weight, padding=1),
    "product": torch.matmul,
    "gemm": functional.linear,
}


def _write(path: Path, dtype: Any) -> Arrays:
    """A graph in a precision of a layer of each kind, and a product without weights; returns the weights."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape).astype(dtype) for name, shape in WEIGHTS.items()}
    weights["conv"] *= np.logspace(-2, 0, 16).astype(dtype)[:, None, None, None]  # so that a scale a channel matters
    kinds = {"narrow": "Conv", "conv": "Conv", "product": "MatMul", "gemm": "Gemm"}
    settings: dict[str, Any] = {"conv": {"pads": [1, 1, 1, 1]}, "gemm": {"transB": 1}}
    nodes = []
    for name, kind in kinds.items():
        nodes += [
            helper.make_node("Cast", [f"{name}_in"], [f"{name}_x"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
            helper.make_node(kind, [f"{name}_x", f"{name}_weight"], [f"{name}_y"], name, **settings.get(name, {})),
        ]
    nodes += [
        helper.make_node("Transpose", ["product_y"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["product_y", "turned"], ["attention_y"], "attention"),
        *(helper.make_node("Cast", [f"{name}_y"], [name], to=TensorProto.FLOAT) for name in (*kinds, "attention")),
    ]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info(f"{name}_in", TensorProto.FLOAT, ["batch", *shape]) for name, shape in INPUTS.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*kinds, "attention")],
        [numpy_helper.from_array(values, f"{name}_weight") for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return weights


def _rows(dtype: Any) -> list[dict[str, NDArray[np.float32]]]:
    """Rows of inputs that a precision holds exactly."""
    random = np.random.default_rng(1)
    return [
        {f"{name}_in": random.standard_normal((1, *shape)).astype(dtype).astype(np.float32) for name, shape in INPUTS.items()}
        for _ in range(4)
    ]


def _run(graph: Path, row: Arrays) -> dict[str, NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, dict(row)), strict=True))


def _rounded(values: NDArray[Any], kind: Kind, dtype: Any, largest: Any) -> Tensor:
    """What rounding leaves of values; `largest` is one number, or has an axis for each of theirs."""
    scale = np.asarray(largest / LARGEST[kind]).astype(dtype).astype(np.float32)
    steps = (values.astype(np.float32) / scale).clip(-LARGEST[kind], LARGEST[kind])
    return torch.from_numpy((steps.round() if kind == "int8" else steps.astype(float8_e4m3fn).astype(np.float32)) * scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_with_weights_compute_with_what_rounding_leaves(tmp_path: Path, kind: Kind, dtype: Any) -> None:
    weights, rows = _write(tmp_path / "plain.onnx", dtype), _rows(dtype)
    noise = quantize(kind, tmp_path / "plain.onnx", tmp_path / "rounded.onnx", rows, ())
    # Products of activations stay as they are, and in fp8 three channels, which its kernels do not take.
    assert {*noise} == {"conv", "product", "gemm", *(["narrow"] if kind == "int8" else [])}
    assert 0 < min(noise.values()) <= max(noise.values()) < 0.05
    got, plain = _run(tmp_path / "rounded.onnx", rows[0]), _run(tmp_path / "plain.onnx", rows[0])
    for name, weight in weights.items():
        if name not in noise:
            np.testing.assert_array_equal(got[name], plain[name])
            continue
        seen = max(np.abs(row[f"{name}_in"]).max() for row in rows)
        others = tuple(axis for axis in range(weight.ndim) if axis != OUTPUT_AXES[name])
        largest = np.abs(weight.astype(np.float32)).max(axis=others if kind == "int8" else None, keepdims=kind == "int8")
        expected = COMPUTED[name](_rounded(rows[0][f"{name}_in"], kind, dtype, seen), _rounded(weight, kind, dtype, largest))
        tolerance = 1e-5 if dtype == np.float32 else 1e-2
        np.testing.assert_allclose(got[name], expected.numpy(), rtol=tolerance, atol=tolerance)
        assert np.abs(got[name] - plain[name]).max() > 3 * tolerance


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_that_are_kept_read_and_hold_what_they_did(tmp_path: Path, kind: Kind) -> None:
    _write(tmp_path / "plain.onnx", np.float16)
    rows, target = _rows(np.float16), tmp_path / "rounded.onnx"
    noise = quantize(kind, tmp_path / "plain.onnx", target, rows, ["conv", "gemm"])
    assert {"conv", "gemm", "product"} & {*noise} == {"product"}
    got, plain = _run(target, rows[0]), _run(tmp_path / "plain.onnx", rows[0])
    for name in ("conv", "gemm"):
        np.testing.assert_array_equal(got[name], plain[name])
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(target).graph.initializer}
    assert stored["conv_weight"] == TensorProto.FLOAT16
    assert "product_weight" not in stored  # it is there rounded alone
    assert stored["product_weight_rounded"] == {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[kind]

    # The same again gives the same bytes in the place of those before.
    before = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    quantize(kind, tmp_path / "plain.onnx", target, rows, ["conv", "gemm"])
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == before


def test_activations_of_zero_stay_finite(tmp_path: Path) -> None:
    _write(tmp_path / "plain.onnx", np.float16)
    rows = [{name: np.zeros_like(values) for name, values in row.items()} for row in _rows(np.float16)]
    for kind in ("int8", "fp8"):
        quantize(kind, tmp_path / "plain.onnx", tmp_path / "rounded.onnx", rows, ())
        assert all(np.isfinite(values).all() for values in _run(tmp_path / "rounded.onnx", _rows(np.float16)[0]).values())


def test_a_graph_that_cannot_be_rounded_is_named(tmp_path: Path) -> None:
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "denoiser" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match="denoiser cannot be rounded to fp8: "):
        quantize("fp8", tmp_path / "denoiser" / "model.onnx", tmp_path / "denoiser" / "rounded.onnx", [], ())


# --- fp8 in torch ---


def test_linear_layers_multiply_in_fp8_row_by_row() -> None:
    torch.manual_seed(0)
    network = nn.ModuleDict({"layer": nn.Linear(32, 48), "narrow": nn.Linear(3, 48), "other": nn.Linear(32, 48)})
    weight, bias = network["layer"].weight.detach().clone(), network["layer"].bias.detach().clone()
    network["layer"].register_forward_hook(lambda *_: hooked.append(True))
    hooked: list[bool] = []
    round_linears(network, ["layer", "narrow"])
    for parameter in network.parameters():  # as for every part
        parameter.data = parameter.data.to(torch.bfloat16)
    x = torch.randn(5, 7, 32, dtype=torch.bfloat16) * torch.logspace(-3, 2, 7, dtype=torch.bfloat16)[:, None]
    with torch.no_grad():
        made = network["layer"](x)
    assert made.dtype == torch.bfloat16
    assert hooked  # what is added to the layer's outputs, as LoRA slots do, still is

    def left(values: Tensor) -> Tensor:
        largest = values.abs().amax(-1, keepdim=True).numpy()
        return _rounded(values.numpy(), "fp8", np.float32, largest)

    expected = left(x.float()) @ left(weight).T + bias
    torch.testing.assert_close(made.float(), expected, rtol=1e-2, atol=1e-2)
    exact = x.float() @ weight.T + bias
    error = (made.float() - exact).square().mean() / exact.square().mean()
    assert 1e-4 < error.sqrt() < 5e-2
    for row in range(5):  # whatever else is in the batch
        with torch.no_grad():
            torch.testing.assert_close(network["layer"](x[row : row + 1]), made[row : row + 1], rtol=0, atol=0)
    assert type(network["narrow"]) is type(network["other"]) is nn.Linear


def test_a_network_without_layers_for_fp8_is_refused() -> None:
    with pytest.raises(BackendError, match="no layer has sides that are multiples of 16, as fp8 needs; take bf16"):
        round_linears(nn.ModuleDict({"layer": nn.Linear(8, 8)}), ["layer"])


@pytest.mark.parametrize("model", ["tiny", pytest.param("avatars", marks=pytest.mark.long)])
def test_a_torch_bundle_in_fp8_passes_the_gate_and_holds_bfloat16(
    model: str, tiny_base: Path, flash_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where torch computes the same products, only slowly; so its check is left out."""
    monkeypatch.setattr(on_torch, "RECORDS", tuple(replace(r, check_precision=lambda *_: None) for r in on_torch.RECORDS))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    tiny = {"base": str(tiny_base), "loras": ((str(flash_lora), 1.0),), "calibration_prompts": prompts, "compare_stock": False}
    given = tiny if model == "tiny" else {"base": "avatars", "loras": (("avatars-flash", 1.0),)}
    options = {**given, "backend": "torch", "precision": "fp8", "batch_sizes": (1, 2), "out": tmp_path / "b"}
    manifest = build_engine(BuildOptions.model_validate(options), print)
    assert manifest.quality
    assert 20 < manifest.quality.psnr < 99
    assert manifest.max_error_allowed["denoiser"] > manifest.max_error_allowed["decoder"] == 2e-1
    assert manifest.max_error["denoiser"] > 1e-3
    assert manifest.quantization is None
    stored = load_file(tmp_path / "b" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.bfloat16}

    # The denoiser multiplies in fp8, and nothing else does.
    calls: list[Any] = []
    multiply = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *given, **settings: calls.append(given) or multiply(*given, **settings))
    engine = open_bundle(tmp_path / "b")
    latents = np.zeros((1, *engine.spec.latent_shape(engine.spec.sizes[0])), dtype=np.float32)
    states = engine.call("text_encoder", engine.tokenize(["a dog"]))
    engine.call("decoder", {"latents": latents})
    assert not calls
    engine.call("denoiser", {"latents": latents, "times": np.array([999]), **states})
    assert len(calls) > 10


# --- what is refused where ---


@pytest.mark.parametrize("backend", ["torch", "tensorrt", "tensorrt-rtx"])
def test_gpus_before_fp8_are_refused_when_building_and_when_opening(
    student_bundle: Path,
    on_gpu: Callable[[str], None],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    on_gpu("sm_86")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = "--precision fp8: it needs an NVIDIA GPU of compute capability 8.9 or later, and this is sm_86; take bf16 or fp16"
    with pytest.raises(BackendError, match=reason):
        plan_build(BuildOptions(base=str(tiny_base), backend=backend, precision="fp8", out=tmp_path / "b"))
    with pytest.raises(BundleError, match=f"the bundle does not fit this machine: {reason}"):
        find_backend(backend).check_machine(made_on_gpu(student_bundle, backend, "fp8"))
    for generation in ("sm_89", "sm_90", "sm_100", "sm_120"):
        on_gpu(generation)
        find_backend(backend).check_machine(made_on_gpu(student_bundle, backend, "fp8", generation))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_manifest_in_a_precision_that_its_backend_lacks_is_refused(student_bundle: Path, backend: str) -> None:
    manifest = read_manifest(student_bundle).model_copy(update={"backend": backend, "precision": "fp8"})
    with pytest.raises(BundleError, match="the bundle does not fit this machine: --precision fp8: no CPU computes in fp8"):
        find_backend(backend).check_machine(manifest)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_plans_of_another_generation_are_refused(
    student_bundle: Path, on_gpu: Callable[[str], None], precision: Precision
) -> None:
    on_gpu("sm_120")
    with pytest.raises(BundleError, match="the plans were made for GPU generation sm_89, this machine has sm_120; build it on"):
        find_backend("tensorrt-rtx").check_machine(made_on_gpu(student_bundle, "tensorrt-rtx", precision))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_tensorrt_needs_prompts_and_onnx_runtime_to_calibrate(
    tiny_base: Path, on_gpu: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    on_gpu("sm_89")
    record = find_backend("tensorrt-rtx")
    monkeypatch.setattr("flashdiff.engines.backends.tensorrt.RECORDS", (replace(record, modules=(), check_runs=lambda: None),))
    options = BuildOptions(base=str(tiny_base), backend="tensorrt-rtx", precision=precision, out=tmp_path / "b")
    with pytest.raises(BundleError, match="need --calibration-prompts FILE for this base"):
        plan_build(options)
    plan = plan_build(options.model_copy(update={"base": "avatars"}))
    assert plan.inputs.calibration
    assert {*plan.inputs.library_versions} >= {"onnxruntime", "onnx"}
    half = plan_build(options.model_copy(update={"base": "avatars", "precision": "fp16"}))
    assert [export.key for export in plan.exports] == [export.key for export in half.exports]  # one export serves all three
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=rf"--precision {precision} needs 'onnxruntime' to calibrate.*pip install '\.\[cpu\]'"):
        plan_build(options)


def test_compiled_torch_has_no_fp8(
    on_gpu: Callable[[str], None], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu("sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendError, match="--compile: it was never tried in fp8; take bf16, or leave it out"):
        plan_build(BuildOptions(base=str(tiny_base), backend="torch", precision="fp8", compile=True, out=tmp_path / "b"))
