"""Quantized engines: what is refused before any work, how a precision is chosen, and an int8 bundle built and run."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from flashdiff import cli
from flashdiff.engines import choose
from flashdiff.engines import quantize as quantize_module
from flashdiff.engines.backends import find_backend
from flashdiff.engines.backends.base import noise_rows
from flashdiff.engines.backends.openvino_quantizer import _layers
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import Manifest, Quality, read_manifest, write_manifest
from flashdiff.engines.calibration import MAX_PROMPTS, find_prompts, sample
from flashdiff.engines.choose import _ORDER, Candidate, best_of, choose_precision, plan_candidates
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.plan import plan_build
from flashdiff.engines.quality import _psnr
from flashdiff.engines.quantize import _noisiest, quantize_denoiser
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.verify import PART_ERROR
from flashdiff.errors import BackendError, BundleError
from flashdiff.evaluation.images import Prompt
from flashdiff.families import find_base
from flashdiff.families.files import base_hash
from flashdiff.files import new_folder
from flashdiff.lora import find_lora
from flashdiff.lora_files import FLASH

_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}


@pytest.mark.parametrize(
    ("backend", "precision", "reason"),
    [
        ("torch", "int8", "--precision int8: .*torchao's kernels are not tried"),
        ("torch", "fp8", "--precision fp8: it needs an NVIDIA GPU of compute capability 8.9 or later, and this is a CPU"),
        ("onnxruntime", "fp8", "--precision fp8: .*no CPU computes in fp8"),
        ("openvino", "fp8", "--precision fp8: .*no CPU computes in fp8"),
        ("tensorrt", "int8", "--backend tensorrt: there is no NVIDIA GPU here to check the engine on"),
        ("tensorrt-rtx", "fp8", "--backend tensorrt-rtx: there is no NVIDIA GPU here to check the engine on"),
    ],
)
def test_a_precision_that_a_backend_lacks_is_refused_with_the_reason(
    tiny_base: Path, tmp_path: Path, backend: str, precision: str, reason: str
) -> None:
    options = BuildOptions.model_validate(
        {"base": str(tiny_base), "out": tmp_path / "b", "backend": backend, "precision": precision}
    )
    with pytest.raises(BackendError, match=reason):
        plan_build(options)


@pytest.mark.usefixtures("any_processor")
def test_without_nncf_int8_is_refused_with_the_cure(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BackendError, match=r"needs 'nncf', which is not here: pip install '\.\[int8\]'"):
        plan_build(BuildOptions(base=str(tiny_base), backend="openvino", precision="int8", out=tmp_path / "b"))


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_processor_without_int8_is_refused(student_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("flashdiff.engines.runtime.machine._cpu_info", lambda *_: "avx2")
    backend = find_backend(name)
    with pytest.raises(BackendError, match="--precision int8: this processor has no such arithmetic"):
        backend.check_precision("int8", backend.machine())
    manifest = read_manifest(student_bundle).model_copy(update={"precision": "int8"})
    with pytest.raises(BundleError, match="the bundle does not fit this machine: --precision int8: this processor"):
        backend.check_machine(manifest)


def test_onnx_runtime_on_a_gpu_has_no_int8() -> None:
    backend = find_backend("onnxruntime")
    on_gpu = backend.machine().model_copy(update={"device": "cuda"})
    with pytest.raises(BackendError, match="--precision int8: ONNX Runtime's is for CPUs"):
        backend.check_precision("int8", on_gpu)


@pytest.mark.usefixtures("any_processor")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"prompts\.txt: No such file or directory; give a text file"),
        (b"", "the file holds no prompt; give one a line"),
        (b" \n\r\n\t\n", "the file holds no prompt; give one a line"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"a dog\n" + b"a" * 4_000_000 * 2, "larger than 4 MiB; give a text file"),
        (b"a dog\n" + b"a" * 40_000, "--calibration-prompts: prompt: 'aaa.*40000 characters are more than"),
        (b"\n".join(b"a dog %d" % number for number in range(MAX_PROMPTS + 1)), f"holds {MAX_PROMPTS + 1} prompts; give at most"),
    ],
)
def test_prompts_that_cannot_calibrate_are_refused(tiny_base: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    for precision in ("int8", "auto"):
        options = {"base": str(tiny_base), "backend": "onnxruntime", "precision": precision, "calibration_prompts": file}
        with pytest.raises(BundleError, match=message) as error:
            build_engine(BuildOptions.model_validate({**options, "out": tmp_path / "b"}), print)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("any_processor")
def test_a_prompt_of_too_many_tokens_is_refused_before_anything_is_run(tiny_base: Path, tmp_path: Path) -> None:
    file, said = tmp_path / "prompts.txt", list[str]()
    file.write_text("a dog\n" + "word " * 30)
    options = {"base": str(tiny_base), "backend": "onnxruntime", "precision": "int8", "calibration_prompts": file}
    with pytest.raises(
        BundleError, match=r"--calibration-prompts: 'word .*': it has \d+ tokens, at most 16 fit; shorten it in the"
    ):
        build_engine(BuildOptions.model_validate({**options, "out": tmp_path / "b"}), said.append)
    assert not any(line.startswith(("fuse", "run")) for line in said)


def test_layers_are_found_behind_nodes_that_only_rearrange() -> None:
    ov, ops = pytest.importorskip("openvino"), pytest.importorskip("openvino.opset13")
    given = ops.parameter([2, 4], np.float32)
    ends = (ops.constant(np.float32(value)) for value in (0, 1, 0, 1))
    rounded = ops.fake_quantize(given, *ends, levels=256)
    padded = ops.pad(rounded, np.array([0, 0]), np.array([1, 0]), "constant", ops.constant(np.float32(1)))  # Sana's attention
    product = ops.matmul(ops.broadcast(padded, np.array([1, 3, 4])), ops.constant(np.ones((4, 2), np.float32)), False, False)
    product.set_friendly_name("product")
    found = _layers(ov.Model([ops.result(product)], [given], "model"))
    assert {name: len(nodes) for name, nodes in found.items()} == {"product": 1}


def test_the_rows_of_the_noise_are_of_all_steps() -> None:
    rows = [{"times": np.array([time])} for _ in range(4) for time in (999, 749, 499, 249) for _ in range(8)]
    chosen = [int(row["times"][0]) for row in noise_rows(rows)]
    assert len(chosen) == 8
    assert {*chosen} == {999, 749, 499, 249}
    assert len(noise_rows(rows[:3])) == 3


def test_a_rounded_graph_of_values_that_are_not_finite_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def rounded(plain: Path, graph: Path, rows: object, kept: Any) -> dict[str, float]:
        tried.append(len(kept))
        return {f"layer {number}": number / 10 for number in range(10)}

    def errors(*_: object) -> Any:
        if tried[-1] < 3:
            raise BundleError("denoiser returned values that are not finite at batch 1; the bundle is not published")
        return SimpleNamespace(flaw=lambda _: None)

    backend = SimpleNamespace(quantize={"int8": rounded}, rest={"int8": "fp32"}, tried_by=None)
    model = SimpleNamespace(denoisers=[SimpleNamespace(name="denoiser")])
    file, said = SimpleNamespace(file="denoiser/model.xml"), list[str]()
    manifest = SimpleNamespace(backend="x", precision="int8", model=model, parts={"denoiser": SimpleNamespace(files=[file])})
    manifest.model_copy = lambda update: manifest
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "denoiser" / "model.xml").write_text("")
    for name, stand_in in (("find_backend", lambda _: backend), ("Engine", lambda *_: None), ("measure_errors", errors)):
        monkeypatch.setattr(quantize_module, name, stand_in)
    quantize_denoiser(manifest, tmp_path, SimpleNamespace(rows=[]), None, said.append)  # type: ignore[arg-type]
    assert tried == [0, 1, 3]
    assert said[0] == "denoiser returned values that are not finite at batch 1: trying again with 1 of 10 layers in fp32"


@pytest.mark.parametrize(("name", "message"), [("", "Is a directory"), ("a\0b", "embedded null"), ("pipe", "a pipe or device")])
def test_a_path_that_is_no_file_of_prompts_is_refused(tmp_path: Path, name: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match=f"--calibration-prompts .*{message}.*; give a text file with a prompt a line"):
        find_prompts(tmp_path / name, is_world=False)


@pytest.mark.usefixtures("any_processor")
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs nncf")
def test_a_base_of_no_known_world_needs_prompts(tiny_base: Path, tmp_path: Path) -> None:
    options = BuildOptions(base=str(tiny_base), backend="openvino", precision="int8", out=tmp_path / "b")
    with pytest.raises(BundleError, match="need --calibration-prompts FILE for this base"):
        plan_build(options)
    plan = plan_build(options.model_copy(update={"base": "avatars"}))
    assert plan.inputs.calibration
    assert plan.inputs.calibration.source == "avatars"
    assert {*plan.inputs.library_versions} >= {"nncf", "openvino"}


@pytest.mark.usefixtures("any_processor")
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs nncf")
def test_a_whole_student_of_the_embedded_model_is_calibrated_on_its_world(tmp_path: Path) -> None:
    student = shutil.copytree(find_base("avatars"), tmp_path / "student")
    shutil.copy(find_lora("avatars-flash") / FLASH, student)
    plan = plan_build(BuildOptions(base=str(student), backend="openvino", precision="int8", out=tmp_path / "b"))
    assert plan.inputs.base_hash != base_hash(find_base("avatars"))
    assert plan.inputs.calibration
    assert plan.inputs.calibration.source == "avatars"


@pytest.mark.usefixtures("any_processor")
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs nncf")
def test_a_copy_of_the_embedded_model_in_bfloat16_is_calibrated_on_its_world(tmp_path: Path) -> None:
    copy = shutil.copytree(find_base("avatars"), tmp_path / "copy")
    for file in copy.rglob("*.safetensors"):
        save_file({name: values.bfloat16() for name, values in load_file(file).items()}, file)
    plan = plan_build(BuildOptions(base=str(copy), backend="openvino", precision="int8", out=tmp_path / "b"))
    assert plan.inputs.calibration
    assert plan.inputs.calibration.source == "avatars"


def test_prompts_without_int8_are_refused_in_one_line(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build-engine", str(tiny_base), "--calibration-prompts", "p.txt", "--out", str(tmp_path / "b")]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "calibration_prompts 'p.txt' is for the precisions int8, fp8 and auto, not fp32" in line


def test_the_layers_that_rounding_moves_most_stay_in_float32() -> None:
    noise = {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.3}
    assert _noisiest(noise, 0.0) == []
    assert _noisiest(noise, 0.5) == ["b", "d"]
    assert _noisiest(noise, 0.6) == ["b", "d", "c"]


def _candidate(precision: Any, ms: float, psnr: float = 40.0, lost: float = 0.0) -> Candidate:
    return Candidate(
        precision=precision, ms=ms, quality=Quality(images=8, steps=4, psnr=psnr, attributes=(0.95, 0.95 - lost), kid=(1, 1))
    )


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([_candidate("fp32", 10), _candidate("bf16", 8), _candidate("int8", 6)], "int8"),
        ([_candidate("fp32", 10), _candidate("bf16", 8), _candidate("int8", 7.9)], "bf16"),  # not worth it
        ([_candidate("fp32", 10), _candidate("bf16", 9.5), _candidate("int8", 9.4)], "fp32"),
        ([_candidate("fp32", 10), _candidate("bf16", 8), _candidate("int8", 2, psnr=20)], "bf16"),
        ([_candidate("fp32", 10), _candidate("int8", 2, lost=0.03)], "fp32"),
        ([_candidate(name, ms) for name, ms in zip(_ORDER, (10, 5.4, 5.8, 9, 9), strict=True)], "fp16"),  # nearer than bf16
    ],
)
def test_auto_takes_the_fastest_precision_that_is_good_enough(candidates: list[Candidate], best: str) -> None:
    assert best_of(candidates).precision == best


@pytest.mark.usefixtures("any_processor")
def test_auto_publishes_one_of_those_that_pass_and_then_leaves_it(
    student_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds are stood in for by copies of one bundle."""
    missing = {"fp16", "fp8"}

    def plan(options: BuildOptions, *, with_quality: bool) -> Any:
        assert with_quality
        if options.precision in missing:
            raise BackendError(f"--precision {options.precision}: not on this processor")
        return SimpleNamespace(options=options, changes=[])

    def build(plan: Any, _: object) -> Manifest:
        if plan.options.precision == "bf16":
            raise BundleError("image differs from torch")
        with new_folder(plan.options.out, BundleError) as folder:
            shutil.copytree(student_bundle, folder, dirs_exist_ok=True)
            quality = Quality(images=2, steps=4, psnr=40.0 if plan.options.precision == "fp32" else 10.0)
            manifest = read_manifest(student_bundle).model_copy(update={"precision": plan.options.precision, "quality": quality})
            write_manifest(folder, manifest)
        return manifest

    monkeypatch.setattr(choose, "plan_build", plan)
    out, said = tmp_path / "b", list[str]()
    options = BuildOptions(base="x", precision="auto", out=out)
    chosen = choose_precision(options, build, said.append)
    assert {"auto: without fp16: not on this processor", "auto: without bf16: image differs from torch"} <= {*said}
    assert chosen.precision == "fp32"  # int8 is too far from it
    assert "the images of int8 are too far from float32's" in chosen.chosen
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert read_manifest(out) == chosen
    assert choose_precision(options, build, said.append) == chosen
    assert "chosen before from the same inputs; nothing to do" in said[-1]
    missing.discard("fp16")  # which can be built from now on
    assert choose_precision(options, build, said.append).candidates == ("fp32", "fp16", "bf16", "int8")


def test_auto_goes_on_without_a_precision_that_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(options: BuildOptions, **_: bool) -> Any:
        if options.precision == "int8":
            raise BundleError("--precision int8: pixart has a network a size, and one is calibrated; give one --size")
        return options

    monkeypatch.setattr(choose, "plan_build", plan)
    plans, reasons = plan_candidates(BuildOptions(base="x", precision="auto", out=tmp_path / "b"))
    assert [*plans] == ["fp32", "fp16", "bf16", "fp8"]
    assert reasons == ["without int8: pixart has a network a size, and one is calibrated; give one --size"]


def test_the_distance_of_images_is_that_of_all_their_pixels() -> None:
    black = np.zeros((4, 4, 3), dtype=np.uint8)
    assert _psnr([black], [black]) == 99.0
    assert _psnr([black, black + np.uint8(2)], [black, black]) == pytest.approx(10 * np.log10(255**2 / 2))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs nncf")
def test_an_int8_bundle_is_built_searched_and_served_without_nncf(
    tiny_base: Path, flash_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _INT8 & {*find_backend("openvino").machine().features}:
        pytest.skip("this processor has no int8 arithmetic")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n\na dog\n a red bird \n")
    given = {
        "base": str(tiny_base),
        "loras": ((str(flash_lora), 1.0),),
        "backend": "openvino",
        "precision": "int8",
        "batch_sizes": (1, 2),
        "calibration_prompts": prompts,
        "compare_stock": False,
    }
    said: list[str] = []
    options = BuildOptions.model_validate({**given, "out": tmp_path / "b"})
    manifest = build_engine(options, said.append)

    done, quality = manifest.quantization, manifest.quality
    assert done
    assert quality
    assert (done.part, done.rows, done.kept, done.tries) == ("denoiser", 3 * quality.steps, (), 1)
    assert done.layers > 10
    assert quality.images == 3
    assert 20 < quality.psnr < 99
    assert quality.attributes is None  # the tiny model is of no world
    assert manifest.max_error_allowed["denoiser"] > manifest.max_error_allowed["decoder"] == 1e-4
    assert manifest.max_error["denoiser"] > 1e-4
    assert {file.name for file in (tmp_path / "b" / "denoiser").iterdir()} == {"model.xml", "model.bin"}
    float32 = plan_build(options.model_copy(update={"precision": "fp32", "calibration_prompts": None}))
    assert any("calibration prompts: 3 of prompts.txt -> none" in change for change in float32.changes)

    # The same again does nothing; other prompts are another bundle.
    assert build_engine(options, said.append) == read_manifest(tmp_path / "b")
    assert "is up to date" in said[-1]
    prompts.write_text("a dog\na fish\n")
    assert any("calibration prompts" in change for change in plan_build(options).changes)

    # It is inspected, and opened and run where there is neither NNCF nor torch.
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert f"denoiser: {done.layers} layers in int8" in shown
    assert "dB from torch in float32" in shown
    code = (
        "import sys\nsys.modules['nncf'] = None\nfrom flashdiff.cli import main\n"
        f"status = main(['generate', {str(tmp_path / 'b')!r}, 'a dog', '-o', {str(tmp_path / 'dog.png')!r}])\n"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

    # The same weights and prompts give the same bytes, also in a process that has quantized before.
    quantize, engine = find_backend("openvino").quantize["int8"], open_bundle(tmp_path / "b")
    plain = tmp_path / "plain"
    rows = sample(engine, [Prompt("a dog")]).rows
    build_engine(
        BuildOptions.model_validate({**given, "precision": "fp32", "calibration_prompts": None, "out": plain}), said.append
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        quantize(plain / "denoiser" / "model.xml", tmp_path / name / "model.xml", rows, ())
    for file in ("model.xml", "model.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    # A gate that nothing passes is met by fewer and fewer layers in int8, and then refused; the old bundle stays.
    monkeypatch.setitem(PART_ERROR, "int8", 1e-9)
    prompts.write_text("a dog\n")
    before = read_manifest(tmp_path / "b")
    with pytest.raises(BundleError, match=r"denoiser differs from torch by .* with half of its layers in fp32 too"):
        build_engine(options, said.append)
    assert sum("trying again with" in line for line in said) == 3
    assert read_manifest(tmp_path / "b") == before


@pytest.mark.long
def test_onnx_runtime_quantizes_with_its_own_library(tiny_base: Path, flash_lora: Path, tmp_path: Path) -> None:
    if not _INT8 & {*find_backend("onnxruntime").machine().features}:
        pytest.skip("this processor has no int8 arithmetic")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    given = {
        "base": str(tiny_base),
        "loras": ((str(flash_lora), 1.0),),
        "backend": "onnxruntime",
        "batch_sizes": (1, 2),
        "compare_stock": False,
    }
    options = BuildOptions.model_validate({**given, "precision": "int8", "calibration_prompts": prompts, "out": tmp_path / "b"})
    manifest = build_engine(options, print)
    done, quality = manifest.quantization, manifest.quality
    assert done
    assert quality
    assert (done.kept, done.tries) == ((), 1)
    assert done.layers > 10
    assert 20 < quality.psnr < 99
    assert manifest.max_error["denoiser"] > 1e-4
    assert {file.name for file in (tmp_path / "b" / "denoiser").iterdir()} == {"model.onnx", "model.onnx.data"}

    quantize, engine = find_backend("onnxruntime").quantize["int8"], open_bundle(tmp_path / "b")
    plain = tmp_path / "plain" / "denoiser" / "model.onnx"
    build_engine(BuildOptions.model_validate({**given, "out": tmp_path / "plain"}), print)
    rows = sample(engine, [Prompt("a dog")]).rows
    target = tmp_path / "again" / "model.onnx"
    target.parent.mkdir()
    noise = quantize(plain, target, rows, ())
    assert len(noise) == done.layers
    assert 0 < min(noise.values()) < max(noise.values()) < 1
    graph, weights = target.read_bytes(), (target.parent / "model.onnx.data").read_bytes()

    # Layers that stay in float32 are larger, and the same again gives the same bytes in the place of those before.
    kept = _noisiest(noise, 0.5)
    assert {*quantize(plain, target, rows, kept)} == {*noise} - {*kept}
    assert (target.parent / "model.onnx.data").stat().st_size > len(weights)
    quantize(plain, target, rows, ())
    assert target.read_bytes() == graph
    assert (target.parent / "model.onnx.data").read_bytes() == weights
    assert len([*target.parent.iterdir()]) == 2


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs nncf")
def test_a_build_from_python_sends_nothing_over_the_network(tiny_base: Path, tmp_path: Path) -> None:
    """The command line has a test of its own; here the backend alone keeps OpenVINO and NNCF from reporting their use."""
    if not _INT8 & {*find_backend("openvino").machine().features}:
        pytest.skip("this processor has no int8 arithmetic")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    code = f"""
import os, socket, sys
from pathlib import Path

def watch(event, arguments):  # forked processes inherit it
    if event == "socket.getaddrinfo" or (event == "socket.connect" and arguments[0].family != socket.AF_UNIX):
        with open({str(tmp_path / "requests")!r}, "a") as file:
            print(event, arguments, file=file)
        raise OSError("no network here")

sys.addaudithook(watch)
from flashdiff.engines.build import BuildOptions, build_engine

build_engine(
    BuildOptions(
        base={str(tiny_base)!r}, backend="openvino", precision="int8", batch_sizes=(1,), compare_stock=False,
        calibration_prompts=Path({str(tmp_path / "prompts.txt")!r}), out=Path({str(tmp_path / "b")!r}),
    ),
    print,
)
assert "nncf" in sys.modules
"""
    unset = ("CI", "TF_BUILD", "JENKINS_URL", "NNCF_CI", "NNCF_DEV")  # with these the libraries are silent anyway
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not (tmp_path / "requests").exists()
    assert not (tmp_path / "home" / "intel").exists()  # where they keep the number by which they know their user
