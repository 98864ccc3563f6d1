"""A student that is the whole network: trained against a frozen copy, resumed, published as a model, built and evaluated."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from recipes import killed_at, tiny_recipe
from safetensors.torch import load_file
from tiny import FAMILIES, MODELS, make_tiny_sd15, open_stock
from torch import Tensor

from flashdiff.config import load_recipe
from flashdiff.distill import loop, processes
from flashdiff.distill.checkpoints import checkpoints
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.dry_run import dry_run
from flashdiff.distill.loop import distill
from flashdiff.distill.losses.distribution_matching import FAKE_SCORE
from flashdiff.distill.network import as_adapter, as_teacher, checkpoint_gradients, run_network
from flashdiff.distill.objective import Objective
from flashdiff.distill.saved_student import open_checkpoint
from flashdiff.distill.student import Student
from flashdiff.distill.student_kinds import kind_of
from flashdiff.engines.build import BuildOptions, build_engine
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ConfigError, LoraError, ModelError
from flashdiff.evaluation.command import _trained_guidance
from flashdiff.families import find_base, load_base
from flashdiff.families.base import TorchModel
from flashdiff.families.files import base_files
from flashdiff.generate import generate
from flashdiff.lora import find_lora, load_fused, read_flash_info
from flashdiff.lora_files import FLASH
from flashdiff.tasks import check_order

ALL = {"updates": 2, "mode_weights": (1, 1, 1, 1), "adversarial": 0.1, "distribution_matching": 0.3, "backward_simulation": 0.5}
LEARNED = {"distribution_matching": {"fake_score": "lora", "critic_updates": 1}}


def _recipe(base: Path, **changes: Any) -> Recipe:
    """All losses and opponents, drawing on the student too."""
    settings = {"student": "full", "phases": [ALL], "loss": LEARNED, "lora": {"rank": 2, "alpha": 4}, "checkpoint_every": 1}
    return tiny_recipe(base, **{**settings, **changes})


def _inputs(model: TorchModel) -> tuple[Tensor, ...]:
    latents = torch.randn(2, *model.spec.latent_shape(model.spec.sizes[0]), generator=torch.Generator().manual_seed(0))
    conditioning = model.encode_ids(model.tokenizer(["a dog", "two cats"]))
    return latents, torch.tensor([999, 249]), *(conditioning[name] for name in model.conditioning)


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full") / "student"
    distill(_recipe(tiny_base), out)
    return out


# --- roles -----------------------------------------------------------------------------------------------------------


def _trained(base: Path, *, checkpointed: bool = False) -> tuple[TorchModel, Student]:
    """A model whose network is trained whole, with a learned fake score, after its weights have moved."""
    recipe = _recipe(base)
    family, model = load_base(str(base))
    kind_of(recipe).insert(model, family, recipe)
    kind_of(recipe).keep_teacher(model)
    Objective(model, family, recipe)
    student = Student(model, recipe)
    if checkpointed:
        checkpoint_gradients(model)
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter += 0.01
        for name, parameter in model.network.named_parameters():
            if f"lora_B.{FAKE_SCORE}" in name:
                parameter += 0.1
    return model, student


def test_teacher_and_fake_score_start_from_the_base_whatever_the_student_is(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))[1]
    model, student = _trained(tiny_base)
    inputs = _inputs(model)
    with torch.no_grad():
        before, own = base.denoiser(*inputs), model.denoiser(*inputs)
        assert (own - before).abs().max() > 1e-3
        with as_teacher(model):
            assert torch.equal(model.denoiser(*inputs), before)
        with as_adapter(model, FAKE_SCORE):
            fake = model.denoiser(*inputs)
        base.network.load_state_dict({name: p.detach() for name, p in student.parameters.items()}, strict=False)
        assert torch.equal(model.denoiser(*inputs), own)
        assert torch.equal(base.denoiser(*inputs), own)
        assert all((fake - other).abs().max() > 1e-3 for other in (before, own))
        zeros = {name: torch.zeros_like(p) for name, p in student.parameters.items()}
        with student.holding(zeros):
            assert not model.denoiser(*inputs).any()
            with as_teacher(model):
                assert torch.equal(model.denoiser(*inputs), before)
            assert not model.denoiser(*inputs).any()
        assert torch.equal(model.denoiser(*inputs), own)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradients_reach_the_student_alone_also_through_the_teacher(checkpointed: bool, tiny_base: Path) -> None:
    model, student = _trained(tiny_base, checkpointed=checkpointed)
    latents, times, texts = _inputs(model)
    conditioning = {"encoder_hidden_states": texts}
    x = run_network(model, latents, times, conditioning)
    with as_teacher(model):
        judged = run_network(model, x, times, conditioning)
    judged.square().mean().backward()
    found = {name: p.grad for name, p in student.parameters.items() if p.grad is not None}
    assert set(found) == set(student.parameters)

    _, teacher = load_base(str(tiny_base))
    _, own = load_base(str(tiny_base))
    own.network.load_state_dict({name: p.detach() for name, p in student.parameters.items()})
    own.network.requires_grad_(True)
    run_network(teacher, run_network(own, latents, times, conditioning), times, conditioning).square().mean().backward()
    for name, parameter in own.network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in ("sd15", "sd3") else pytest.param(name, marks=pytest.mark.long) for name in MODELS]
)
def test_a_family_trains_resumes_and_loads_in_the_stock_pipeline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = MODELS[name](tmp_path / name)
    recipe = _recipe(base, learning_rate=1e-3, keep_best=2)
    distill(recipe, tmp_path / "whole")

    monkeypatch.setattr(loop.Student, "learn", killed_at(1, Student.learn))
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "broken")
    monkeypatch.undo()
    distill(recipe, tmp_path / "broken")
    family, before = load_base(str(base))
    whole, broken = (_weights(tmp_path / run / family.lora_prefix) for run in ("whole", "broken"))
    assert whole.keys() == broken.keys() == _weights(tmp_path / "whole" / "best" / family.lora_prefix).keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)

    _, student = load_fused(str(tmp_path / "whole"), [], None)
    assert student.spec.sampler.kind == "flash"
    own = dict(before.network.named_parameters())
    moved = [not torch.equal(p, own[name]) for name, p in student.network.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)  # some have no effect, such as those of text in the last block
    pipeline = open_stock(getattr(diffusers, family.pipeline_class), tmp_path / "whole")
    stock = dict(getattr(pipeline, family.lora_prefix).named_parameters())
    assert all(torch.equal(p, stock[name]) for name, p in student.network.named_parameters())


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


@pytest.mark.slow
def test_a_published_model_is_a_student_wherever_a_base_can_stand(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    info = read_flash_info(run)
    assert info
    assert info.base_hash == load_base(str(tiny_base))[1].base_hash != load_base(str(run))[1].base_hash
    assert run / FLASH in base_files(run)
    assert info.lora_parameters == 0
    assert _trained_guidance(str(run), ()) == (2.0, 4.0)
    manifest = build_engine(BuildOptions(base=str(run), out=tmp_path / "bundle", batch_sizes=(1,)), lambda _: None)
    assert manifest.model.sampler.grid == info.grid
    assert manifest.stock is not None
    assert not isinstance(manifest.stock, str)
    order = check_order(manifest.model, prompt="a dog", steps=2)
    images = [
        generate(model, [order])[0][0].astype(int)
        for model in (open_bundle(tmp_path / "bundle"), open_checkpoint(checkpoints(run / "training")[-1]))
    ]
    assert np.abs(images[0] - images[1]).max() <= 1
    with pytest.raises(ConfigError, match="--steps 5: this student takes 1 to 4"):
        build_engine(BuildOptions(base=str(run), out=tmp_path / "other", steps=5), print)
    with pytest.raises(LoraError, match="is no LoRA but a whole model: give it in the place of the base"):
        find_lora(str(run))
    with pytest.raises(ConfigError, match="is a flash student, and no teacher; distil the base that it comes from"):
        list(dry_run(tiny_recipe(run)))
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / FLASH).unlink()
    with pytest.raises(ModelError, match="unfinished holds an unfinished training run"):
        find_base(str(unfinished))


@pytest.mark.slow
def test_parts_that_are_not_published_are_not_in_the_index(tmp_path: Path) -> None:
    base = make_tiny_sd15(tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(index))
    one = {"updates": 1, "mode_weights": (1, 1, 1, 1)}
    distill(tiny_recipe(base, student="full", lora=None, phases=[one]), tmp_path / "out")
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_weights_stay_in_float32_where_the_network_computes_in_bfloat16(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "precision", lambda: torch.bfloat16)  # as on a GPU
    distill(_recipe(tiny_base, learning_rate=1e-7), tmp_path / "out")
    before = dict(load_base(str(tiny_base))[1].network.named_parameters())
    found = _weights(tmp_path / "out" / "unet")
    assert all(values.dtype == torch.float32 for values in found.values())
    assert all(torch.allclose(found[name], p, atol=1e-6) for name, p in before.items())
    assert any(not torch.equal(found[name], p) for name, p in before.items())


@pytest.mark.slow
def test_a_run_starts_from_a_full_students_weights(run: Path, tiny_base: Path, flash_lora: Path, tmp_path: Path) -> None:
    wanted = _weights(run / "unet")
    for place in (run, checkpoints(run / "training")[-1]):
        out = tmp_path / place.name
        distill(_recipe(tiny_base, init_from=str(place), learning_rate=1e-9), out)
        found = _weights(out / "unet")
        assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    with pytest.raises(ConfigError, match=r"is missing, this run's has .* give a run with the same base, student"):
        list(dry_run(_recipe(tiny_base, init_from=str(flash_lora))))
    with pytest.raises(ConfigError, match=r"is missing, this run's has .* give a run with the same base, student"):
        list(dry_run(tiny_recipe(tiny_base, init_from=str(checkpoints(run / "training")[-1]))))


@pytest.mark.slow
def test_the_recipe_for_one_step_makes_a_student_of_one_step(tiny_base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(bundled_recipe("sd15-one-step.toml"), Recipe)
    short = tuple(phase.model_copy(update={"updates": 1}) for phase in recipe.phases)
    changes = {"phases": short, "batch_size": 4, "data": tiny_recipe(tiny_base).data, "pool_batches": 1}
    distill(recipe.model_copy(update={"base": str(tiny_base), **changes}), tmp_path / "out")
    _, student = load_fused(str(tmp_path / "out"), [], None)
    assert student.spec.sampler.max_steps == student.spec.sampler.default_steps == 1
    assert generate(student, [check_order(student.spec, prompt="a dog")])[0][0].shape == (32, 32, 3)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_what_a_full_student_cannot_have_is_refused_by_name(tiny_base: Path) -> None:
    plain = tiny_recipe(tiny_base)
    assert not {"student"} & set(plain.model_dump())
    assert tiny_recipe(tiny_base, student="lora").content_hash == plain.content_hash
    for changes, message in (
        ({"student": "full", "shard_base": True}, "shard_base spreads a frozen network, and student = 'full' trains all of it"),
        ({"lora": None}, "lora is missing: give its rank and alpha, or student = 'full'"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_recipe(tiny_base, **changes)
    with pytest.raises(ConfigError, match=r"distribution_matching\.fake_score = 'lora' needs the table lora"):
        list(dry_run(_recipe(tiny_base, lora=None)))
    with pytest.raises(ConfigError, match=r"lora: student = 'full' trains the network itself, .* leave it out"):
        list(dry_run(_recipe(tiny_base, loss={})))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_dry_run_counts_the_teachers_copy(name: str, tmp_path: Path) -> None:
    base = FAMILIES[name](tmp_path / name)
    lines = "\n".join(dry_run(_recipe(base, lora=None, loss={})))
    count = sum(p.numel() for p in load_base(str(base))[1].network.parameters())
    assert f"denoiser {count:,} parameters, which the teacher keeps a frozen copy of" in lines
    assert f"student  all {count:,} parameters of the denoiser" in lines
