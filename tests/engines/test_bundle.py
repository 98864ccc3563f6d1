"""Bundles of the tiny model: right, whole, and refused when they are not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashdiff.components import Size
from flashdiff.engines.build import BuildOptions, build_engine
from flashdiff.engines.bundle import MANIFEST, SCHEMA_VERSION, read_manifest
from flashdiff.engines.export import parts_of
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.engines.verify import verify
from flashdiff.errors import BundleError, ConfigError, LoraError, RequestError
from flashdiff.families import load_base
from flashdiff.generate import check_order, generate


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
        assert set(engine.manifest.max_error) == {"text_encoder", "denoiser", "decoder", "image"}
        assert max(engine.manifest.max_error.values()) <= 1e-4
        assert set(engine.manifest.step_cost_ms["denoiser"]) == set(engine.manifest.batch_sizes)
    assert (student.spec.sampler.kind, teacher.spec.sampler.kind) == ("flash", "ode")
    assert teacher.spec.sizes == (Size(32, 32), Size(48, 32))


def test_the_bundle_hash_names_what_is_served_and_not_what_was_measured(student: Engine, teacher: Engine) -> None:
    manifest = student.manifest
    slower = manifest.model_copy(update={"step_cost_ms": {"denoiser": {1: 99.0}}})
    assert slower.bundle_hash == manifest.bundle_hash != teacher.manifest.bundle_hash
    assert manifest.model_copy(update={"base_hash": "other"}).bundle_hash != manifest.bundle_hash


def test_the_engine_makes_the_images_of_torch(tiny_base: Path, teacher: Engine) -> None:
    _, model = load_base(str(tiny_base))
    model.spec = teacher.spec
    orders = [check_order(teacher.spec, prompt="a dog", seed=3, steps=5, size=size) for size in teacher.spec.sizes]
    for engine_images, torch_images in zip(generate(teacher, orders), generate(model, orders), strict=True):
        assert engine_images[0].shape == torch_images[0].shape
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
        student.encode(["x" * 40])


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
    with pytest.raises(BundleError, match="bundle schema 99, this flashdiff reads 2; build it again"):
        open_bundle(copy)
    _edit(copy, schema_version=SCHEMA_VERSION, files={**read_files(copy), "../../etc/passwd": "0"})
    with pytest.raises(BundleError, match="outside the bundle"):
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


def read_files(bundle: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((bundle / MANIFEST).read_text())["files"]
    return files


def test_an_engine_that_is_wrong_is_not_published(tiny_base: Path, teacher: Engine) -> None:
    _, model = load_base(str(tiny_base))
    model.spec = teacher.spec
    verify(model, parts_of(model), teacher)
    model.network.conv_out.bias.data += 1e-3
    with pytest.raises(BundleError, match=r"denoiser differs from torch by 1\.\d+e-03"):
        verify(model, parts_of(model), teacher)


def test_a_failed_build_leaves_nothing_behind(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flashdiff.engines.export.export_onnx", full_disk)
    with pytest.raises(BundleError, match="cannot write: No space left on device"):
        build_engine(BuildOptions(base=str(tiny_base), out=tmp_path / "bundle"), print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"guidance": 3.0}, ConfigError, "a flash student runs without guidance"),
        ({"sizes": (Size(33, 32),)}, BundleError, "must be multiples of 8"),
        ({"loras": (("nothing", 1.0),)}, LoraError, "no LoRA 'nothing'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tiny_base: Path, flash_lora: Path, tmp_path: Path, changes: dict[str, object], kind: type[Exception], message: str
) -> None:
    options = {"base": str(tiny_base), "out": tmp_path / "bundle", "loras": ((str(flash_lora), 1.0),), **changes}
    with pytest.raises(kind, match=message):
        build_engine(BuildOptions(**options), print)  # type: ignore[arg-type]
    assert not (tmp_path / "bundle").exists()


def test_an_existing_output_is_refused_before_any_work(student_bundle: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        build_engine(BuildOptions(base="nothing", out=student_bundle), print)
