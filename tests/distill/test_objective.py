"""The three losses together on the tiny model: the cost of each, the networks it trains, and exact resumption."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import tiny_recipe
from safetensors.torch import load_file
from tiny import FAMILIES
from torch import Tensor

from flashdiff.distill import loop
from flashdiff.distill.batch import MicroBatch, Targets
from flashdiff.distill.config import Recipe
from flashdiff.distill.loop import distill
from flashdiff.distill.losses import distribution_matching
from flashdiff.distill.losses.distribution_matching import FAKE_SCORE, DistributionMatching
from flashdiff.distill.objective import Objective
from flashdiff.distill.processes import Draws
from flashdiff.distill.step import student_x0
from flashdiff.families import load_base
from flashdiff.families.base import TorchModel
from flashdiff.lora import ADAPTER, add_adapter
from flashdiff.lora_files import WEIGHTS

ALL = {"updates": 4, "mode_weights": (1, 1, 1, 1), "adversarial": 0.1, "distribution_matching": 0.3}
BATCH = 2


@pytest.fixture
def model(tiny_base: Path) -> TorchModel:
    _, model = load_base(str(tiny_base))
    add_adapter(model, ("to_q", "to_k", "to_v", "to_out.0"), rank=2, alpha=4, seed=0)
    return model


@pytest.fixture
def batch(model: TorchModel) -> Targets:
    generator = torch.Generator().manual_seed(0)
    z0, x_t, x0 = (torch.randn(BATCH, 4, 8, 8, generator=generator) for _ in range(3))
    return Targets(z0, x_t, torch.tensor([999, 499]), model.encode_ids(model.tokenizer(["a dog", "a cat"])), x0, torch.ones(4))


@pytest.fixture
def evaluations(model: TorchModel) -> Iterator[list[int]]:
    """Batch sizes of the network's evaluations, as they happen."""
    calls: list[int] = []
    handle = model.network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))  # some stop half-way
    yield calls
    handle.remove()


def _objective(model: TorchModel, tiny_base: Path, **loss: Any) -> Objective:
    recipe = tiny_recipe(tiny_base, phases=[ALL], loss=loss)
    return Objective(model, load_base(str(tiny_base))[0], recipe)


def _micro_batch(batch: Targets, x0: Tensor) -> MicroBatch:
    return MicroBatch(batch, x0, Draws(torch.Generator().manual_seed(1), len(x0)))


@pytest.mark.parametrize(
    ("loss", "student", "opponents"),
    [
        # Student: its own, fake and real features, guided teacher (twice the batch), itself as fake score.
        # Discriminator: real, fake, real with noise.
        ({}, [2, 2, 2, 4, 2], [2, 2, 2]),
        ({"distillation": "perceptual"}, [2, 2, 2, 2, 2, 4, 2], [2, 2, 2]),
        ({"adversarial": {"r1_weight": 0}}, [2, 2, 2, 4, 2], [2, 2]),
        ({"distribution_matching": {"decoupled": True}}, [2, 2, 2, 2, 4, 2], [2, 2, 2]),
        ({"distribution_matching": {"fake_score": "lora", "critic_updates": 3}}, [2, 2, 2, 4, 2], [2, 2, 2, 2, 2, 2]),
    ],
)
def test_what_an_update_costs_in_network_evaluations(
    model: TorchModel,
    tiny_base: Path,
    batch: Targets,
    evaluations: list[int],
    loss: Any,
    student: list[int],
    opponents: list[int],
) -> None:
    objective = _objective(model, tiny_base, **loss)
    evaluations.clear()
    x0 = student_x0(model, batch)
    losses = objective.losses(_micro_batch(batch, x0), objective.recipe.phases[0])
    assert evaluations == student
    assert set(losses) == {"distillation", "adversarial", "distribution_matching"}
    evaluations.clear()
    objective.train_opponents([_micro_batch(batch, x0)])
    assert evaluations == opponents


@pytest.mark.parametrize("kind", ["l2", "perceptual"])
def test_every_loss_reaches_the_student_alone(kind: str, model: TorchModel, tiny_base: Path, batch: Targets) -> None:
    objective = _objective(model, tiny_base, distillation=kind, distribution_matching={"fake_score": "lora"})
    for name in ("distillation", "adversarial", "distribution_matching"):
        model.network.zero_grad()
        x0 = student_x0(model, batch)
        objective.losses(_micro_batch(batch, x0), objective.recipe.phases[0])[name].backward()
        touched = {key for key, p in model.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert touched, name
        assert all(f".{ADAPTER}." in key for key in touched), name


@pytest.mark.parametrize(
    "settings",
    [{}, {"fake_score": "lora"}, {"decoupled": True}, {"own_step": True}],
    ids=["student", "lora", "decoupled", "own step"],
)
def test_distribution_matching_moves_samples_from_the_fake_score_to_the_guided_teachers(
    settings: dict[str, Any], model: TorchModel, tiny_base: Path, batch: Targets
) -> None:
    """Equations 7 and 8 of DMD, computed apart from the objective: which score is which, the sign, the guidance, the noise."""
    objective = _objective(model, tiny_base, distribution_matching=settings)
    with torch.no_grad():  # LoRAs start at nothing: then all three roles would be one network
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    x0 = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
    alone = objective.recipe.phases[0].model_copy(update={"distillation": 0.0, "adversarial": 0.0})
    loss = objective.losses(_micro_batch(batch, x0), alone)["distribution_matching"]

    draws = _micro_batch(batch, x0).draws  # the same numbers, in the order of the method
    guidance = 2.0 + 2.0 * draws.uniform().view(-1, 1, 1, 1)
    own_step = settings.get("own_step", False)  # from 999 to 749, and from 499 to 249
    ends, starts = batch.times - 250, batch.times.clamp(max=979)
    tau = (ends + draws.uniform() * (starts - ends)).long() if own_step else draws.integers(20, 980)
    noise = draws.normal(x0.shape[1:])
    alphas, sigmas = (torch.from_numpy(of).float() for of in model.spec.sampler.schedule.levels(list(range(1000))))
    teacher_model = load_base(str(tiny_base))[1]  # as it was before any LoRA
    nothing = teacher_model.encode_ids(teacher_model.tokenizer([""]))

    @torch.no_grad()
    def clean(network: TorchModel, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        alpha, sigma = alphas[times].view(-1, 1, 1, 1), sigmas[times].view(-1, 1, 1, 1)
        x_t = alpha * x0 + sigma * noise
        out = network.denoiser(x_t, times, *(condition[name].expand(BATCH, *condition[name].shape[1:]) for name in condition))
        return (x_t - sigma * out) / alpha

    said = {name: batch.conditioning[name] for name in model.conditioning}
    at = (draws.uniform() * batch.times).long().clamp(min=20) if settings.get("decoupled") else tau
    towards_guided = (guidance - 1) * (clean(teacher_model, at, said) - clean(teacher_model, at, nothing))
    teacher = clean(teacher_model, tau, said) + towards_guided
    model.network.set_adapter(FAKE_SCORE if settings.get("fake_score") else ADAPTER)
    difference = clean(model, tau, said) - teacher
    scale = (x0.detach() - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)

    (found,) = torch.autograd.grad(loss, x0)
    expected = 0.3 * 2 * difference / scale / x0.numel()
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_every_step_is_matched_down_to_the_next_one(model: TorchModel, tiny_base: Path) -> None:
    """Of four steps; between them start the samples that steer clear of the modes."""
    loss = _objective(model, tiny_base)._losses["distribution_matching"]
    assert isinstance(loss, DistributionMatching)
    assert loss._next_times(torch.tensor([999, 874, 749, 500, 249, 124])).tolist() == [749, 749, 499, 499, 0, 0]


@pytest.mark.parametrize("decoupled", [False, True])
def test_distribution_matching_guides_its_teacher_as_the_pipeline_does(
    decoupled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen-Image's pipeline scales guided outputs, token by token, to the length of the conditional ones."""
    base = FAMILIES["qwen-image"](tmp_path / "qwen-image")
    family, model = load_base(str(base))
    teacher_model = load_base(str(base))[1]
    add_adapter(model, ("to_q",), rank=2, alpha=4, seed=0)
    recipe = tiny_recipe(base, phases=[ALL], loss={"distribution_matching": {"decoupled": decoupled}})
    objective = Objective(model, family, recipe)
    alone = recipe.phases[0].model_copy(update={"distillation": 0.0, "adversarial": 0.0})
    x0 = torch.randn(BATCH, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    said, nothing = (model.encode_ids(model.tokenizer(prompts)) for prompts in (["a dog", "two cats"], [""]))
    batch = Targets(x0, x0, torch.tensor([999, 499]), said, x0, torch.ones(16))
    seen: list[Tensor] = []
    monkeypatch.setattr(distribution_matching, "distribution_matching_loss", lambda *x0s: seen.append(x0s[2]) or x0s[0].sum())
    objective.losses(_micro_batch(batch, x0), alone)

    draws = _micro_batch(batch, x0).draws  # the same numbers, in the order of the method
    guidance = 2.0 + 2.0 * draws.uniform().view(-1, 1, 1, 1)
    tau = draws.integers(20, 980)
    noise = draws.normal(x0.shape[1:])
    sigmas = torch.from_numpy(model.spec.sampler.schedule.levels(list(range(1000)))[1]).float()

    def tokens(values: Tensor) -> Tensor:
        return values.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)

    @torch.no_grad()
    def clean(times: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional x_0 and the guided one."""
        sigma = sigmas[times].view(-1, 1, 1, 1)
        x_t = (1 - sigma) * x0 + sigma * noise
        towards, away = (
            teacher_model.denoiser(x_t, times, *(of[name].expand(BATCH, *of[name].shape[1:]) for name in model.conditioning))
            for of in (said, nothing)
        )
        combined = away + guidance * (towards - away)
        scale = torch.linalg.vector_norm(tokens(towards), dim=3) / torch.linalg.vector_norm(tokens(combined), dim=3)
        scale = scale[:, None].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return x_t - sigma * towards, x_t - sigma * combined * scale

    at = (draws.uniform() * batch.times).long().clamp(min=20) if decoupled else tau
    plain, guided = clean(at)
    torch.testing.assert_close(seen[0], clean(tau)[0] + guided - plain if decoupled else guided, rtol=1e-4, atol=1e-5)


def test_judges_see_with_the_frozen_teacher_whatever_the_student_has_learnt(
    model: TorchModel, tiny_base: Path, batch: Targets
) -> None:
    objective = _objective(model, tiny_base, distillation="perceptual")
    phase = objective.recipe.phases[0].model_copy(update={"distribution_matching": 0.0})
    untrained, x0 = copy.deepcopy(objective.state_dict()), 0.5 * batch.x0

    def all_losses() -> dict[str, float]:
        objective.load_state_dict(copy.deepcopy(untrained))
        losses = {name: loss.item() for name, loss in objective.losses(_micro_batch(batch, x0), phase).items()}
        return losses | objective.train_opponents([_micro_batch(batch, x0)])

    before, answer = all_losses(), student_x0(model, batch)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if f"lora_B.{ADAPTER}" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    assert not torch.allclose(student_x0(model, batch), answer, atol=0.01)
    assert set(before) == {"distillation", "adversarial", "discriminator", "discriminator_accuracy"}
    assert all_losses() == pytest.approx(before)


def test_opponents_learn_without_moving_the_student(model: TorchModel, tiny_base: Path, batch: Targets) -> None:
    objective = _objective(model, tiny_base, distribution_matching={"fake_score": "lora", "critic_learning_rate": 0.01})
    before = {key: p.detach().clone() for key, p in model.network.named_parameters()}
    x0 = student_x0(model, batch)
    losses = [objective.train_opponents([_micro_batch(batch, x0)]) for _ in range(12)]
    assert losses[-1]["discriminator"] < losses[0]["discriminator"]
    assert losses[-1]["fake_score"] < losses[0]["fake_score"]
    moved = {key for key, p in model.network.named_parameters() if not torch.equal(p, before[key])}
    assert moved
    assert all(f".{FAKE_SCORE}." in key for key in moved)
    assert all(p.requires_grad == (f".{ADAPTER}." in key) for key, p in model.network.named_parameters())


def test_a_loss_without_weight_costs_nothing(model: TorchModel, tiny_base: Path, batch: Targets, evaluations: list[int]) -> None:
    recipe = tiny_recipe(tiny_base)
    objective = Objective(model, load_base(str(tiny_base))[0], recipe)
    evaluations.clear()
    losses = objective.losses(_micro_batch(batch, student_x0(model, batch)), recipe.phases[0])
    assert list(losses) == ["distillation"]
    assert len(evaluations) == 1
    assert objective.train_opponents([_micro_batch(batch, batch.x0)]) == {}


@pytest.mark.slow
def test_a_killed_run_with_all_losses_goes_on_and_equals_the_unbroken_one(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        tiny_base,
        phases=[{**ALL, "updates": 3, "adversarial": 0}, {**ALL, "updates": 6}],
        loss={"distribution_matching": {"fake_score": "lora", "critic_updates": 2}},
        checkpoint_every=2,
    )
    distill(recipe, tmp_path / "whole")

    class KilledError(Exception):
        pass

    learn = loop.Student.learn

    def learn_until_killed(student: loop.Student, loss: float) -> None:
        if student.update == 7:
            raise KilledError
        learn(student, loss)

    monkeypatch.setattr(loop.Student, "learn", learn_until_killed)
    with pytest.raises(KilledError):
        distill(recipe, tmp_path / "broken")
    monkeypatch.undo()
    distill(recipe, tmp_path / "broken")
    whole, broken = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not any(FAKE_SCORE in name for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "training" / "log.jsonl").read_text().splitlines()]
    assert "adversarial" not in lines[2]
    assert {"adversarial", "distribution_matching", "discriminator", "fake_score", "latent_std"} <= set(lines[3])


def test_recipes_with_senseless_losses_are_refused(tiny_base: Path) -> None:
    for changes in ({"adversarial": {"kind": "wgan"}}, {"distribution_matching": {"fake_score": "none"}}):
        with pytest.raises(ValueError, match="Input should be"):
            Recipe.model_validate({**tiny_recipe(tiny_base).model_dump(), "loss": changes})
