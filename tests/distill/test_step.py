"""Where the student's inputs and targets come from, apart from the paper's: its own earlier steps, and its own answers."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import CAPTIONS, branches_of_text, tiny_recipe
from safetensors.torch import load_file
from torch import Tensor

from flashdiff.distill import loop
from flashdiff.distill.config import Recipe
from flashdiff.distill.data import Dataset, load_dataset
from flashdiff.distill.loop import distill
from flashdiff.distill.network import levels, predict_x0
from flashdiff.distill.step import POOL_BATCHES, REUSED_POOL_BATCHES, Pool, Solved, make_pool, roll_out, span_at
from flashdiff.families import load_base
from flashdiff.families.base import TorchModel
from flashdiff.lora import add_adapter
from flashdiff.lora_files import WEIGHTS
from flashdiff.sampling import ode_step, renoise


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> TorchModel:
    _, model = load_base(str(tiny_base))
    add_adapter(model, ("to_q", "to_k", "to_v", "to_out.0"), rank=2, alpha=4, seed=0)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:  # zeros would make the student the teacher
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def _prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS))
    return path


def _solved(model: TorchModel, recipe: Recipe, tmp_path: Path) -> tuple[Dataset, Solved]:
    data = load_dataset(recipe.data, model, batch_size=recipe.batch_size, seed=0)
    branches = branches_of_text(model.unconditional() or {})
    pool = make_pool(model, branches, data, recipe, span_at(recipe, 0))
    solved, _ = pool.batch(0, seed=0)
    return data, solved


def test_a_run_is_cut_into_spans_of_one_phase_and_one_pool(tiny_base: Path) -> None:
    modes = {"mode_weights": (1, 1, 1, 1)}
    recipe = tiny_recipe(tiny_base, phases=[{"updates": 20, **modes}, {"updates": 35, **modes}])
    cuts = [(s.index, s.first, s.end, s.first_batch, s.batches) for s in (span_at(recipe, update) for update in range(55))]
    assert list(dict.fromkeys(cuts)) == [
        (0, 0, 16, 0, 16), (1, 16, 20, 16, 4), (2, 20, 36, 20, 16), (3, 36, 52, 36, 16), (4, 52, 55, 52, 3)
    ]  # fmt: skip
    assert all(first <= update < end for update, (_, first, end, _, _) in enumerate(cuts))
    used_again = recipe.model_copy(update={"target_uses": 3})
    first, second = span_at(used_again, 0), span_at(used_again, 20)
    assert (first.end, first.batches, second.first_batch, second.batches) == (20, 7, 7, 12)
    long = tiny_recipe(tiny_base, phases=[{"updates": 10**4, **modes}], target_uses=3)
    assert span_at(long, 3 * REUSED_POOL_BATCHES).first_batch == REUSED_POOL_BATCHES


def test_a_roll_out_takes_the_students_own_sampling_steps(model: TorchModel, tiny_base: Path) -> None:
    recipe = tiny_recipe(tiny_base)
    grid = recipe.grid
    noises = torch.randn(4, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = model.encode_ids(model.tokenizer(CAPTIONS[:5]))
    starts = torch.tensor([3, 3, 0, 2, 1])
    visits = torch.tensor([[True] * 4, [False, False, True, False], [True] * 4, [True] * 4, [False] * 4])
    simulated = torch.tensor([True, True, True, False, True])
    with torch.no_grad():
        found = roll_out(model, noises, starts, visits, simulated, conditioning, recipe)

    def by_hand(sample: int, modes: list[int]) -> Tensor:
        own = {name: values[sample : sample + 1] for name, values in conditioning.items()}
        x0 = torch.zeros(1, 4, 8, 8)
        for mode in modes:
            time = torch.tensor([grid.solver_times()[grid.mode_indices()[mode]]])
            noise = noises[mode][sample : sample + 1]
            x0 = predict_x0(model, noise if mode == 0 else renoise(x0, noise, *levels(model, time)), time, own)
        return x0[0]

    with torch.no_grad():
        for sample, modes in enumerate(([0, 1, 2], [0, 2], [], [], [0])):
            wanted = by_hand(sample, modes)
            assert (found[sample] - wanted).norm() <= 1e-3 * wanted.norm()  # zeros where there was nothing to do
    assert found.flatten(1).norm(dim=1)[[0, 1, 4]].min() > 1


def test_prompts_alone_start_from_noise_or_from_the_students_own_steps(
    model: TorchModel, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_base, data={"source": str(_prompts(tmp_path))})
    data, solved = _solved(model, recipe, tmp_path)
    assert not data.has_images
    assert set(solved.times.tolist()) == set(recipe.grid.solver_times())
    assert torch.equal(solved.z0, solved.x0)  # what the adversarial loss takes for real
    alpha, _ = levels(model, solved.times)
    pure = solved.times == 999
    assert solved.x_t[pure].std() == pytest.approx(1, abs=0.1)
    # Elsewhere there is a signal below the noise: the student's, larger than what noise alone would leave.
    assert (solved.x_t[~pure].square().mean(dim=(1, 2, 3)) > 1.2).any()
    assert not torch.allclose(solved.x_t, solved.x0 * alpha)


@pytest.mark.slow
@pytest.mark.parametrize("own_steps", [0.0, 1.0], ids=["images", "own steps"])
def test_images_are_below_the_noise_but_not_at_the_first_time_nor_where_the_students_own_steps_are(
    own_steps: float, model: TorchModel, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = {"updates": POOL_BATCHES, "mode_weights": (1, 1, 1, 1), "backward_simulation": own_steps}
    recipe = tiny_recipe(tiny_base, phases=[phase])
    _, plain = _solved(model, recipe, tmp_path)
    latents = Dataset.latents
    monkeypatch.setattr(Dataset, "latents", lambda data, items: 10 * latents(data, items))
    _, other = _solved(model, recipe, tmp_path)
    is_pure = plain.times == 999
    assert is_pure.any()
    assert not is_pure.all()
    same = (plain.x_t == other.x_t).flatten(1)
    assert same[is_pure].all()
    assert (same.all(dim=1) == (is_pure | bool(own_steps))).all()


def test_a_consistency_target_is_the_students_answer_one_step_of_the_teacher_further(
    model: TorchModel, tiny_base: Path, tmp_path: Path
) -> None:
    phases = [{"updates": POOL_BATCHES, "mode_weights": (1, 1, 1, 1)}]
    recipe = tiny_recipe(tiny_base, target="consistency", guidance=(2.0, 2.0), phases=phases)
    data, solved = _solved(model, recipe, tmp_path)
    times = [*recipe.grid.solver_times(), -1]
    conditional, empty = data.conditioning(solved.items), model.unconditional()
    assert empty
    alphas, sigmas = (torch.from_numpy(x).float() for x in model.spec.sampler.schedule.levels(times))
    seen = set()
    for sample in range(2 * POOL_BATCHES):
        index = times.index(int(solved.times[sample]))
        if index in seen:
            continue
        seen.add(index)
        x_t, time = solved.x_t[sample : sample + 1], solved.times[sample : sample + 1]
        own = {name: values[sample : sample + 1] for name, values in conditional.items()}
        with torch.no_grad():
            model.network.disable_adapters()
            x0 = 2 * predict_x0(model, x_t, time, own) - predict_x0(model, x_t, time, empty)
            model.network.enable_adapters()
            wanted = ode_step(x_t, x0, alphas[index], sigmas[index], alphas[index + 1], sigmas[index + 1])
            if index + 1 < recipe.grid.solver_steps:
                wanted = predict_x0(model, wanted, torch.tensor([times[index + 1]]), own)
        torch.testing.assert_close(solved.x0[sample : sample + 1], wanted, atol=2e-3, rtol=1e-3)
    assert seen == set(range(4))


@pytest.mark.parametrize("changes", [{"target": "consistency"}, {"prompts": True}], ids=lambda changes: next(iter(changes)))
@pytest.mark.slow
def test_a_killed_run_that_draws_on_the_student_goes_on_exactly(
    changes: dict[str, Any], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes.pop("prompts", False):
        changes["data"] = {"source": str(_prompts(tmp_path))}
    phases = [{"updates": 21, "mode_weights": (1, 1, 1, 1)}]
    lora = {"rank": 2, "alpha": 4}
    recipe = tiny_recipe(tiny_base, phases=phases, learning_rate=0.01, checkpoint_every=18, batch_size=1, lora=lora, **changes)
    new_pool, last = loop._new_pool, weakref.WeakSet[Pool]()

    def new_pool_alone(*inputs: Any) -> Pool:
        gc.collect()
        assert not last  # the pool before is let go of first
        last.add(pool := new_pool(*inputs))
        return pool

    monkeypatch.setattr(loop, "_new_pool", new_pool_alone)
    distill(recipe, tmp_path / "whole")
    monkeypatch.undo()
    learn = loop.Student.learn

    def learn_until_killed(student: loop.Student, loss: float) -> None:
        if student.update == 19:  # in the second pool, which depends on the weights that were
            raise KeyboardInterrupt
        learn(student, loss)

    monkeypatch.setattr(loop.Student, "learn", learn_until_killed)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "broken")
    monkeypatch.undo()
    distill(recipe, tmp_path / "broken")
    whole, broken = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "training" / "log.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_runs_that_need_the_same_targets_share_them(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, pools = tiny_recipe(tiny_base, batch_size=1), tmp_path / "pools"
    for name, folder in (("alone", None), ("first", pools)):
        distill(recipe, tmp_path / name, pools=folder)
    make_pool = loop.make_pool
    monkeypatch.setattr(loop, "make_pool", lambda *_, **__: pytest.fail("solved again"))
    distill(recipe, tmp_path / "second", pools=pools)
    distill(recipe.model_copy(update={"learning_rate": 0.01}), tmp_path / "other", pools=pools)
    alone, *same, other = (load_file(tmp_path / name / WEIGHTS) for name in ("alone", "first", "second", "other"))
    assert all(torch.equal(alone[name], found[name]) for found in same for name in alone)
    assert any(not torch.equal(alone[name], other[name]) for name in alone)
    solved: list[int] = []
    monkeypatch.setattr(
        loop, "make_pool", lambda *inputs, **others: (solved.append(inputs[-1].index), make_pool(*inputs, **others))[1]
    )
    distill(recipe.model_copy(update={"seed": 1}), tmp_path / "another seed", pools=pools)
    distill(recipe.model_copy(update={"guidance": (2.0, 3.0)}), tmp_path / "another guidance", pools=pools)
    assert solved == [0, 0]
