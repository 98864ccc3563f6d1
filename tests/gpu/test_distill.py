"""Distillation on an NVIDIA GPU, in bfloat16 as by default there. Run with -m gpu."""

import json
import math
from pathlib import Path

import pytest
from recipes import tiny_recipe

from flashdiff.distill.loop import distill
from flashdiff.lora import read_flash_info

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("loss", [{}, {"adversarial": 0.1, "distribution_matching": 0.3}], ids=["distillation", "all losses"])
def test_a_lora_is_trained_on_the_gpu(tiny_base: Path, tmp_path: Path, loss: dict[str, float]) -> None:
    recipe = tiny_recipe(tiny_base, phases=[{"updates": 6, "mode_weights": (1, 1, 1, 1), **loss}])
    distill(recipe, tmp_path / "flash")
    info = read_flash_info(tmp_path / "flash")
    assert info is not None
    assert info.updates == 6
    lines = [json.loads(line) for line in (tmp_path / "flash" / "training" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(math.isfinite(line["distillation"]) for line in lines)
