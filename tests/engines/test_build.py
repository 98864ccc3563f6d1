"""Builds: what is refused before any work, what is done again and why, and what an interrupted one leaves."""

import importlib.metadata
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdiff import cli
from flashdiff.components import Size
from flashdiff.engines import plan as planning
from flashdiff.engines import requirements
from flashdiff.engines.backends import best_backend, find_backend, openvino
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.cache import cached, is_cached
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.differences import differences
from flashdiff.engines.plan import describe, plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import BackendError, BundleError, ConfigError, FlashdiffError, LoraError, ModelError
from flashdiff.files import cache_folder
from flashdiff.lora import load_fused
from flashdiff.lora_files import FLASH, WEIGHTS


@pytest.fixture
def options(tiny_base: Path, flash_lora: Path, student_bundle: Path) -> dict[str, Any]:
    """Those of the student bundle."""
    return {"base": str(tiny_base), "loras": ((str(flash_lora), 1.0),), "out": student_bundle, "batch_sizes": (1, 2, 4)}


def _lines(**options: Any) -> list[str]:
    return list(describe(plan_build(BuildOptions(**options))))


def test_the_same_build_again_does_nothing(options: dict[str, Any]) -> None:
    before = (options["out"] / "manifest.json").stat().st_mtime_ns
    said: list[str] = []
    build_engine(BuildOptions(**options), said.append)
    assert len(said) == 1
    assert "is up to date" in said[0]
    assert (options["out"] / "manifest.json").stat().st_mtime_ns == before


def test_a_dry_run_says_what_why_and_at_what_cost_and_writes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    text = "\n".join(_lines(**options | {"out": tmp_path / "bundle"}))
    for part in (
        "fingerprint",
        "denoiser",
        "in the cache",
        "batch 1, 2, 4 at 32x32",
        "GB free",
        "memory",
        "time",
        "no bundle at",
    ):
        assert part in text
    assert not list(tmp_path.iterdir())
    assert "is up to date" in _lines(**options)[-1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_sizes": (1, 2)}, "batch sizes: 1, 2, 4 -> 1, 2"),
        ({"sizes": (Size(32, 32), Size(64, 32))}, "sizes: 32x32 -> 32x32, 64x32"),
        ({"backend": "torch"}, "backend: openvino -> torch"),
        ({"loras": ()}, "LoRA flash was removed"),
        ({"loras": (), "sampler": "lcm"}, "sampler: default -> lcm"),
    ],
)
def test_every_rebuild_says_what_changed(options: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    assert f"to do        {reason}" in _lines(**options | changes)


def test_a_size_given_twice_counts_once(options: dict[str, Any]) -> None:
    assert BuildOptions(**options | {"sizes": (Size(64, 32), Size(32, 32), Size(64, 32))}).sizes == (Size(64, 32), Size(32, 32))


def test_loras_of_one_name_are_told_apart(options: dict[str, Any]) -> None:
    inputs = plan_build(BuildOptions(**options)).inputs
    (lora,) = inputs.loras
    other = lora.model_copy(update={"weights_hash": "0" * 64, "weight": 0.5})
    old = inputs.model_copy(update={"loras": (lora, other)})
    new = inputs.model_copy(update={"loras": (lora.model_copy(update={"weight": -1.0}), other)})
    assert list(differences(old, new)) == ["LoRAs, their order or their weights changed"]


def test_another_decode_tile_is_a_change(options: dict[str, Any]) -> None:
    old = plan_build(BuildOptions(**options)).inputs
    new = old.model_copy(update={"model": old.model.model_copy(update={"decode_tile": 64})})
    assert list(differences(old, new)) == ["decode tile: default -> 64"]


def test_changed_weights_libraries_and_code_are_noticed(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(options["base"], tmp_path / "tiny"))
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(weights).items()}, weights)
    lora = tmp_path / "flash"
    lora.mkdir()
    save_file({name: 2 * value for name, value in load_file(Path(options["loras"][0][0]) / WEIGHTS).items()}, lora / WEIGHTS)
    reasons = plan_build(BuildOptions(**options | {"base": str(base), "loras": ((str(lora), 0.5),)})).changes
    assert reasons[0].startswith("the base changed: tiny ")
    assert reasons[1].startswith("LoRA flash was trained anew: ")
    reasons = plan_build(BuildOptions(**options | {"loras": ((options["loras"][0][0], 0.5),)})).changes
    assert reasons == ["LoRA flash: weight 1 -> 0.5"]

    monkeypatch.setattr(planning, "_code_hash", lambda: "other")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.1")
    reasons = plan_build(BuildOptions(**options)).changes
    assert "flashdiff's own code changed" in reasons
    assert any(reason.startswith("openvino: 20") and reason.endswith(" -> 0.1") for reason in reasons)


def test_graphs_of_another_openvino_are_not_taken_from_the_cache(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.metadata.version
    before = [export.key for export in plan_build(BuildOptions(**options)).exports]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1" if name == "openvino" else found(name))
    after = [export.key for export in plan_build(BuildOptions(**options)).exports]
    assert not set(before) & set(after)


def test_changes_next_to_the_weights_are_noticed(options: dict[str, Any], tmp_path: Path) -> None:
    lora = Path(shutil.copytree(options["loras"][0][0], tmp_path / "flash"))
    moved = BuildOptions(**options | {"loras": ((str(lora), 1.0),)})
    assert plan_build(moved).changes == []
    info = json.loads((lora / FLASH).read_text())
    info["updates"] += 1  # says how it was trained: the engine is the same
    (lora / FLASH).write_text(json.dumps(info))
    assert plan_build(moved).changes == []
    info["grid"]["modes"] = 2  # the server would step at other times
    (lora / FLASH).write_text(json.dumps(info))
    assert plan_build(moved).changes == ["another sampler: flash.json or the base's configuration changed"]

    base = Path(shutil.copytree(options["base"], tmp_path / "renamed"))
    assert plan_build(BuildOptions(**options | {"base": str(base)})).changes == []


def test_a_bundle_that_is_out_of_date_is_replaced_and_only_what_changed_is_exported(
    options: dict[str, Any], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(options["out"], tmp_path / "bundle"))
    first, said = read_manifest(out), list[str]()
    second = build_engine(BuildOptions(**options | {"out": out, "batch_sizes": (1, 2)}), said.append)
    assert said[0] == "building because batch sizes: 1, 2, 4 -> 1, 2"
    assert len([line for line in said if "from the cache" in line]) == len(read_manifest(out).parts)
    assert open_bundle(out).manifest == second
    assert second.fingerprint != first.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_build_that_fails_leaves_the_previous_bundle_whole(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(options["out"], tmp_path / "bundle"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashdiff.engines.build.verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_engine(BuildOptions(**options | {"out": out, "batch_sizes": (1,)}), print)
    assert read_manifest(out).batch_sizes == (1, 2, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_leaves_nothing_behind(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    form = openvino.RECORDS[0].graph
    assert form
    full = replace(openvino.RECORDS[0], graph=replace(form, export=full_disk))
    monkeypatch.setattr(openvino, "RECORDS", (full,))
    with pytest.raises(BackendError, match="cannot write: No space left on device"):
        build_engine(BuildOptions(base=str(tiny_base), out=tmp_path / "bundle"), print)
    assert not (tmp_path / "bundle").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "free_bytes", lambda _: 1000)
    with pytest.raises(BundleError, match=r"the build needs \d+ MB there, 0 MB are free; make room"):
        build_engine(BuildOptions(base=str(tiny_base), out=tmp_path / "bundle"), print)
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "graph").write_text("right")

    assert not cached("key", make, tmp_path / "one")
    assert cached("key", make, tmp_path / "two")
    assert (tmp_path / "two" / "graph").read_text() == "right"
    (cache_folder() / "key" / "graph").write_text("wrong")
    assert not is_cached("key")
    assert not cached("key", make, tmp_path / "three")
    assert (tmp_path / "three" / "graph").read_text() == "right"
    assert len(made) == 2


def test_several_loras_are_fused_each_by_its_weight(tiny_base: Path, flash_lora: Path) -> None:
    def weight(*loras: float) -> torch.Tensor:
        _, model = load_fused(str(tiny_base), [(flash_lora / WEIGHTS, number) for number in loras], None)
        tensor: torch.Tensor = model.network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
        return tensor

    # The same weights as plain files, which carry no flash.json, stand for style LoRAs.
    style = flash_lora.parent / "style.safetensors"
    shutil.copyfile(flash_lora / WEIGHTS, style)
    base, once = weight(), weight(1.0)
    _, both = load_fused(str(tiny_base), [(flash_lora, 1.0), (style, 0.8)], None)
    fused = both.network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert (once - base).abs().max() > 1e-4
    torch.testing.assert_close(fused, base + 1.8 * (once - base), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"guidance": 3.0}, ConfigError, "--guidance is for a base without a flash student, which runs without guidance"),
        ({"sizes": (Size(36, 32),)}, BundleError, "--size 36x32: sd15 needs width and height in multiples of 8"),
        ({"loras": (("nothing", 1.0),)}, LoraError, "no LoRA 'nothing'"),
        ({"base": "avatars"}, LoraError, "build it with its own base"),
        ({"loras": (), "batch_sizes": (1,)}, BundleError, "--batch must reach 2: guidance evaluates the network twice a step"),
        ({"backend": "tensorrt"}, BackendError, "no NVIDIA GPU here to check the engine on"),
        ({"version_compatible": True}, BackendError, "--version-compatible: it is for TensorRT's plans, and not for --backend"),
        ({"backend": "onnxruntime", "precision": "bf16"}, BackendError, "no bfloat16 convolutions on CPUs; take fp32"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], tmp_path: Path, changes: dict[str, Any], kind: type[FlashdiffError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        build_engine(BuildOptions(**options | {"out": tmp_path / "bundle"} | changes), print)
    assert not list(tmp_path.iterdir())


def test_a_precision_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashdiff.engines.runtime.machine._cpu_info", lambda *_: "avx2")
    backend = find_backend("openvino")
    with pytest.raises(BackendError, match="--precision bf16: this processor has no such arithmetic"):
        backend.check_precision("bf16", backend.machine())


def test_a_backend_that_is_not_installed_is_named_with_its_cure(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"needs 'openvino', which is not here: pip install '\.\[cpu\]'"):
        plan_build(BuildOptions(**options | {"out": tmp_path / "bundle", "backend": "openvino"}))


def test_the_default_backend_is_the_fastest_that_runs_here_and_the_plan_says_so(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu: list[tuple[str, str] | None] = [None]
    monkeypatch.setattr("flashdiff.engines.runtime.machine.nvidia_gpu", lambda *_: gpu[0])
    assert best_backend() == "openvino"
    new = options | {"out": tmp_path / "bundle"}
    assert "openvino, fp32, on cpu" in (said := plan_build(BuildOptions(**new)).machine)
    assert "the fastest here" in said
    assert "fastest" not in plan_build(BuildOptions(**new | {"backend": "openvino"})).machine
    gpu[0] = ("A GPU", "sm_90")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert best_backend() == "torch"
    gpu[0] = None
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert best_backend() == "onnxruntime"


def test_a_recipe_says_what_the_options_say(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "student.toml"
    recipe.write_text(f"base = '{options['base']}'\nloras = [['{options['loras'][0][0]}', 1.0]]\nbatch_sizes = [1, 2, 4]\n")
    command = ["build-engine", str(recipe), "--out", str(options["out"])]
    assert cli.main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.strip().endswith("is up to date")

    assert cli.main([*command, "--precision", "fp16"]) == 2
    assert "student.toml is a recipe: set precision there" in capsys.readouterr().err
    for wrong, message in (
        ("batch_size = [1]", "unknown key 'batch_size', did you mean 'batch_sizes'?"),
        ("batch_sizes = [2, 1]", "batch_sizes must rise from 1 or more, not [2, 1]"),
    ):
        recipe.write_text(f"base = 'avatars'\n{wrong}\n")
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err


def test_weights_that_are_pickled_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "tiny"))
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelError, match=r"unet has its weights as diffusion_pytorch_model\.bin, a pickle, .*safetensors"):
        build_engine(BuildOptions(base=str(base), out=tmp_path / "bundle"), print)
    assert not (tmp_path / "bundle").exists()


def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="exists already and is not a bundle"):
        build_engine(BuildOptions(base="nothing", out=tmp_path), print)
    assert (tmp_path / "thesis.txt").exists()
