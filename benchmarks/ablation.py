"""What helps in training: variants of a recipe with several seeds at an equal budget of network evaluations.

    python benchmarks/ablation.py --out ablation --scale 0.05 --only distillation,+adversarial,paper,lcm,ours
    python benchmarks/ablation.py --out ablation --scale 0.05          # the rest; finished runs are kept
    python benchmarks/ablation.py --out audit --scale 0.05 --only audit  # what an audit of the method asked for

Each of the first two should take an hour on two cores. That is an estimate, not a measurement: 4.1 ms per forward pass of a
sample, 30 s per model and number of steps to evaluate, and 5 minutes once for the teacher, renders and their encoding. The table
holds all finished runs.

The budget is the cost of the variant `distillation` at the recipe's length times `--scale`. Costs are counted in forward passes
of the network, by teacher, student and losses; a backward pass counts as the forward passes that take as long
(`flashdiff.distill.costs.cost`). A variant whose updates cost more gets fewer of them, in all phases and the warm-up alike. It is
charged for all its targets, although targets that several variants need with the same seed are solved once and kept in OUT/pools.
Learning rate, batch and LoRA are the recipe's for every variant, so a variant that needs others is not at its best. At a small
scale, pools of targets are small too and soon overfitted, so the result of `ours-reuse` does not carry over to the full length.

Models are measured as `flashdiff evaluate` does, but with other prompts, so that `evaluate` can still judge what is chosen here.

The tables give means over the seeds with their standard errors: one of the numbers themselves, and one of the differences from
the first variant of `--only` with the same seed, which leaves out what a seed does to both.

An interrupted ablation resumes. OUT with results of another base, recipe, variant, budget or metric is refused.
"""

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import command_parser, run_command, write_results
from benchmarks.environment import read_environment
from benchmarks.markdown_table import markdown_table
from benchmarks.variants import BY_TEXT, GROUPS, VARIANTS, make_variant
from flashdiff.components import Components
from flashdiff.config import load_recipe
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.costs import cost
from flashdiff.distill.loop import distill
from flashdiff.errors import ConfigError
from flashdiff.evaluation.evaluate import Evaluator, Subject, make_images, measure
from flashdiff.evaluation.features import feature_extractor, second_extractor, text_scorer
from flashdiff.evaluation.images import WORLD, WORLD_SIZE, read_prompts, read_reference, real_images
from flashdiff.families import find_base
from flashdiff.families.files import base_hash
from flashdiff.files import write_whole
from flashdiff.lora import load_fused, read_flash_info
from flashdiff.lora_files import FLASH
from flashdiff.samplers.options import SamplingOptions

TEACHER = "teacher"
_TEACHER_STEPS = 50
_IMAGE_SEEDS = 2
_PROMPT_SEED = 35_000_000  # of scenes that neither training nor `evaluate` uses
METRICS = ("FID", "second FID", "KID x1000", "large %", "small %", "text", "diversity")


class Meter:
    """The metrics that every model is measured with: those of `flashdiff evaluate avatars`, on other prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.prompts = read_prompts(WORLD, options.count, _PROMPT_SEED)
        reference = read_reference(WORLD, options.reference_count, WORLD_SIZE)
        features, second, scorer = feature_extractor(WORLD), second_extractor(WORLD), text_scorer(WORLD)
        assert second
        self.evaluator = Evaluator(features, scorer, reference, second)
        self.networks = [features.name, second.name, scorer.name]

    def measure_real(self) -> dict[str, float]:
        """The metrics of real images, which a perfect model would reach."""
        return self._metrics(Subject(real_images(self.prompts, _IMAGE_SEEDS, WORLD_SIZE)))

    def measure_model(self, model: Components, name: str, steps: Sequence[int]) -> dict[str, dict[str, float]]:
        """The metrics by number of steps; every model starts from the same noise."""
        return {
            str(count): self._metrics(
                make_images(model, self.prompts, seeds=_IMAGE_SEEDS, steps=count, name=f"{name}, {count} steps", report=_report)
            )
            for count in steps
        }

    def _metrics(self, subject: Subject) -> dict[str, float]:
        found, _ = measure(subject, self.evaluator)
        assert found.second_fid
        assert found.kid
        assert found.text
        assert found.diversity
        estimates = {"FID": found.fid, "second FID": found.second_fid, "KID x1000": found.kid}
        estimates |= {"text": found.text, "diversity": found.diversity}
        shares = {f"{name} %": 100 * found.attributes[name].value for name in ("large", "small")}
        return {**{name: estimate.value for name, estimate in estimates.items()}, **shares}


def run(recipe: Recipe, out: Path, meter: Meter, steps: Sequence[int]) -> None:
    """Train and measure one variant with one seed, unless that is done; OUT.json gets updates, cost, and metrics by steps.

    ConfigError if OUT holds a run of another recipe, because the variant has changed since.
    """
    result = out.with_suffix(".json")
    if (info := read_flash_info(out)) and info.recipe_hash != recipe.content_hash:
        raise ConfigError(f"{out} holds a run of another recipe: its variant has changed; choose another --out or remove it")
    if result.exists():
        return
    if not (out / FLASH).exists():
        distill(recipe, out, pools=out.parent / "pools")
    _, student = load_fused(recipe.base, [(out, 1.0)], None)
    metrics = meter.measure_model(student, out.name, steps)
    found = {"seed": recipe.seed, "updates": recipe.updates, "cost": round(cost(recipe, BY_TEXT)), "rows": metrics}
    write_results(result, found, indent=2)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def ablation_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line per variant and number of steps: the mean over seeds, and with several seeds its standard error."""
    lines = []
    for name, seeds in results.items():
        for steps in seeds[0]["rows"]:
            cells = [_mean([seed["rows"][steps][metric] for seed in seeds]) for metric in METRICS]
            lines.append([name, len(seeds), seeds[0]["updates"], steps, *cells])
    return markdown_table(("variant", "seeds", "updates", "steps", *METRICS), lines)


def difference_table(results: Mapping[str, Sequence[Mapping[str, Any]]], base: str) -> str:
    """The same of the differences from the variant `base`, over the seeds that both were run with."""
    own = {run["seed"]: run["rows"] for run in results.get(base, ())}
    lines = []
    for name, runs in results.items():
        shared = [run for run in runs if run.get("seed") in own] if name != base else []
        for steps in shared[0]["rows"] if shared else ():
            pairs = [(run["rows"][steps], own[run["seed"]][steps]) for run in shared]
            cells = [_mean([one[metric] - other[metric] for one, other in pairs], sign="+") for metric in METRICS]
            lines.append([f"{name} - {base}", len(pairs), steps, *cells])
    return markdown_table(("difference", "seeds", "steps", *METRICS), lines)


def _mean(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="runs and results are kept here")
    parser.add_argument("--recipe", type=Path, default=bundled_recipe("avatars.toml"), help="default: the embedded model's")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=["all"],
        metavar="NAME[,NAME...]",
        help=f"variants, or groups of them: {', '.join(GROUPS)}; default: all",
    )
    parser.add_argument("--seeds", type=_whole_numbers, default=(0, 1, 2), metavar="N[,N...]", help="default: 0,1,2")
    parser.add_argument("--steps", type=_whole_numbers, default=(4, 2), metavar="N[,N...]", help="default: 4,2")
    parser.add_argument("--scale", type=float, default=1.0, help="budget in lengths of the recipe; default: %(default)s")
    parser.add_argument("--count", type=int, default=150, help="prompts, with two seeds each; default: %(default)s")
    parser.add_argument("--reference-count", type=int, default=5000, help="reference images; default: %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("flashdiff").setLevel(logging.INFO)
    return run_command("ablation", lambda: _ablate(options))


def _ablate(options: argparse.Namespace) -> None:
    """Run the variants, and write OUT/ablation.md and OUT/ablation.json after each run, so that an interruption loses one run."""
    if unknown := [name for name in options.only if name not in VARIANTS and name not in GROUPS]:
        raise ConfigError(f"--only {unknown[0]}: the variants are {', '.join(VARIANTS)}; the groups {', '.join(GROUPS)}")
    names = list(dict.fromkeys(name for given in options.only for name in GROUPS.get(given, (given,))))
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
    _check_settings(options.out / "settings.json", settings)
    teacher = options.out / f"{TEACHER}.json"
    if not teacher.exists():
        _, base = load_fused(recipe.base, (), SamplingOptions(guidance=sum(recipe.guidance) / 2))
        steps = (_TEACHER_STEPS, *(count for count in options.steps if count > 1))
        metrics = {"real": meter.measure_real(), **meter.measure_model(base, TEACHER, steps)}
        write_results(teacher, {"updates": 0, "cost": 0, "rows": metrics}, indent=2)
    for seed in options.seeds:  # all variants with the first seed, then with the next: a complete table comes early
        for name in names:
            run(make_variant(recipe, name, seed, options.scale), options.out / f"{name}-{seed}", meter, options.steps)
            results = _read_runs(options.out)
            found = {"environment": read_environment({}), "settings": settings, "results": results}
            write_results(options.out / "ablation.json", found, indent=2)
            shown = f"{ablation_table(results)}\n\n{difference_table(results, names[0])}"
            write_whole(options.out / "ablation.md", shown + "\n")
    print(shown)


def _read_runs(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The results of all runs in `out`, by variant, one per seed."""
    files = {TEACHER: [out / f"{TEACHER}.json"]} | {name: sorted(out.glob(f"{name}-[0-9]*.json")) for name in VARIANTS}
    return {name: [json.loads(file.read_text()) for file in of] for name, of in files.items() if of}


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings for later runs; ConfigError if they differ from those of earlier ones, which share the table."""
    before = json.loads(path.read_text()) if path.exists() else settings
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        raise ConfigError(f"{path.parent} holds results of another {', '.join(changed)}; choose another --out or remove it")
    write_results(path, settings, indent=2)


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
