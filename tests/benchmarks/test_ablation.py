"""The ablation's runs and table."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation
from benchmarks.ablation import ablation_table, difference_table
from benchmarks.variants import VARIANTS
from flashdiff.distill import loop

pytestmark = pytest.mark.slow


def test_tables_have_mean_and_standard_error_over_seeds_and_pairs_of_one_seed() -> None:
    metrics = {"FID": 2.0, "second FID": 3.0, "KID x1000": 1.0, "large %": 90.0, "small %": 50.0, "text": 80.0, "diversity": 4.0}
    runs = [{"updates": 9, "rows": {"2": {**metrics, "FID": value}}} for value in (2.0, 4.0)]
    last = ablation_table({"ours": runs}).splitlines()[-1]
    others = "3.00 ± 0.00 | 1.00 ± 0.00 | 90.00 ± 0.00 | 50.00 ± 0.00 | 80.00 ± 0.00 | 4.00 ± 0.00 |"
    assert last == f"| ours | 2 | 9 | 2 | 3.00 ± 1.00 | {others}"

    def seeds(*values: float) -> list[dict[str, Any]]:
        return [{"seed": seed, "updates": 9, "rows": {"2": {**metrics, "FID": value}}} for seed, value in enumerate(values)]

    differences = difference_table({"ours": seeds(2.0, 40.0), "ours+fresh": seeds(1.0, 37.0, 9.0)}, "ours").splitlines()
    assert len(differences) == 3
    assert differences[-1].startswith("| ours+fresh - ours | 2 | 2 | -2.00 ± 1.00 | +0.00 ± 0.00 |")


def test_interrupted_ablation_resumes_and_results_of_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("""
base = "avatars"
guidance = [3.0, 3.0]
batch_size = 2
learning_rate = 1e-3
data = { source = "avatars", images = 8 }
grid = { solver_steps = 4 }
lora = { rank = 1, alpha = 1 }
phases = [{ updates = 2, mode_weights = [0, 0, 0, 1] }]
""")
    monkeypatch.setattr(ablation, "_TEACHER_STEPS", 4)
    solved: list[int] = []
    make_pool = loop.make_pool
    monkeypatch.setattr(
        loop, "make_pool", lambda *inputs, **others: (solved.append(inputs[-1].index), make_pool(*inputs, **others))[1]
    )
    few = ["--recipe", str(recipe), "--out", str(tmp_path / "out"), "--count", "4", "--reference-count", "8", "--steps", "2"]
    assert ablation.main([*few, "--only", "distillation", "--seeds", "0"]) == 0
    capsys.readouterr()
    assert ablation.main([*few, "--only", "distillation,lcm", "--seeds", "0,1"]) == 0
    assert "| lcm - distillation | 2 | 2 |" in capsys.readouterr().out
    assert ablation.main([*few, "--only", "ours+k61"]) == 1
    assert "--only ours+k61: the variants are" in capsys.readouterr().err
    assert solved == [0] * 4  # three new runs after the first
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())["results"]
    assert [list(run["rows"]) for run in found["teacher"]] == [["real", "4", "2"]]
    assert [len(found[name]) for name in ("distillation", "lcm")] == [2, 2]
    assert found["distillation"][0]["rows"]["2"]["FID"] != found["distillation"][1]["rows"]["2"]["FID"]
    assert ablation.main([*few, "--scale", "0.5"]) == 1
    assert "holds results of another scale" in capsys.readouterr().err
    settings = tmp_path / "out" / "settings.json"
    settings.write_text(settings.read_text().replace("avatars probe", "another probe"))
    assert ablation.main(few) == 1
    assert "holds results of another networks" in capsys.readouterr().err
    settings.unlink()
    monkeypatch.setitem(VARIANTS, "distillation", {"target_uses": 2})
    assert ablation.main([*few, "--only", "distillation", "--seeds", "0"]) == 1
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_ablation_measures_on_other_prompts_than_evaluate() -> None:
    prompts = ablation.read_prompts("avatars", 60, ablation._PROMPT_SEED)
    assert not {prompt.scene for prompt in prompts} & {prompt.scene for prompt in ablation.read_prompts("avatars", 60)}
