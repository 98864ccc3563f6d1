"""Bundles of the tiny model: right, whole, and refused when they are not."""

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from orders import from_image

from flashdiff.components import Size
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import MANIFEST, SCHEMA_VERSION, PartFile, read_manifest, write_manifest
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.parts import parts_of
from flashdiff.engines.reference import Reference, run_reference
from flashdiff.engines.runtime.engine import Engine, open_bundle, usual_ms
from flashdiff.engines.verify import verify
from flashdiff.errors import BundleError, RequestError
from flashdiff.families import load_base
from flashdiff.files import hash_file
from flashdiff.generate import generate
from flashdiff.lora import load_fused
from flashdiff.tasks import check_order


@pytest.fixture(scope="module")
def student(student_bundle: Path) -> Engine:
    return open_bundle(student_bundle)


@pytest.fixture(scope="module")
def teacher(teacher_bundle: Path) -> Engine:
    return open_bundle(teacher_bundle)


@pytest.fixture
def copy(student_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student_bundle, tmp_path / "copy"))


def test_the_manifest_says_what_was_built_and_how_exact_it_is(student: Engine, teacher: Engine) -> None:
    for engine in (student, teacher):
        assert set(engine.manifest.max_error) == {"text_encoder", "encoder", "denoiser", "decoder", "image"}
        assert max(engine.manifest.max_error.values()) <= 1e-4
        assert engine.manifest.rows_are_exact
        timed = {(cost.size, cost.batch) for cost in engine.manifest.step_costs if cost.part == "denoiser"}
        assert timed == {(size, batch) for size in engine.spec.sizes for batch in engine.manifest.batch_sizes}
        spatial = {(part, size) for part in ("encoder", "denoiser", "decoder") for size in engine.spec.sizes}
        assert engine.measure_costs().keys() == {("text_encoder", None), *spatial}
    assert (student.spec.sampler.kind, teacher.spec.sampler.kind) == ("flash", "ode")
    assert teacher.spec.sizes == (Size(32, 32), Size(48, 32))


def test_the_bundle_hash_names_what_is_served_and_not_what_was_measured(student: Engine, teacher: Engine) -> None:
    manifest = student.manifest
    slower = manifest.model_copy(update={"step_costs": ()})
    assert slower.bundle_hash == manifest.bundle_hash != teacher.manifest.bundle_hash
    assert manifest.model_copy(update={"base_hash": "other"}).bundle_hash != manifest.bundle_hash


def test_the_engine_makes_the_images_of_torch(tiny_base: Path, teacher: Engine) -> None:
    _, model = load_base(str(tiny_base))
    model.spec = teacher.spec
    orders = [check_order(teacher.spec, prompt="a dog", seed=3, steps=5, size=size) for size in teacher.spec.sizes]
    for engine_images, torch_images in zip(generate(teacher, orders), generate(model, orders), strict=True):
        assert engine_images[0].shape == torch_images[0].shape
        assert np.abs(engine_images[0].astype(int) - torch_images[0]).max() <= 1


def test_the_engine_starts_from_an_image_as_torch_does(tiny_base: Path, teacher: Engine) -> None:
    _, model = load_base(str(tiny_base))
    model.spec = teacher.spec
    rng = np.random.default_rng(0)
    images = {size: rng.integers(0, 256, (size.height, size.width, 3), dtype=np.uint8) for size in teacher.spec.sizes}
    orders = [
        from_image(check_order(teacher.spec, prompt="a dog", steps=5, size=size), image, 0.4) for size, image in images.items()
    ]
    for engine_images, torch_images in zip(generate(teacher, orders), generate(model, orders), strict=True):
        assert np.abs(engine_images[0].astype(int) - torch_images[0]).max() <= 1


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_same_request_gives_the_same_pixels_alone_and_among_others(which: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(which)
    limit = engine.spec.sampler.max_steps
    orders = [check_order(engine.spec, prompt=f"prompt {i}", seed=i, steps=min(limit, 1 + i)) for i in range(5)]
    for order, together in zip(orders, generate(engine, orders), strict=True):
        np.testing.assert_array_equal(generate(engine, [order])[0][0], together[0])


def test_the_lora_changes_the_images(student: Engine, tiny_base: Path) -> None:
    _, base = load_base(str(tiny_base))
    base.spec = student.spec
    order = check_order(student.spec, prompt="a dog", seed=3)
    assert (generate(student, [order])[0][0] != generate(base, [order])[0][0]).any()


def test_a_prompt_that_does_not_fit_is_refused_and_not_cut(student: Engine) -> None:
    with pytest.raises(RequestError, match="tokens, at most 16 fit"):
        student.tokenize(["x" * 40])


def test_opening_and_running_a_bundle_imports_neither_torch_nor_diffusers(
    student_bundle: Path, teacher_bundle: Path, tmp_path: Path
) -> None:
    for bundle in (student_bundle, teacher_bundle):
        code = (
            "import sys\nfrom flashdiff.cli import main\n"
            f"status = main(['generate', {str(bundle)!r}, 'a dog', '-o', {str(tmp_path / 'dog.png')!r}])\n"
            "import flashdiff.server.app, flashdiff.server.client\n"
            "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
            "sys.exit(f'{status} {heavy}' if status or heavy else 0)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        assert (tmp_path / "dog.png").exists()


def _edit(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_every_kind_of_damage_is_refused_with_its_cause(copy: Path) -> None:
    weights = next(copy.glob("denoiser/*.bin"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"damaged: denoiser/model\.bin has changed"):
        open_bundle(copy)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=r"damaged: denoiser/model\.bin has changed"):
        open_bundle(copy)
    weights.unlink()
    with pytest.raises(BundleError, match=r"incomplete: denoiser/model\.bin is missing"):
        open_bundle(copy)
    weights.write_bytes(whole)
    read_manifest(copy)

    _edit(copy, schema_version=99)
    with pytest.raises(BundleError, match=f"bundle schema 99, this flashdiff reads {SCHEMA_VERSION}; build it again"):
        open_bundle(copy)
    _edit(copy, schema_version=SCHEMA_VERSION, batch_sizes="many")
    with pytest.raises(BundleError, match="damaged at 'batch_sizes'"):
        open_bundle(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        open_bundle(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(BundleError, match="not a bundle"):
        open_bundle(copy)
    with pytest.raises(BundleError, match="no such bundle"):
        open_bundle(copy / "none")


def test_a_manifest_changed_by_hand_is_refused(copy: Path) -> None:
    _edit(copy, precision="fp16")
    with pytest.raises(BundleError, match=r"manifest\.json has changed since it was built"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/etc/hostname", "denoiser/link.bin", "deep/../../inside.bin", "{copy}/inside.bin"]
)
def test_paths_that_point_outside_the_bundle_are_refused(copy: Path, name: str) -> None:
    """Or would in a copy of it."""
    manifest, name = read_manifest(copy), name.format(copy=copy)
    (copy / "inside.bin").write_bytes(b"its own")
    (copy / "a" / "b").mkdir(parents=True)
    (copy / "deep").symlink_to(copy / "a" / "b")
    (copy.parent / "outside.bin").write_bytes(b"secret")
    (copy / "denoiser" / "link.bin").symlink_to(copy.parent / "outside.bin")
    write_manifest(copy, manifest.model_copy(update={"files": {**manifest.files, name: hash_file(copy / name)}}))
    with pytest.raises(BundleError, match=f"names a file outside the bundle: {name}"):
        open_bundle(copy)


def test_an_engine_file_that_is_not_checked_is_refused(copy: Path) -> None:
    manifest = read_manifest(copy)
    denoiser = manifest.parts["denoiser"].model_copy(update={"files": (PartFile(file="../outside.xml"),)})
    write_manifest(copy, manifest.model_copy(update={"parts": {**manifest.parts, "denoiser": denoiser}}))
    with pytest.raises(BundleError, match=r"\.\./outside\.xml is not among its files"):
        open_bundle(copy)


def test_a_file_that_was_not_published_is_refused(copy: Path) -> None:
    (copy / "denoiser" / "weights.bin").write_bytes(b"pickled")
    with pytest.raises(BundleError, match=r"holds denoiser/weights\.bin, which it was not published with"):
        open_bundle(copy)


def test_a_bundle_for_another_machine_is_refused_with_its_cause_and_cure(copy: Path) -> None:
    manifest = read_manifest(copy)
    gpu = manifest.machine.model_copy(update={"device": "cuda", "processor": "Some GPU", "features": ("sm_12",)})
    write_manifest(copy, manifest.model_copy(update={"machine": gpu, "backend": "tensorrt"}))
    with pytest.raises(BundleError, match=r"made for .*; build it on this one with `flashdiff build-engine`"):
        open_bundle(copy)
    poor = manifest.machine.model_copy(update={"features": ()})
    write_manifest(copy, manifest.model_copy(update={"machine": poor}))
    open_bundle(copy)  # float32 runs on any CPU


def test_an_engine_that_is_wrong_is_not_published(tiny_base: Path, teacher: Engine) -> None:
    family, model = load_base(str(tiny_base))
    model.spec = teacher.spec
    parts, batch_sizes = parts_of(family, model), teacher.manifest.batch_sizes
    verify(run_reference(model, parts, batch_sizes), teacher)
    model.network.conv_out.bias.data += 1e-3
    with pytest.raises(BundleError, match=r"denoiser differs from torch by 1\.\d+e-03"):
        verify(run_reference(model, parts, batch_sizes), teacher)


class _Faulty(Engine):
    """An opened bundle whose denoiser's outputs are tampered with."""

    def __init__(self, bundle: Path, fault: Callable[[NDArray[np.float32]], NDArray[Any]]) -> None:
        super().__init__(bundle, read_manifest(bundle))
        self._fault = fault

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        outputs = super().call(part, inputs)
        return {name: self._fault(values) if part == "denoiser" else values for name, values in outputs.items()}


@pytest.fixture(scope="module")
def reference(tiny_base: Path, flash_lora: Path, student_bundle: Path) -> Reference:
    family, model = load_fused(str(tiny_base), [(flash_lora, 1.0)], None)
    return run_reference(model, parts_of(family, model), read_manifest(student_bundle).batch_sizes)


def _with_nan(values: NDArray[np.float32]) -> NDArray[Any]:
    return np.where(np.arange(values.size).reshape(values.shape) == 5, np.nan, values)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_with_nan, "denoiser returned values that are not finite at batch 1"),
        (lambda values: values.astype(np.float16), "denoiser returned float16"),
        (lambda values: values[:, :, :-1], r"denoiser returned float32 \[1, 4, 7, 8\] as output, not float32 \[1, 4, 8, 8\]"),
        (
            lambda values: values + np.linspace(0, 1e-3, len(values), dtype=np.float32)[:, None, None, None],
            "identical rows differ by 1.0",
        ),
        (lambda values: values + np.float32(1e-5) * (len(values) > 1), "denoiser: a row changes with its batch"),
        (lambda values: values * np.float32(1.01), "denoiser differs from torch by"),
    ],
)
def test_every_planted_fault_is_refused(
    reference: Reference, student_bundle: Path, fault: Callable[[NDArray[np.float32]], NDArray[Any]], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        verify(reference, _Faulty(student_bundle, fault))


@pytest.mark.slow
def test_a_student_in_half_precision_looks_its_times_up_in_onnx_too(tiny_base: Path, flash_lora: Path, tmp_path: Path) -> None:
    build_engine(
        BuildOptions(
            base=str(tiny_base),
            loras=((str(flash_lora), 1.0),),
            out=tmp_path / "b",
            backend="onnxruntime",
            precision="fp16",
            batch_sizes=(1, 2),
        ),
        print,
    )
    graph = onnx.load(tmp_path / "b" / "denoiser" / "model.onnx", load_external_data=False).graph
    assert not {node.op_type for node in graph.node} & {"Sin", "Cos"}


def test_a_students_engine_looks_up_what_depends_on_its_few_times_and_knows_no_others(student_bundle: Path) -> None:
    kinds = set(re.findall(r' type="(\w+)"', (student_bundle / "denoiser" / "model.xml").read_text()))
    assert not kinds & {"Sin", "Cos"}  # of the time embedding; verified at every time when it was built
    engine = open_bundle(student_bundle)
    conditioning = engine.call("text_encoder", engine.tokenize(["a", "b"]))
    latents = np.zeros((2, *engine.spec.latent_shape(engine.spec.sizes[0])), dtype=np.float32)
    known, other = engine.call("denoiser", {"latents": latents, "times": np.array([749, 748]), **conditioning})["output"]
    assert np.isfinite(known).all()
    assert np.isnan(other).all()


def test_batch_sizes_are_measured_in_turns() -> None:
    """So a machine that is busy for a while makes no batch size look slower than the others."""
    called: list[int] = []
    runs = {batch: functools.partial(called.append, batch) for batch in (1, 2, 4)}
    assert usual_ms(runs).keys() == runs.keys()
    assert called == [1, 2, 4] * (len(called) // 3)
    assert len(called) >= 9
