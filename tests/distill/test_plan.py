"""The plan tells what then happens."""

from pathlib import Path

import pytest
import torch
from recipes import tiny_recipe
from tiny import FAMILIES

from flashdiff import cli
from flashdiff.distill.config import Phase
from flashdiff.distill.network import run_network
from flashdiff.distill.plan import activation_bytes, cost, plan, remaining_s, teacher_evaluations
from flashdiff.families import load_base
from flashdiff.lora import add_adapter

PAPER = ((0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2))


@pytest.mark.parametrize(("weights", "steps"), list(zip(PAPER, (12.0, 17.4, 19.6, 21.9), strict=True)))
def test_the_papers_phases_cost_the_solver_steps_they_are_known_to(
    weights: tuple[float, ...], steps: float, tiny_base: Path
) -> None:
    recipe = tiny_recipe(tiny_base, grid={"solver_steps": 32})
    assert teacher_evaluations(recipe, Phase(updates=1, mode_weights=weights)) == pytest.approx(2 * steps, abs=0.1)


def test_a_network_that_takes_its_guidance_as_an_input_costs_the_teacher_half(tiny_base: Path) -> None:
    recipe = tiny_recipe(tiny_base)  # four updates, 2.5 solver steps each on average, and 3 for the student both ways
    assert (cost(recipe), cost(recipe, guided_twice=False)) == pytest.approx((4 * (5 + 3), 4 * (2.5 + 3)))


def test_a_plan_counts_parameters_apart_and_writes_nothing(tiny_base: Path, tmp_path: Path, flash_lora: Path) -> None:
    loss = {"distribution_matching": {"fake_score": "lora", "critic_updates": 2}}
    phases = [{"updates": 3, "mode_weights": (1, 1, 1, 1)}, {"updates": 5, "mode_weights": (1, 0, 0, 0), "adversarial": 0.1}]
    phases[1]["distribution_matching"] = 0.3
    lines = "\n".join(plan(tiny_recipe(tiny_base, phases=phases, loss=loss)))
    assert "fake score LoRA" in lines
    assert "discriminator head" in lines
    # The student's 3, and the critic's 2 x 3.
    assert "0 to 3: distillation 1; per sample and update 5.0 evaluations of the teacher's ODE, 9 forward passes" in lines
    assert "3 to 8: distillation 1, adversarial 0.1, distribution matching 0.3" in lines
    assert "ODE, 18 forward passes" in lines  # adversarial 3 + 3 and matching 3 more
    assert "16 in 8 updates of 2" in lines
    assert not list(tmp_path.iterdir())


def test_a_dry_run_is_the_same_command_with_a_word_more(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "tiny.toml", tmp_path / "out"
    recipe.write_text(
        f"base = '{tiny_base}'\nguidance = [2.0, 4.0]\nbatch_size = 2\nlearning_rate = 1e-3\ndata = {{ source = 'images' }}\n"
        "grid = { solver_steps = 4 }\nlora = { rank = 2, alpha = 4 }\nphases = [{ updates = 4, mode_weights = [1, 1, 1, 1] }]\n"
    )
    assert cli.main(["distill", str(recipe), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "LoRA rank 2" in told
    assert cli.main(["distill", str(recipe), "--out", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out == told
    assert not out.exists()


def test_a_plan_counts_what_other_targets_and_inputs_cost(tiny_base: Path) -> None:
    one_phase = [{"updates": 3, "mode_weights": (0, 0, 0, 1)}]
    lines = "\n".join(plan(tiny_recipe(tiny_base, phases=one_phase, target="consistency", loss={"distillation": "perceptual"})))
    assert "2.0 evaluations of the teacher's ODE, 7 forward passes" in lines  # student, its answer as target, the features
    lines = "\n".join(plan(tiny_recipe(tiny_base, phases=[{**one_phase[0], "backward_simulation": 0.5}])))
    assert "2.2 evaluations of the teacher's ODE, 4 forward passes" in lines  # mostly the last mode: two of three earlier steps


def test_the_time_that_remains_counts_pools_and_dearer_phases_to_come(tiny_base: Path) -> None:
    modes = {"mode_weights": (0, 0, 0, 1)}
    recipe = tiny_recipe(tiny_base, phases=[{"updates": 20, **modes}, {"updates": 20, **modes, "distribution_matching": 0.5}])
    # 10 updates of 3 passes and 20 of 6; the pool of 16 updates is there, 24 more are to be solved.
    assert remaining_s(recipe, 10, target_s=0.5, update_s=1.0) == pytest.approx(10 * 1 + 20 * 2 + 24 * 0.5, rel=0.01)
    # In the second phase, which has a pool for 16 updates and one for the last 4.
    assert remaining_s(recipe, 33, target_s=0.5, update_s=2.0) == pytest.approx(7 * 2 + 4 * 0.5)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_activations_are_what_a_real_pass_keeps(name: str, tmp_path: Path) -> None:
    family, model = load_base(str(FAMILIES[name](tmp_path / name)))
    add_adapter(model, family.lora_targets, rank=2, alpha=4, seed=0)
    conditioning = model.encode_ids(model.tokenizer(["a dog", "two cats"]))
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x):
        run_network(model, torch.randn(2, *model.spec.latent_shape(model.spec.sizes[0])), torch.tensor([999, 249]), conditioning)
    weights = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    real = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights)
    assert 2 * activation_bytes(model, checkpointing=False) == pytest.approx(real, rel=0.25)
    assert activation_bytes(model, checkpointing=True) < real / 4
