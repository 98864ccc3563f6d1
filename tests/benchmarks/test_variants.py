"""The ablation's variants."""

import pytest

from benchmarks.variants import BY_TEXT, GROUPS, VARIANTS, make_variant
from flashdiff.config import load_recipe
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.costs import cost


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_costs_the_same_budget(name: str) -> None:
    recipe = load_recipe(bundled_recipe("avatars.toml"), Recipe)
    budget = cost(make_variant(recipe, "distillation", 0, 1.0), BY_TEXT)
    changed = make_variant(recipe, name, 7, 1.0)
    assert cost(changed, BY_TEXT) == pytest.approx(budget, rel=0.01)
    assert changed.seed == 7
    assert cost(make_variant(recipe, name, 7, 0.5), BY_TEXT) == pytest.approx(budget / 2, rel=0.02)


def test_variants_differ_in_what_their_names_say() -> None:
    recipe = load_recipe(bundled_recipe("avatars.toml"), Recipe)
    made = {name: make_variant(recipe, name, 0, 1.0) for name in VARIANTS}
    assert len({one.content_hash for one in made.values()}) == len(VARIANTS)
    assert made["distillation"].updates == recipe.updates < made["ours"].updates
    assert [phase.adversarial for phase in made["paper"].phases] == [0.0, 0.1, 0.3]
    assert [phase.distribution_matching for phase in made["paper"].phases] == [0.0, 0.3, 0.7]
    assert not any(phase.distribution_matching + phase.backward_simulation for phase in made["distillation"].phases)
    assert made["ours"].warmup_updates / made["ours"].updates == pytest.approx(recipe.warmup_updates / recipe.updates, rel=0.01)
    assert made["lcm"].grid.inference_times(4) == recipe.grid.inference_times(4)


def test_the_audits_variants_differ_from_ours_in_one_thing_each() -> None:
    recipe = load_recipe(bundled_recipe("avatars.toml"), Recipe)
    made = {name: make_variant(recipe, name, 0, 1.0) for name in GROUPS["audit"]}
    assert 2 * made["ours+k8"].grid.solver_steps == made["ours"].grid.solver_steps
    assert made["ours+constant"].learning_rate_decay == 0
    assert (made["ours+fresh"].pool_batches, made["ours+fresh"].target_uses) == (64, 2)
    assert made["ours+whitened"].loss.settings("distillation").kind == "whitened"
    for name in ("ours+roles", "ours+roles-critic"):
        assert not made[name].loss.settings("distribution_matching").first_step
    made = {name: make_variant(recipe, name, 0, 1.0) for name in GROUPS["own-step"]}
    for name in ("ours+own-step", "ours+own-step-critic"):
        assert made[name].loss.settings("distribution_matching").own_step
    assert made["ours+own-step"].updates == made["ours"].updates
