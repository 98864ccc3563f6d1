"""TensorRT-RTX plans in int8 and fp8, really built from graphs that passed the gate, on a machine without a GPU."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from gpus import build_rtx_plan, denoiser_of, needs_rtx
from tiny import MODELS, STUDENTS

from flashdiff import cli
from flashdiff.engines.backends import find_backend, tensorrt
from flashdiff.engines.backends.base import CompiledPart, CompilePart, Export
from flashdiff.engines.backends.tensorrt import compile_graph
from flashdiff.engines.backends.tensorrt_quantizer import quantize
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import BackendName, BuildInputs, Manifest, PartFile, PartRecord, Precision
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.reference import sample_image
from flashdiff.engines.runtime import machine
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.verify import PART_ERROR
from flashdiff.errors import BundleError


@pytest.mark.long
@needs_rtx
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("family", [*MODELS, *STUDENTS])
def test_every_family_becomes_a_rounded_plan(
    family: str, kind: Literal["int8", "fp8"], family_bundle: Callable[[str, BackendName], Path], tmp_path: Path
) -> None:
    bundle = family_bundle(family, "onnxruntime")
    graph, shapes = denoiser_of(bundle)
    seen = list[dict[str, np.ndarray]]()
    engine = open_bundle(bundle)
    call = engine.call

    def watched(part: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if part == "denoiser":
            seen.append({name: values[:1] for name, values in inputs.items()})
        return call(part, inputs)

    engine.call = watched  # type: ignore[method-assign]
    sample_image(engine, engine.spec, engine.spec.sizes[0])
    noise = quantize(kind, graph, tmp_path / "model.onnx", seen, ())
    assert len(noise) > 3
    build_rtx_plan(tmp_path / "model.onnx", shapes, tmp_path / "unet.plan")
    assert (tmp_path / "unet.plan").stat().st_size > 100_000


@pytest.fixture
def without_running(on_gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TensorRT-RTX as on a machine with a GPU, but that ONNX Runtime runs the graphs that its plans are built from."""
    graphs = tmp_path / "graphs"
    record = find_backend("tensorrt-rtx")

    def kept(
        part: PartRecord, export: Export, inputs: BuildInputs, folder: Path, report: Callable[[str], None]
    ) -> list[PartFile]:
        shutil.copytree(folder, graphs / export.part)
        return compile_graph(part, export, inputs, folder, report)

    def open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
        on_cpu = {"backend": "onnxruntime", "precision": "fp16", "machine": machine.this_machine(lambda: False)}
        compile_part = find_backend("onnxruntime").open_parts(folder, manifest.model_copy(update=on_cpu), device)

        def compile_graph_of(name: str, file: Path, dimensions: Mapping[str, int]) -> CompiledPart:
            assert file.stat().st_size > 10_000
            return compile_part(name, graphs / name / "model.onnx", dimensions)

        return compile_graph_of

    there = replace(record, modules=(), check_runs=lambda: None, compile_graph=kept, open_parts=open_parts)
    on_gpu("sm_89")
    monkeypatch.setattr(tensorrt, "RECORDS", (there,))


@needs_rtx
@pytest.mark.usefixtures("without_running")
@pytest.mark.parametrize("model", [pytest.param("tiny", marks=pytest.mark.slow), pytest.param("avatars", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounded_plans_are_built_from_graphs_that_pass_the_gate(
    model: str, kind: Precision, tiny_base: Path, flash_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    tiny = {"base": str(tiny_base), "loras": ((str(flash_lora), 1.0),), "calibration_prompts": prompts, "compare_stock": False}
    options = BuildOptions.model_validate(
        (tiny if model == "tiny" else {"base": "avatars", "loras": (("avatars-flash", 1.0),)})
        | {"backend": "tensorrt-rtx", "precision": kind, "batch_sizes": (1,), "out": tmp_path / "b"}
    )
    manifest = build_engine(options, print)
    done = manifest.quantization
    assert done
    assert (done.part, done.kept, done.tries) == ("denoiser", (), 1)
    assert done.layers > 10
    assert {file.file for part in manifest.parts.values() for file in part.files} == {*manifest.files} - {
        name for name in manifest.files if name.startswith("tokenizers/")
    }
    assert manifest.max_error_allowed["denoiser"] > manifest.max_error_allowed["decoder"] == 2e-2
    assert 1e-3 < manifest.max_error["denoiser"] < 1
    assert manifest.quality
    assert manifest.quality.psnr > 30
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert f"denoiser: {done.layers} layers in {kind}, after the first try" in shown
    if model != "tiny":
        with capsys.disabled():
            print(shown)  # the figures of docs/engines.md
        return

    # A gate that nothing passes is met by fewer and fewer layers, and no plan is built.
    said: list[str] = []
    monkeypatch.setitem(PART_ERROR, kind, 1e-9)
    prompts.write_text("a dog\n")
    with pytest.raises(BundleError, match=r"denoiser differs from torch by .* with half of its layers in fp16 too"):
        build_engine(options, said.append)
    assert sum("layers in fp16" in line for line in said) == 3
    assert not any(line.startswith("compile") for line in said)
