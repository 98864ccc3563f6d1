from pathlib import Path

import pytest

from flashdiff.config import load_recipe, parse_record
from flashdiff.distill.config import Recipe, bundled_recipe, find_recipe
from flashdiff.engines.config import BuildRecipe
from flashdiff.errors import ConfigError

GOOD = bundled_recipe("avatars.toml").read_text()


def _load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, Recipe)


def test_equal_recipes_have_equal_hashes_whatever_their_layout(tmp_path: Path) -> None:
    assert _load(tmp_path, GOOD).content_hash == _load(tmp_path, "# again\n\n" + GOOD.replace(" = ", "=")).content_hash
    assert _load(tmp_path, GOOD).content_hash != _load(tmp_path, GOOD.replace("rank = 4", "rank = 8")).content_hash


def test_a_bare_name_finds_the_bundled_recipe_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bare = Path("avatars.toml")
    assert find_recipe(bare) == bundled_recipe("avatars.toml")
    assert find_recipe(tmp_path / bare) == tmp_path / bare
    assert find_recipe(Path("none.toml")) == Path("none.toml")
    bare.write_text(GOOD)
    assert find_recipe(bare) == bare


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("batch_size = ", "batch_siez = ", r"unknown key 'batch_siez', did you mean 'batch_size'\?"),
        ("rank = 4", "rnak = 4", r"unknown key 'lora.rnak', did you mean 'rank'\?"),
        ("mode_weights = ", "mode_weigths = ", r"unknown key 'phases.0.mode_weigths', did you mean 'mode_weights'\?"),
        ("rank = 4", "seed = 4", r"unknown key 'lora.seed'; 'seed' stands above the first \[table\]"),
        (
            "base = ",
            'loss = { distillation = "l3" }\nbase = ',
            r"'loss.distillation.kind' = 'l3': input should be 'l2'",
        ),
        ("rank = 4", "rank = 0", r"'lora.rank' = 0: input should be greater than or equal to 1"),
        ("base = ", "# base = ", r"'base' is missing"),
        ("guidance = [", "guidance = [5.0, 3.0]  # [", r"guidance must be two rising positive numbers"),
        ("mode_weights = [0.4, 0.2, 0.2, 0.2]", "mode_weights = [1]", r"mode_weights must be 4 numbers"),
        ("solver_steps = 16", "solver_steps = 18", r"solver_steps must be a multiple"),
        ("base = ", "base ", r"not a TOML file"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_with_the_key(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in GOOD
    with pytest.raises(ConfigError, match=message) as caught:
        _load(tmp_path, GOOD.replace(before, after, 1))
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read the recipe"):
        load_recipe(tmp_path / "none.toml", Recipe)


@pytest.mark.parametrize("key", ["base", "vae", "variant", "config", "preset", "sampler"])
def test_an_empty_name_is_none(key: str) -> None:
    with pytest.raises(ConfigError, match=f"f: '{key}' = '': string should have at least 1 character"):
        parse_record({"base": "avatars", key: ""}, BuildRecipe, source="f")
