"""What helps: variants of a recipe, several seeds each, at an equal budget of network evaluations, measured as `evaluate` does.

    python benchmarks/ablation.py --out ablation --scale 0.05 --only distillation,+adversarial,paper,lcm,ours
    python benchmarks/ablation.py --out ablation --scale 0.05          # then the rest; what is there is not run again

The first line should take about an hour on two cores and the second another, by a model of the costs and not by a run: 4.1 ms
a sample's forward pass, 30 s a row, 5 minutes for the teacher, renders and their encoding once. The table holds all
that is there.

The budget is what the recipe's own length, times `--scale`, costs with the variant `distillation`, in forward passes of the
network: the teacher's, the student's and those of the other losses, a backward pass as what it takes beside them
(`flashdiff.distill.costs.cost`). A variant that costs more an update gets fewer updates, in all phases and the warm-up alike.
Each is charged for all its targets; those that several variants need with the same seed are solved once and kept in OUT/pools.
Learning rate, batch and LoRA are the recipe's for all, so a variant that needs others is not at its best. At a small scale pools
of targets are small too, and soon known by heart: what `ours-reuse` says there is not said of the recipe's own length.

Models are measured on other prompts than those of `evaluate`, so that what is chosen here can still be judged there.

A killed ablation goes on where it was. Results of another base, recipe, variant, budget or measure in OUT are refused.
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import environment
from flashdiff.components import Components
from flashdiff.config import load_recipe
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.costs import cost
from flashdiff.distill.loop import distill
from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.evaluation.evaluate import Subject, Yardstick, make_images, measure
from flashdiff.evaluation.features import feature_extractor, text_scorer
from flashdiff.evaluation.images import WORLD, WORLD_SIZE, read_prompts, read_reference, real_images
from flashdiff.families import find_base
from flashdiff.families.base import base_hash
from flashdiff.files import write_whole
from flashdiff.lora import FLASH, load_fused, read_flash_info

TEACHER = "teacher"
_TEACHER_STEPS = 50
_IMAGE_SEEDS = 2
_PROMPT_SEED = 35_000_000  # of scenes that neither a training nor `evaluate` uses
_PAPER = {"adversarial": {"kind": "lsgan", "r1_weight": 0.0}, "distribution_matching": {"times": (0.0, 1.0)}}

_DISTILLATION_ALONE = {"backward_simulation": (0.0, 0.0), "distribution_matching": (0.0, 0.0)}

VARIANTS: dict[str, dict[str, Any]] = {
    # The paper, loss by loss: every target used once. Weights are those of its first, second and last phase.
    "distillation": {"target_uses": 1, "phases": _DISTILLATION_ALONE},
    "+adversarial": {"target_uses": 1, "loss": _PAPER, "phases": {**_DISTILLATION_ALONE, "adversarial": (0.0, 0.1, 0.3)}},
    "paper": {
        "target_uses": 1,
        "loss": _PAPER,
        "phases": {**_DISTILLATION_ALONE, "adversarial": (0.0, 0.1, 0.3), "distribution_matching": (0.0, 0.3, 0.7)},
    },
    # LCM: one teacher step and the averaged student from there, over all times of the grid alike.
    "lcm": {"target_uses": 1, "target": "consistency", "every_time": True, "phases": _DISTILLATION_ALONE},
    # Ours: targets are used again, later phases start from the student's own steps too, and the last one matches distributions;
    # then one change each.
    "ours": {},
    "ours-reuse": {"target_uses": 1},
    "ours-simulation": {"phases": {"backward_simulation": (0.0, 0.0)}},
    "ours-matching": {"phases": {"distribution_matching": (0.0, 0.0)}},
    "ours+huber": {"loss": {"distillation": "pseudo_huber"}},
    "ours+perceptual": {"loss": {"distillation": "perceptual"}},
    "ours+adversarial": {"phases": {"adversarial": (0.02, 0.05)}},
    "ours+critic": {"loss": {"distribution_matching": {"fake_score": "lora"}}},
}
"""Changes of the recipe by name; under `phases`, values by phase, the last for all later ones."""

METRICS = ("FID", "KID x1000", "large %", "small %", "text", "diversity")


def variant(recipe: Recipe, name: str, seed: int, scale: float) -> Recipe:
    """The recipe changed as `name` says, as long as the budget allows: `scale` times the length of `recipe`."""
    budget = scale * cost(_changed(recipe, VARIANTS["distillation"]))
    changed = _changed(recipe, {**VARIANTS[name], "seed": seed})
    share = budget / cost(changed)
    phases = [{**phase.model_dump(), "updates": max(1, round(phase.updates * share))} for phase in changed.phases]
    settings = {
        "phases": phases,
        "warmup_updates": round(recipe.warmup_updates * sum(phase["updates"] for phase in phases) / recipe.updates),
        "checkpoint_every": max(1, sum(phase["updates"] for phase in phases) // 4),
        "preview_prompts": (),
    }
    return Recipe.model_validate({**changed.model_dump(), **settings})


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    settings = {key: value for key, value in changes.items() if key not in ("phases", "every_time")}
    phases = [phase.model_dump() for phase in recipe.phases]
    for name, values in changes.get("phases", {}).items():
        for index, phase in enumerate(phases):
            phase[name] = values[min(index, len(values) - 1)]
    grid = recipe.grid.model_dump()
    if changes.get("every_time"):
        grid["modes"] = grid["solver_steps"]
        for phase in phases:
            phase["mode_weights"] = (1,) * grid["modes"]
    return Recipe.model_validate({**recipe.model_dump(), "grid": grid, "phases": phases, **settings})


class Meter:
    """What every model is measured with, made once: networks and reference of `flashdiff evaluate avatars`, and other prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.prompts = read_prompts(WORLD, options.count, _PROMPT_SEED)
        reference = read_reference(WORLD, options.reference_count, WORLD_SIZE)
        features, scorer = feature_extractor("avatars"), text_scorer("avatars")
        self.yardstick = Yardstick(features, scorer, reference)
        self.networks = [features.name, scorer.name]

    def real(self) -> dict[str, float]:
        """Metrics of real images: the floor."""
        return self._numbers(Subject(real_images(self.prompts, _IMAGE_SEEDS, WORLD_SIZE)))

    def rows(self, model: Components, name: str, steps: Sequence[int]) -> dict[str, dict[str, float]]:
        """Metrics by number of steps; the images' noise is the same for every model."""
        return {
            str(count): self._numbers(
                make_images(model, self.prompts, seeds=_IMAGE_SEEDS, steps=count, name=f"{name}, {count} steps", report=_report)
            )
            for count in steps
        }

    def _numbers(self, subject: Subject) -> dict[str, float]:
        row, _ = measure(subject, self.yardstick)
        assert row.kid
        assert row.text
        assert row.diversity
        found = {"FID": row.fid, "KID x1000": row.kid, "text": row.text, "diversity": row.diversity}
        shares = {f"{name} %": 100 * row.attributes[name].value for name in ("large", "small")}
        return {**{name: estimate.value for name, estimate in found.items()}, **shares}


def run(recipe: Recipe, out: Path, meter: Meter, steps: Sequence[int]) -> None:
    """Train and measure one variant with one seed, unless it has been; OUT.json gets updates, cost, and rows by steps.

    ConfigError when the run that is there is of another recipe: the variant has changed since.
    """
    result = out.with_suffix(".json")
    if (info := read_flash_info(out)) and info.recipe_hash != recipe.content_hash:
        raise ConfigError(f"{out} holds a run of another recipe: its variant has changed; choose another --out or remove it")
    if result.exists():
        return
    if not (out / FLASH).exists():
        distill(recipe, out, pools=out.parent / "pools")
    _, student = load_fused(recipe.base, [(out, 1.0)], None)
    found = {"updates": recipe.updates, "cost": round(cost(recipe)), "rows": meter.rows(student, out.name, steps)}
    write_whole(result, json.dumps(found, indent=2) + "\n")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line a variant and number of steps: the mean over seeds, and their standard deviation where there are several."""
    head = ["variant", "seeds", "updates", "steps", *METRICS]
    lines = [head, ["---"] * len(head)]
    for name, seeds in results.items():
        for steps in seeds[0]["rows"]:
            cells = [_mean([seed["rows"][steps][metric] for seed in seeds]) for metric in METRICS]
            lines.append([name, str(len(seeds)), str(seeds[0]["updates"]), steps, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and write OUT/ablation.md and OUT/ablation.json after every run, so that a kill loses one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="runs and results are kept here")
    parser.add_argument("--recipe", type=Path, default=bundled_recipe("avatars.toml"), help="default: the embedded model's")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[*VARIANTS], metavar="NAME[,NAME...]", help="variants; default: all"
    )
    parser.add_argument("--seeds", type=_whole_numbers, default=(0, 1, 2), metavar="N[,N...]", help="default: 0,1,2")
    parser.add_argument("--steps", type=_whole_numbers, default=(4, 2), metavar="N[,N...]", help="default: 4,2")
    parser.add_argument("--scale", type=float, default=1.0, help="budget in lengths of the recipe; default: %(default)s")
    parser.add_argument("--count", type=int, default=150, help="prompts, with two seeds each; default: %(default)s")
    parser.add_argument("--reference-count", type=int, default=5000, help="reference images; default: %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("flashdiff").setLevel(logging.INFO)
    try:
        _ablate(options)
    except FlashdiffError as error:
        print(f"ablation: error: {error}", file=sys.stderr)
        return 1
    return 0


def _ablate(options: argparse.Namespace) -> None:
    if unknown := [name for name in options.only if name not in VARIANTS]:
        raise ConfigError(f"--only {unknown[0]}: the variants are {', '.join(VARIANTS)}")
    recipe = load_recipe(options.recipe, Recipe)
    meter = Meter(options)
    settings = {
        "recipe": recipe.content_hash,
        "base": base_hash(find_base(recipe.base)),
        **{name: getattr(options, name) for name in ("scale", "count", "reference_count")},
        "steps": list(options.steps),
        "prompts": _PROMPT_SEED,
        "networks": meter.networks,
    }
    _claim(options.out / "settings.json", settings)
    teacher = options.out / f"{TEACHER}.json"
    if not teacher.exists():
        _, base = load_fused(recipe.base, (), sum(recipe.guidance) / 2)
        steps = (_TEACHER_STEPS, *(count for count in options.steps if count > 1))
        rows = {"real": meter.real(), **meter.rows(base, TEACHER, steps)}
        write_whole(teacher, json.dumps({"updates": 0, "cost": 0, "rows": rows}, indent=2) + "\n")
    for seed in options.seeds:  # all variants with one seed first: a table of all comes early
        for name in options.only:
            run(variant(recipe, name, seed, options.scale), options.out / f"{name}-{seed}", meter, options.steps)
            results = _results(options.out)
            record = {"environment": environment({}), "settings": settings, "results": results}
            write_whole(options.out / "ablation.json", json.dumps(record, indent=2) + "\n")
            write_whole(options.out / "ablation.md", table(results) + "\n")


def _results(out: Path) -> dict[str, list[dict[str, Any]]]:
    """What all runs in `out` have found, by variant, a seed each."""
    files = {TEACHER: [out / f"{TEACHER}.json"]} | {name: sorted(out.glob(f"{name}-[0-9]*.json")) for name in VARIANTS}
    return {name: [json.loads(file.read_text()) for file in of] for name, of in files.items() if of}


def _claim(path: Path, settings: Mapping[str, Any]) -> None:
    """ConfigError when the results there are of another model, recipe, budget or measure: they would share a table."""
    before = json.loads(path.read_text()) if path.exists() else settings
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        raise ConfigError(f"{path.parent} holds results of another {', '.join(changed)}; choose another --out or remove it")
    write_whole(path, json.dumps(settings, indent=2) + "\n")


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
