"""The training program on the tiny model."""

import json
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from recipes import image_folder, tiny_recipe
from safetensors.torch import load_file

from flashdiff.config import load_recipe
from flashdiff.distill import loop
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.loop import distill
from flashdiff.errors import LoraError, TrainingError
from flashdiff.families import load_base
from flashdiff.lora import FlashInfo, find_lora, fuse
from flashdiff.lora_files import FLASH, WEIGHTS


def test_the_lora_loads_in_stock_diffusers_and_fuses_to_the_same_network(tiny_base: Path, flash_lora: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([999, 249]), torch.randn(2, 16, 32))
    with torch.no_grad():
        base = pipeline.unet(*inputs).sample
        pipeline.load_lora_weights(flash_lora)
        stock = pipeline.unet(*inputs).sample
        family, model = load_base(str(tiny_base))
        fuse(model, family, [(flash_lora, 1.0)])
        fused = model.denoiser(*inputs)
    assert (stock - base).abs().max() > 1e-3  # the LoRA does something
    torch.testing.assert_close(fused, stock, atol=1e-5, rtol=0)
    assert pipeline.unet.peft_config["default_0"].lora_alpha == 4  # rank is 2: alpha is kept


def test_flash_json_tells_grid_base_and_sizes(tiny_base: Path, flash_lora: Path) -> None:
    info = FlashInfo.model_validate_json((flash_lora / FLASH).read_text())
    assert info.base_hash == load_base(str(tiny_base))[1].base_hash
    assert info.inference["4"] == [999, 749, 499, 249]
    assert info.lora_parameters == sum(values.numel() for values in load_file(flash_lora / WEIGHTS).values())


def test_the_card_tells_exact_times_cost_and_where_the_losses_ended(flash_lora: Path) -> None:
    card = (flash_lora / "README.md").read_text()
    assert "timesteps=[999, 749, 499, 249]" in card
    lines = [json.loads(line) for line in (flash_lora / "training" / "log.jsonl").read_text().splitlines()]
    ended = statistics.mean(line["distillation"] for line in lines)
    assert f"distillation {ended:.3g}" in card
    assert f"last {len(lines)} updates" in card
    # Four updates of two samples: 3 for the student's two ways, twice the 2.5 solver steps that are left on average.
    assert "64 forward passes" in card


@pytest.mark.slow
def test_a_killed_run_goes_on_and_equals_the_unbroken_one(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_base, phases=[{"updates": 24, "mode_weights": (1, 1, 1, 1)}], target_uses=2, checkpoint_every=7)
    distill(recipe, tmp_path / "whole")

    class KilledError(Exception):
        pass

    learn = loop.Student.learn

    def learn_until_killed(student: loop.Student, loss: float) -> None:
        if student.update == 19:  # between two checkpoints, in the second use of a pool
            raise KilledError
        learn(student, loss)

    monkeypatch.setattr(loop.Student, "learn", learn_until_killed)
    with pytest.raises(KilledError):
        distill(recipe, tmp_path / "broken")
    assert not (tmp_path / "broken" / FLASH).exists()
    with (tmp_path / "broken" / "training" / "log.jsonl").open("a") as file:
        file.write('{"update": 19, "lo')  # as a kill within the write leaves it
    monkeypatch.undo()
    distill(recipe.model_copy(update={"checkpoint_every": 6}), tmp_path / "broken")

    whole_log, broken_log = ((tmp_path / name / "training" / "log.jsonl").read_text() for name in ("whole", "broken"))
    assert whole_log == broken_log
    whole, broken = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_kill_at_any_moment(tiny_base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
base = "{tiny_base}"
guidance = [2.0, 4.0]
batch_size = 2
learning_rate = 0.01
checkpoint_every = 4
data = {{ source = "{image_folder(tmp_path / "images")}" }}
grid = {{ solver_steps = 4 }}
lora = {{ rank = 2, alpha = 4 }}
phases = [{{ updates = 60, mode_weights = [1, 1, 1, 1] }}]
""")

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flashdiff", "distill", str(recipe), "--out", str(tmp_path / out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    log = tmp_path / "broken" / "training" / "log.jsonl"
    assert start("whole").wait(800) == 0
    for updates in (9, 30):  # wherever it is by then: in an update, a checkpoint, a line of the log
        run = start("broken")
        deadline = time.monotonic() + 600
        while (not log.exists() or log.read_text().count("\n") < updates) and time.monotonic() < deadline:
            time.sleep(0.001)
        run.kill()
        assert run.wait(600) == -signal.SIGKILL
    assert start("broken").wait(800) == 0
    assert log.read_text() == (tmp_path / "whole" / "training" / "log.jsonl").read_text()
    whole, broken = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_the_student_learns_the_teachers_targets(tiny_base: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_base, phases=[{"updates": 64, "mode_weights": (1, 0, 0, 0)}], target_uses=4, learning_rate=1e-2)
    distill(recipe, tmp_path / "out")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-16:]) < 0.8 * sum(losses[:16])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_batch_and_checkpoint(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = loop.student_x0
    monkeypatch.setattr(loop, "student_x0", lambda *inputs: honest(*inputs) * float("nan"))
    with pytest.raises(TrainingError, match=r"update 0: loss nan .* not finite; the batch is in .*bad_batch\.pt"):
        distill(tiny_recipe(tiny_base), tmp_path / "out")
    assert (tmp_path / "out" / "training" / "bad_batch.pt").exists()


def test_a_finished_folder_and_a_folder_of_another_recipe_are_refused(tiny_base: Path, flash_lora: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds a finished run of another recipe"):
        distill(tiny_recipe(tiny_base), flash_lora)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "recipe.json").write_text('{"hash": "other"}')
    with pytest.raises(TrainingError, match="holds a run of another recipe, which differs in base, seed, "):
        distill(tiny_recipe(tiny_base), tmp_path)


def test_a_mistyped_source_can_be_mended_and_a_finished_run_is_left_alone(tiny_base: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_base)
    mistyped = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": f"{recipe.data.source}s"})})
    with pytest.raises(TrainingError, match="is neither 'avatars' nor a folder"):
        distill(mistyped, tmp_path / "out")
    assert distill(recipe, tmp_path / "out")
    written = (tmp_path / "out" / FLASH).stat().st_mtime_ns
    assert not distill(recipe, tmp_path / "out")
    assert (tmp_path / "out" / FLASH).stat().st_mtime_ns == written


def test_a_lora_of_another_base_is_refused_by_hash(flash_lora: Path, tmp_path: Path) -> None:
    from tiny import make_tiny_sd15

    other = make_tiny_sd15(tmp_path / "other", seed=1)
    family, model = load_base(str(other))
    with pytest.raises(LoraError, match=r"was trained on .* build it with its own base"):
        fuse(model, family, [(flash_lora, 1.0)])
    with pytest.raises(LoraError, match="no LoRA 'nothing'"):
        find_lora("nothing")


def test_a_style_lora_with_the_flash_lora_adds_its_own_change(tiny_base: Path, flash_lora: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    _, drawn = load_base(str(tiny_base))
    drawn.network.add_adapter(LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=["to_k", "to_v"]))
    style = tmp_path / "style"
    StableDiffusionPipeline.save_lora_weights(style, unet_lora_layers=get_peft_model_state_dict(drawn.network))
    # Without its configuration in the file, a LoRA's alpha is its rank: half of what `drawn` had.

    def weights(loras: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
        family, model = load_base(str(tiny_base))
        fuse(model, family, loras)
        return dict(model.network.named_parameters())

    base, flash, styled, both = (
        weights(loras) for loras in ([], [(flash_lora, 1.0)], [(style, 0.7)], [(flash_lora, 1.0), (style, 0.7)])
    )
    for name, value in base.items():
        torch.testing.assert_close(both[name] - value, (flash[name] - value) + (styled[name] - value), atol=1e-5, rtol=1e-4)
    assert all(any((one[name] - value).abs().max() > 1e-3 for name, value in base.items()) for one in (flash, styled))

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([999, 249]), torch.randn(2, 16, 32))
    pipeline.load_lora_weights(flash_lora, weight_name=WEIGHTS, adapter_name="flash")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.set_adapters(["flash", "style"], [1.0, 0.7])
    family, model = load_base(str(tiny_base))
    fuse(model, family, [(flash_lora, 1.0), (style, 0.7)])
    with torch.no_grad():
        torch.testing.assert_close(model.denoiser(*inputs), pipeline.unet(*inputs).sample, atol=1e-4, rtol=1e-4)


def test_an_unfinished_run_and_layers_that_the_base_lacks_are_not_fused(
    tiny_base: Path, flash_lora: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import save_file

    unfinished = Path(shutil.copytree(flash_lora, tmp_path / "unfinished"))
    (unfinished / FLASH).unlink()
    with pytest.raises(LoraError, match="unfinished training run"):
        find_lora(str(unfinished))
    family, model = load_base(str(tiny_base))
    style = tmp_path / "style"
    style.mkdir()
    weights = load_file(flash_lora / WEIGHTS)
    save_file({**weights, "text_encoder.layer.lora_A.weight": torch.zeros(2, 2)}, style / WEIGHTS)
    with pytest.raises(
        LoraError, match=r"'text_encoder\.layer\.lora_A\.weight': the text_encoder of this base has no layer 'layer'"
    ):
        fuse(model, family, [(style, 1.0)])
    (style / WEIGHTS).write_bytes(b"garbage")
    with pytest.raises(LoraError, match="is damaged"):
        fuse(model, family, [(style, 1.0)])
    for key, said in (
        ("lora_te_text_model.lora_up.weight", "the text_encoder of this base has no layer 'text_model'"),
        (f"{_layer()}.hada_w1_a", "its hada_w1_b, hada_w2_a, hada_w2_b is missing"),
    ):
        save_file({key: torch.zeros(2, 2)}, style / WEIGHTS)
        with pytest.raises(LoraError, match=said):
            fuse(model, family, [(style, 1.0)])


def _layer() -> str:
    return "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("name", [path.stem for path in bundled_recipe("avatars.toml").parent.glob("*.toml")])
def test_the_shipped_recipes_read(name: str) -> None:
    recipe = load_recipe(bundled_recipe(f"{name}.toml"), Recipe)
    assert recipe.grid.solver_times()[0] == 999
    is_own = name in ("avatars", "sd15-one-step")  # the others have the paper's phases
    assert is_own or [phase.distribution_matching for phase in recipe.phases] == [0, 0.3, 0.5, 0.7]


def test_a_consistency_student_is_no_teacher(tmp_path: Path) -> None:
    from tiny import STUDENTS

    base = STUDENTS["sana-sprint"](tmp_path / "sprint")
    with pytest.raises(TrainingError, match="is a consistency student already, and no teacher; distil the base it comes from"):
        distill(tiny_recipe(base), tmp_path / "out")


def test_a_grid_of_another_length_than_the_bases_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"grid\.num_train_timesteps is 500, the base was trained on 1000"):
        distill(tiny_recipe(tiny_base, grid={"num_train_timesteps": 500, "solver_steps": 4}), tmp_path / "out")
