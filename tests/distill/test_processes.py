"""The same run in one process, in parts, in two processes, and with activations computed again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import reserved_ports
from recipes import tiny_recipe
from safetensors.torch import load_file
from tiny import make_tiny_sd15

from flashdiff.distill import processes
from flashdiff.distill.config import Recipe
from flashdiff.distill.loop import distill
from flashdiff.distill.processes import Draws
from flashdiff.errors import ConfigError
from flashdiff.lora_files import WEIGHTS

pytestmark = pytest.mark.slow

RUN = """
import sys
from pathlib import Path
from flashdiff.distill import processes
from flashdiff.distill.config import Recipe
from flashdiff.distill.loop import distill
processes._BUCKET = 10_000  # several messages of gradients
for recipe in sys.argv[1:]:
    distill(Recipe.model_validate_json(Path(recipe).read_text()), Path(recipe).with_suffix(""))
print(processes.index(), processes.count())
"""


def _recipe(base: Path, **changes: Any) -> Recipe:
    """All losses and opponents, drawing on the student too."""
    phase = {"updates": 2, "mode_weights": (1, 1, 1, 1), "adversarial": 0.1, "distribution_matching": 0.3}
    phase["backward_simulation"] = 0.5
    settings: dict[str, Any] = {
        "lora": {"rank": 2, "alpha": 4},
        "phases": [phase],
        "loss": {"distribution_matching": {"fake_score": "lora", "critic_updates": 2}},
        "checkpoint_every": 2,
        "learning_rate": 0.01,
    }
    return tiny_recipe(base, **{**settings, **changes})


def _told(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


def _assert_alike(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(found) == len(wanted) == 2
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-6)


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What one process tells of the whole batch."""
    out = tmp_path_factory.mktemp("alone") / "out"
    distill(_recipe(tiny_base), out)
    return _told(out)


@pytest.fixture
def inpainting(tmp_path: Path) -> Recipe:
    """Of a base that reads masks, which are drawn, and images, whose conditions the processes share."""
    base = make_tiny_sd15(tmp_path / "base", in_channels=9)
    index = base / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    return _recipe(base)


def test_two_processes_tell_the_same_losses_as_one_with_and_without_a_sharded_base(
    tiny_base: Path, tmp_path: Path, alone: list[dict[str, float]], inpainting: Recipe
) -> None:
    runs = {"whole": {}, "sharded": {"shard_base": True, "gradient_checkpointing": True}}
    recipes = {name: _recipe(tiny_base, **changes) for name, changes in runs.items()}
    others = {"inpainting": inpainting, "full": _recipe(tiny_base, student="full", learning_rate=1e-4, keep_best=2)}
    for name, recipe in {**recipes, **others}.items():
        (tmp_path / f"{name}.json").write_text(recipe.model_dump_json())
    with reserved_ports(1) as (port,):
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", RUN, *(str(tmp_path / f"{name}.json") for name in (*runs, *others))],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=860) for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors[-1500:] for _, errors in said)
    assert [lines for lines, _ in said] == ["0 2\n", "1 2\n"]  # two that worked together, not each on its own
    for name in runs:
        assert (tmp_path / name / "flash.json").exists()
        _assert_alike(_told(tmp_path / name), alone)
    for name, recipe in others.items():
        distill(recipe, tmp_path / f"{name} alone")
        _assert_alike(_told(tmp_path / name), _told(tmp_path / f"{name} alone"))


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"gradient_checkpointing": True}], ids=str)
def test_less_memory_changes_no_loss(
    changes: dict[str, Any], tiny_base: Path, tmp_path: Path, alone: list[dict[str, float]]
) -> None:
    distill(_recipe(tiny_base, **changes), tmp_path / "out")
    _assert_alike(_told(tmp_path / "out"), alone)


def test_a_network_in_bfloat16_trains_a_lora_in_float32(
    tiny_base: Path, tmp_path: Path, alone: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "precision", lambda: torch.bfloat16)  # as on a GPU; autocast works on CPUs too
    distill(_recipe(tiny_base), tmp_path / "out")
    assert all(values.dtype == torch.float32 for values in load_file(tmp_path / "out" / WEIGHTS).values())
    first, wanted = _told(tmp_path / "out")[0]["distillation"], alone[0]["distillation"]
    assert first != wanted
    assert first == pytest.approx(wanted, rel=0.1)


def test_a_part_of_a_batch_draws_what_the_whole_batch_would() -> None:
    def drawn(rows: slice | None) -> list[torch.Tensor]:
        draws = Draws(torch.Generator().manual_seed(0), 6, rows)
        return [draws.normal((2, 3)), draws.uniform(), draws.integers(0, 1000)]

    whole = drawn(None)
    for values, first, second in zip(whole, drawn(slice(0, 2)), drawn(slice(2, 6)), strict=True):
        assert torch.equal(torch.cat([first, second]), values)
    assert whole[0].std() > 0.5


def test_a_batch_that_cannot_be_split_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size 2 cannot be split over 1 processes in 3 parts each"):
        distill(_recipe(tiny_base, accumulate=3), tmp_path / "out")


def test_the_8_bit_optimizer_says_that_it_needs_a_gpu(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="optimizer 'adamw_8bit' needs an NVIDIA GPU"):
        distill(_recipe(tiny_base, optimizer="adamw_8bit"), tmp_path / "out")


def test_sharding_over_one_process_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard_base spreads the network over processes, this run has one"):
        distill(_recipe(tiny_base, shard_base=True), tmp_path / "out")
