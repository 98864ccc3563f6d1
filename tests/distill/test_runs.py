"""What a run leaves behind and how it ends: checkpoints, curves, previews, and errors that say what to do."""

import errno
import itertools
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import tiny_recipe

from flashdiff import checkpoint
from flashdiff.distill import loop, processes
from flashdiff.distill.loop import distill
from flashdiff.distill.student import Student
from flashdiff.errors import ConfigError, TrainingError
from flashdiff.families import load_base
from flashdiff.generate import generate
from flashdiff.lora import add_adapter, load_fused
from flashdiff.lora_files import FLASH
from flashdiff.tasks import check_order

pytestmark = pytest.mark.slow

PROMPTS = ("a dog", "a cat")


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    settings = {"batch_size": 1, "checkpoint_every": 2, "learning_rate": 0.05, "preview_prompts": PROMPTS}
    recipe = tiny_recipe(tiny_base, phases=[{"updates": 6, "mode_weights": (1, 1, 1, 1)}], checkpoints_keep=2, **settings)
    distill(recipe, out)
    return out


def test_the_last_checkpoints_stay(run: Path) -> None:
    assert [path.name for path in sorted((run / "training" / "checkpoints").iterdir())] == ["000004.pt", "000006.pt"]


def test_curves_and_previews_are_drawn_for_tensorboard(run: Path) -> None:
    (events,) = (run / "training" / "tensorboard").iterdir()
    assert all(name in events.read_bytes() for name in (b"distillation", b"latent_std", b"preview"))


def test_a_preview_shows_the_teacher_and_the_student_from_the_same_noise(run: Path, tiny_base: Path) -> None:
    sheet = np.asarray(Image.open(run / "training" / "previews" / "000006.png"))
    rows = [np.split(row, len(PROMPTS), axis=1) for row in np.split(sheet, 4)]  # teacher, then the student at 4, 2 and 1 steps
    _, teacher = load_base(str(tiny_base))
    _, student = load_fused(str(tiny_base), [(run, 1.0)], None)
    teacher.spec = teacher.spec.model_copy(update={"sampler": teacher.spec.sampler.model_copy(update={"guidance": 3.0})})
    for row, model, steps in zip(rows, (teacher, student, student, student), (50, 4, 2, 1), strict=True):
        for seed, (shown, prompt) in enumerate(zip(row, PROMPTS, strict=True)):
            drawn = generate(model, [check_order(model.spec, prompt=prompt, seed=seed, steps=steps)])[0][0]
            assert np.abs(shown.astype(int) - drawn).max() <= 2
    assert (rows[0][0] != rows[3][0]).any()


def test_a_full_disk_leaves_the_last_good_checkpoint(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tiny_base, checkpoint_every=2, batch_size=1)
    save = torch.save

    def full_at_the_second(state: Any, file: Any) -> None:
        save(state, file)
        if "000004" in os.readlink(f"/proc/self/fd/{file.fileno()}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_at_the_second)
    with pytest.raises(TrainingError, match=r"cannot save the checkpoint .*No space left.* the one before is untouched"):
        distill(recipe, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "training" / "checkpoints").iterdir()] == ["000002.pt"]
    monkeypatch.undo()
    distill(recipe, tmp_path / "out")
    assert (tmp_path / "out" / FLASH).exists()


def test_after_ten_updates_a_run_tells_how_long_the_rest_takes_and_so_does_one_that_goes_on(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks)))  # every pool and update takes a second
    recipe = tiny_recipe(tiny_base, phases=[{"updates": 36, "mode_weights": (0, 0, 0, 1)}], checkpoint_every=12, batch_size=1)
    learn = Student.learn

    def learn_until_killed(student: Student, loss: float) -> None:
        if student.update == 14:
            raise KeyboardInterrupt
        learn(student, loss)

    with caplog.at_level("INFO"):
        with monkeypatch.context() as patch:
            patch.setattr(Student, "learn", learn_until_killed)
            with pytest.raises(KeyboardInterrupt):
                distill(recipe, tmp_path / "out")
        assert "1 s an update and 0.0625 s for its targets, by the first 10: about 0:00:27 to go" in caplog.text
        caplog.clear()
        distill(recipe, tmp_path / "out")  # from update 12, with 14 to go after ten
    assert "by the first 10: about 0:00:14 to go" in caplog.text


ADVERSARIAL = {"updates": 4, "mode_weights": (1, 1, 1, 1), "adversarial": 1.0}


@pytest.mark.parametrize(
    ("problem", "changes", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            {},
            "with 2 samples at a time: set accumulate = 2, or gradient_checkpointing = true, or",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB"),
            {"accumulate": 2, "gradient_checkpointing": True},
            "with 1 samples at a time: set a smaller lora.rank or batch_size; the last checkpoint is untouched",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            {"accumulate": 2, "target_batch": 8},
            "with 1 samples at a time: set target_batch = 1, or gradient_checkpointing = true, or",
        ),
    ],
    ids=["gpu", "cpu", "targets"],
)
def test_out_of_memory_says_what_to_turn(
    problem: Exception, changes: dict[str, Any], said: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(loop, "make_pool", greedy)
    with pytest.raises(TrainingError, match=said):
        distill(tiny_recipe(tiny_base, **changes), tmp_path / "out")


@pytest.mark.parametrize(("student", "lora"), [("lora", {"rank": 1, "alpha": 1}), ("full", None)])
def test_out_of_memory_advises_to_shard_a_frozen_network_alone(
    student: str, lora: dict[str, Any] | None, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    recipe = tiny_recipe(tiny_base, student=student, lora=lora)
    with pytest.raises(TrainingError) as caught, loop._explained_out_of_memory(recipe):
        raise MemoryError
    assert ("shard_base" in str(caught.value)) == (student == "lora")


def test_a_missing_tracker_is_named(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="tracker 'wandb' needs 'wandb', which is not installed"):
        distill(tiny_recipe(tiny_base, tracker="wandb"), tmp_path / "out")


def test_a_recipe_with_a_mistake_is_mended_in_the_same_place(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="taps"):
        distill(tiny_recipe(tiny_base, phases=[ADVERSARIAL], loss={"adversarial": {"taps": [0.5]}}), tmp_path / "out")
    distill(tiny_recipe(tiny_base), tmp_path / "out")


def test_previews_and_their_numbers_have_rising_steps_on_wandb(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B ignores a step that is lower than one before."""
    steps: list[int] = []
    run = SimpleNamespace(log=lambda values, step: steps.append(step), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run, Image=lambda sheet: sheet))
    distill(tiny_recipe(tiny_base, tracker="wandb", preview_prompts=["a dog"]), tmp_path / "out")
    assert steps == sorted(steps)


def test_copies_among_the_checkpoints_are_left_alone(tiny_base: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out" / "training" / "checkpoints" / "good.pt"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"a copy")
    distill(tiny_recipe(tiny_base), tmp_path / "out")
    assert sorted(path.name for path in kept.parent.iterdir()) == ["000004.pt", "good.pt"]


def test_the_best_checkpoint_depends_on_when_there_are_checkpoints(tiny_base: Path, tmp_path: Path) -> None:
    work = tmp_path / "training"
    work.mkdir()
    loop._save_recipe(work, tiny_recipe(tiny_base, keep_best=2), {})
    loop._check_recipe(work, tiny_recipe(tiny_base, keep_best=2, checkpoints_keep=3))
    with pytest.raises(TrainingError, match="another recipe, which differs in checkpoint_every"):
        loop._check_recipe(work, tiny_recipe(tiny_base, keep_best=2, checkpoint_every=2))


def test_a_run_on_wandb_goes_on_in_its_own_curve_and_another_in_the_same_place_does_not(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def init(*, id: str, **_: Any) -> Any:
        started.append(id)
        return SimpleNamespace(log=lambda values, step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    recipe, out = tiny_recipe(tiny_base, tracker="wandb"), tmp_path / "out"
    distill(recipe, out)
    (out / FLASH).unlink()
    distill(recipe, out)
    shutil.rmtree(out)
    distill(recipe, out)
    first, again, other = started
    assert first == again != other


def test_latents_that_stay_too_large_stop_the_run_and_a_spike_does_not(tiny_base: Path) -> None:
    recipe = tiny_recipe(tiny_base)
    _, model = load_base(recipe.base)
    add_adapter(model, recipe.lora.targets, rank=2, alpha=2, seed=0)
    student = Student(model, recipe)
    for update in range(200):
        student.bound(5.0 if update % 50 == 20 else 1.7, 1.0)

    def stay_large() -> None:
        for _ in range(60):
            student.bound(2.5, 1.0)

    with pytest.raises(TrainingError, match=r"latents have grown to 2\.0. times the teacher's; lower the weights"):
        stay_large()
