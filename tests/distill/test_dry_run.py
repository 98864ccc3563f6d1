"""What a dry run says of a recipe."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import tiny_recipe
from tiny import FAMILIES, make_tiny_upscaler

from flashdiff import cli
from flashdiff.config import load_recipe
from flashdiff.distill import processes
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.dry_run import activation_bytes, dry_run
from flashdiff.distill.network import run_network
from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.families import load_base
from flashdiff.lora import add_adapter


def test_a_dry_run_counts_parameters_apart_and_writes_nothing(tiny_base: Path, tmp_path: Path, flash_lora: Path) -> None:
    loss = {"distribution_matching": {"fake_score": "lora", "critic_updates": 2}}
    phases = [{"updates": 3, "mode_weights": (1, 1, 1, 1)}, {"updates": 5, "mode_weights": (1, 0, 0, 0), "adversarial": 0.1}]
    phases[1]["distribution_matching"] = 0.3
    lines = "\n".join(dry_run(tiny_recipe(tiny_base, phases=phases, loss=loss)))
    assert "fake score LoRA" in lines
    assert "discriminator head" in lines
    # The student's 3, the critic's 2 x 3, and the discriminator's 3 halves, which train from the start.
    assert (
        "0 to 3: distillation 1; per sample and update 5.0 evaluations of the teacher's ODE, 10.5 other forward passes" in lines
    )
    assert "3 to 8: distillation 1, adversarial 0.1, distribution matching 0.3" in lines
    assert "ODE, 15 other forward passes" in lines  # adversarial 3 halves and matching 3 more
    assert "16 in 8 updates of 2" in lines
    assert "held out" not in lines
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
    shown = capsys.readouterr().out
    assert "LoRA rank 2" in shown
    assert cli.main(["distill", str(recipe), "--out", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out == shown
    assert not out.exists()


def test_a_dry_run_counts_the_held_out_samples(tiny_base: Path) -> None:
    lines = "\n".join(dry_run(tiny_recipe(tiny_base, keep_best=6, checkpoint_every=3)))
    # From the four modes in turn 4, 3, 2, 1, 4 and 3 steps, guided.
    assert (
        "held out 6 samples: 34 evaluations of the teacher's ODE when the run starts, and 6 of the student at each of "
        "2 checkpoints" in lines
    )


@pytest.mark.slow
def test_a_dry_run_counts_what_other_targets_and_inputs_cost(tiny_base: Path) -> None:
    one_phase = [{"updates": 3, "mode_weights": (0, 0, 0, 1)}]
    lines = "\n".join(
        dry_run(tiny_recipe(tiny_base, phases=one_phase, target="consistency", loss={"distillation": "perceptual"}))
    )
    assert (
        "2.0 evaluations of the teacher's ODE, 5.5 other forward passes" in lines
    )  # student, its answer as target, the features
    lines = "\n".join(dry_run(tiny_recipe(tiny_base, phases=[{**one_phase[0], "backward_simulation": 0.5}])))
    assert (
        "2.2 evaluations of the teacher's ODE, 4 other forward passes" in lines
    )  # mostly the last mode: two of three earlier steps


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.slow
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


SHIPPED = {"avatars": "sd15", "sd35": "sd3", "sd15-one-step": "sd15", "sd15-inpainting": "sd15", "sdxl-canny": "sdxl"}
SHIPPED |= {name: name for name in ("sd15", "sdxl", "pixart", "pixart-sigma", "sd3", "flux", "z-image", "sana")}
SHIPPED |= {name: name for name in ("qwen-image", "flux2-klein")} | {"sd-x4-upscaler": "sd-upscaler"}
"""Every shipped recipe with its base's family."""


def test_every_shipped_recipe_is_known_here() -> None:
    assert {path.stem for path in bundled_recipe("avatars.toml").parent.glob("*.toml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.slow
def test_every_shipped_recipe_starts_at_one_two_four_and_eight_processes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = {**FAMILIES, "sd-upscaler": make_tiny_upscaler}[SHIPPED[name]]
    base = make(tmp_path / "base")  # a tiny one in place of the recipe's own
    changes = {"base": str(base), "controls": (), "preview_prompts": ()}  # which are too long for the tiny one
    recipe = load_recipe(bundled_recipe(f"{name}.toml"), Recipe).model_copy(update=changes)
    for count in (1, 2, 4, 8):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        lines = "\n".join(dry_run(recipe))
        assert f" that {recipe.batch_size // (count * recipe.accumulate)} samples at a time keep" in lines
        for index in range(count):
            monkeypatch.setattr(processes, "index", lambda index=index: index)
            rows = processes.rows(recipe.batch_size, recipe.accumulate)
            assert rows[-1].stop - rows[0].start == recipe.batch_size // count


def test_a_dry_run_refuses_what_a_run_would_refuse(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="shard_base spreads the network over processes, this run has one"):
        next(dry_run(tiny_recipe(tiny_base, shard_base=True)))
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(ConfigError, match="batch_size 2 cannot be split over 4 processes; make it a multiple of 4"):
        next(dry_run(tiny_recipe(tiny_base)))
    assert "1 samples at a time" in "\n".join(dry_run(tiny_recipe(tiny_base, shard_base=True, batch_size=4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw_8bit"}, "optimizer 'adamw_8bit' needs an NVIDIA GPU"),
        ({"tracker": "wandb"}, "tracker 'wandb' needs 'wandb', which is not installed"),
        (
            {"grid": {"solver_steps": 4, "num_train_timesteps": 500}},
            "num_train_timesteps is 500, the base was trained on 1000",
        ),
        ({"preview_prompts": ("very " * 70,)}, r"preview_prompts: .* it has \d+ tokens, at most 16 fit; shorten it"),
        (
            {"lora": {"rank": 2, "alpha": 4, "targets": ("to_q", "to_kk")}},
            "lora.targets: no layer is called 'to_kk', nor ends in it",
        ),
        ({"lora": {"rank": 2, "alpha": 4, "targets": ("all", "to_q")}}, "lora.targets: no layer is called 'all', nor ends in it"),
    ],
)
def test_a_dry_run_refuses_what_base_and_machine_cannot_do(
    changes: dict[str, Any], message: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FlashdiffError, match=message):
        list(dry_run(tiny_recipe(tiny_base, **changes)))
