"""A made-up loss that this file alone registers: recipes accept it, it trains, and the log, the dry run and the card name it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from recipes import image_folder
from safetensors.torch import load_file
from torch import Tensor

from flashdiff.checkpoint import load_state
from flashdiff.config import Record, load_recipe
from flashdiff.distill import loop
from flashdiff.distill.batch import MicroBatch
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.dry_run import dry_run
from flashdiff.distill.loop import distill
from flashdiff.distill.losses.base import Opponent, Setup, StudentLoss
from flashdiff.distill.terms import TERMS, Cost, Term
from flashdiff.errors import ConfigError
from flashdiff.lora_files import WEIGHTS


class CentringSettings(Record):
    passes: int = Field(1, ge=0)


class Centring(StudentLoss):
    """Keeps the mean of the student's latents at a centre, which an opponent moves away from it."""

    opponent: Opponent

    def __init__(self, setup: Setup, settings: CentringSettings) -> None:
        self._setup = setup

    def start(self) -> None:
        self._centre = torch.nn.Parameter(torch.zeros(1, device=self._setup.model.device))
        self.opponent = Opponent("centre", "centre", [self._centre], torch.optim.SGD([self._centre], lr=0.1))

    def loss(self, batch: MicroBatch) -> Tensor:
        return (batch.x0.mean() - self._centre.detach()).square().squeeze()

    def train_opponent(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        loss = self.opponent.learn(batches, lambda batch: -(batch.x0.mean() - self._centre).square().squeeze())
        return {"centre": loss}

    def state_dict(self) -> dict[str, Any]:
        return {"centre": self._centre.detach()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self._centre.copy_(state["centre"])


MADE_UP = Term(
    name="latent_centring",
    settings=CentringSettings,
    default_settings=CentringSettings(),
    cost=lambda settings: Cost(in_use=settings.passes, throughout=5),
    build=Centring,
)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, MADE_UP.name, MADE_UP)


def _recipe(tmp_path: Path, base: Path, phase: str = "latent_centring = 0.5", loss: str = "latent_centring.passes = 7") -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
base = "{base}"
guidance = [2.0, 4.0]
batch_size = 2
learning_rate = 1e-3
checkpoint_every = 1
data = {{ source = "{image_folder(tmp_path / "images")}" }}
grid = {{ solver_steps = 4 }}
lora = {{ rank = 2, alpha = 4 }}
[loss]
{loss}
[[phases]]
updates = 1
mode_weights = [1, 1, 1, 1]
[[phases]]
updates = 1
mode_weights = [1, 1, 1, 1]
{phase}
""")
    return load_recipe(path, Recipe)


@pytest.mark.slow
def test_a_registered_loss_trains_and_is_in_the_log_the_checkpoint_the_dry_run_and_the_card(
    made_up: None, tiny_base: Path, tmp_path: Path
) -> None:
    recipe, out = _recipe(tmp_path, tiny_base), tmp_path / "out"
    lines = "\n".join(dry_run(recipe))
    assert "centre 1 parameters" in lines
    # The student's 3 and the 5 of the opponent; then the 7 of the loss too.
    assert "0 to 1: distillation 1; per sample and update 5.0 evaluations of the teacher's ODE, 8 other forward passes" in lines
    assert "1 to 2: distillation 1, latent centring 0.5; per sample" in lines
    assert "ODE, 15 other forward passes" in lines

    distill(recipe, out)
    first, second = (json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines())
    assert "latent_centring" not in first
    assert second["loss"] == pytest.approx(second["distillation"] + second["latent_centring"])
    assert {"centre"} < set(first) & set(second)
    state = load_state(out / "training" / "checkpoints" / "000002.pt")["objective"]
    assert state["centre"] != 0
    card = (out / "README.md").read_text()
    assert f"latent centring {second['latent_centring']:.3g}" in card


def test_a_registered_losss_gradient_moves_the_student_and_its_opponent_resumes(
    made_up: None, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it, without = _recipe(tmp_path, tiny_base), _recipe(tmp_path, tiny_base, phase="", loss="")
    distill(with_it, tmp_path / "whole")
    distill(without, tmp_path / "without")
    learn = loop.Student.learn

    def learn_until_killed(student: loop.Student, loss: float) -> None:
        if student.update == 1:
            raise KeyboardInterrupt
        learn(student, loss)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Student, "learn", learn_until_killed)
        with pytest.raises(KeyboardInterrupt):
            distill(with_it, tmp_path / "broken")
    distill(with_it, tmp_path / "broken")
    whole, broken, other = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken", "without"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert any(not torch.equal(whole[name], other[name]) for name in whole)
    logs = [(tmp_path / name / "training" / "log.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_its_keys_are_refused_unless_it_is_registered(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'phases\.1\.latent_centring'") as caught:
        _recipe(tmp_path, tiny_base)
    assert "unknown key 'loss.latent_centring'" in str(caught.value)


@pytest.mark.parametrize(
    ("phase", "loss", "message"),
    [
        ("latent_centering = 0.5", "", r"unknown key 'phases\.1\.latent_centering', did you mean 'latent_centring'\?"),
        ("latent_centring = -1", "", r"'phases\.1\.latent_centring' = -1: input should be greater than or equal to 0"),
        ("", "latent_centring.pass = 1", r"unknown key 'loss\.latent_centring\.pass', did you mean 'passes'\?"),
        ("", "latent_centring = 3", r"'loss\.latent_centring' = 3: input should be a valid dictionary"),
        (
            "distillation = 0",
            "",
            r"a phase needs a loss: distillation, adversarial, distribution_matching and latent_centring are",
        ),
    ],
)
def test_its_keys_are_checked_like_any_other(
    phase: str, loss: str, message: str, made_up: None, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        _recipe(tmp_path, tiny_base, phase, loss)


def test_registering_a_loss_changes_no_other_recipes_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = bundled_recipe("sd15.toml")
    before = load_recipe(shipped, Recipe).content_hash
    monkeypatch.setitem(TERMS, MADE_UP.name, MADE_UP)
    assert load_recipe(shipped, Recipe).content_hash == before


def test_a_recipe_is_checked_without_torch() -> None:
    code = """
import sys
from flashdiff.config import load_recipe
from flashdiff.distill.config import Recipe, bundled_recipe
load_recipe(bundled_recipe("sd15.toml"), Recipe)
print({"torch", "diffusers", "peft", "accelerate"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


def test_a_recipe_survives_its_own_json(made_up: None, tiny_base: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, tiny_base)
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe
    assert again.loss.settings(MADE_UP.name) == CentringSettings(passes=7)
    assert again.content_hash == recipe.content_hash
