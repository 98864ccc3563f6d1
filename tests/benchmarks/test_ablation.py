import pytest

from benchmarks.ablation import VARIANTS, table, variant
from flashdiff.config import load_recipe
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.plan import cost


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_costs_the_same_budget(name: str) -> None:
    recipe = load_recipe(bundled_recipe("avatars.toml"), Recipe)
    budget = cost(variant(recipe, "distillation", 0, 1.0))
    changed = variant(recipe, name, 7, 1.0)
    assert cost(changed) == pytest.approx(budget, rel=0.01)
    assert changed.seed == 7
    assert cost(variant(recipe, name, 7, 0.5)) == pytest.approx(budget / 2, rel=0.02)


def test_variants_differ_in_what_they_name() -> None:
    recipe = load_recipe(bundled_recipe("avatars.toml"), Recipe)
    made = {name: variant(recipe, name, 0, 1.0) for name in VARIANTS}
    assert len({one.content_hash for one in made.values()}) == len(VARIANTS)
    assert made["distillation"].updates == recipe.updates < made["ours"].updates
    assert [phase.adversarial for phase in made["paper"].phases] == [0.1, 0.3]
    assert made["lcm"].grid.inference_times(4) == recipe.grid.inference_times(4)


def test_the_table_tells_mean_and_spread_over_seeds() -> None:
    row = {"FID": 2.0, "KID x1000": 1.0, "large %": 90.0, "small %": 50.0, "text": 80.0, "diversity": 4.0}
    runs = [{"updates": 9, "seconds": 60, "rows": {"2": {**row, "FID": value}}} for value in (2.0, 4.0)]
    last = table({"ours": runs}).splitlines()[-1]
    assert (
        last
        == "| ours | 2 | 9 | 1.0 | 2 | 3.00 ± 1.41 | 1.00 ± 0.00 | 90.00 ± 0.00 | 50.00 ± 0.00 | 80.00 ± 0.00 | 4.00 ± 0.00 |"
    )
