"""A backend is its record: one that nothing else has heard of builds, serves and is refused like the others."""

import io
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from PIL import Image
from served import serving

from flashdiff import cli
from flashdiff.engines import backends
from flashdiff.engines.backends import base, openvino
from flashdiff.engines.backends.base import ONNX, Backend, CompiledPart, CompilePart
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import Machine, Manifest, Precision, read_manifest
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.runtime import machine
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import BackendError
from flashdiff.generate import generate
from flashdiff.lora import load_fused
from flashdiff.server.client import Client
from flashdiff.server.models import Model, ModelIdentity, Models
from flashdiff.tasks import check_order


def _open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
    """ONNX's own interpreter, in numpy."""

    def compile_part(part: str, file: Path, dimensions: Mapping[str, int]) -> CompiledPart:
        evaluator = ReferenceEvaluator(onnx.load(file))
        names = [spec.name for spec in manifest.parts[part].outputs]

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            return dict(zip(names, evaluator.run(names, dict(inputs)), strict=True))

        return run

    return compile_part


def _check_build(precision: Precision, here: Machine) -> None:
    if precision != "fp32":
        raise BackendError(f"--precision {precision}: numpy on {here.device} takes fp32")


RECORDS = (
    Backend(
        name="numpy",
        extra="distill",
        modules=("onnx",),
        packages=("numpy",),
        graph=ONNX,
        open_parts=_open_parts,
        check_build=_check_build,
    ),
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "numpy", __name__)


@pytest.fixture
def bundle(tiny_base: Path, flash_lora: Path, tmp_path: Path) -> Path:
    loras = ((str(flash_lora), 1.0),)
    build_engine(BuildOptions(base=str(tiny_base), loras=loras, out=tmp_path / "b", backend="numpy", batch_sizes=(1,)), print)
    return tmp_path / "b"


def test_a_backend_of_one_file_builds_and_serves(bundle: Path, tiny_base: Path, flash_lora: Path) -> None:
    assert read_manifest(bundle).library_versions["numpy"] == np.__version__
    _, model = load_fused(str(tiny_base), [(flash_lora, 1.0)], None)
    engine = open_bundle(bundle)
    served = Model(ModelIdentity("tiny", "", engine.spec.family, "numpy", "fp32"), engine, engine.measure_costs())
    with serving(FakeComponents(), models=Models({"tiny": served})) as running, Client(running.address) as client:
        result = client.generate("a dog", seed=3)
    assert result.model.backend == "numpy"
    expected = generate(model, [check_order(model.spec, prompt="a dog", seed=3)])[0][0]
    assert np.abs(np.asarray(Image.open(io.BytesIO(result.images[0])), dtype=int) - expected).max() <= 1


def test_it_gets_the_gpu_that_each_engine_is_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, opened = [Device(name=f"cuda:{gpu}", gpu=gpu) for gpu in (0, 2)], list[Device]()
    manifest = read_manifest(bundle)
    expected = generate(open_bundle(bundle), [check_order(manifest.model, prompt="a dog", seed=3, steps=1)])

    def open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
        opened.append(device)
        return _open_parts(folder, manifest, device)

    on_gpu = replace(RECORDS[0], uses_gpu=lambda: True, open_parts=open_parts)
    monkeypatch.setattr(sys.modules[__name__], "RECORDS", (on_gpu,))
    monkeypatch.setattr(machine, "nvidia_gpu", lambda index: (f"GPU {index}", "sm_90"))
    assert [on_gpu.machine(device).processor for device in devices] == ["GPU 0", "GPU 2"]
    made_there = manifest.model_copy(update={"machine": manifest.machine.model_copy(update={"device": "cuda"})})
    for device in devices:
        engine = Engine(bundle, made_there, device=device)
        made = generate(engine, [check_order(engine.spec, prompt="a dog", seed=3, steps=1)])
        np.testing.assert_array_equal(made[0], expected[0])
    assert opened == devices


def test_the_command_line_offers_it_and_it_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build-engine", "avatars", "--backend", "numpy", "--precision", "bf16", "--out", str(tmp_path / "b")]) == 2
    assert "--precision bf16: numpy on cpu takes fp32" in capsys.readouterr().err


def test_a_machine_names_every_feature_that_a_precision_may_need() -> None:
    needed = {feature for features in openvino._CPU_FEATURES.values() for feature in features} | {*base._INT8_FEATURES}
    assert needed <= {*machine._CPU_FEATURES}
