"""What helps: variants of a recipe, several seeds each, at an equal budget of network evaluations, by `flashdiff evaluate`.

    python benchmarks/ablation.py --out ablation                       # every variant, seeds 0, 1 and 2: hours
    python benchmarks/ablation.py --out ablation --only lcm,ours       # some of them; what is there already is not run again

The budget is what the recipe's own length costs with the variant `distillation`, in forward passes of the network: the
teacher's, the student's and those of the other losses, a backward pass as what it takes beside them
(`flashdiff.distill.plan.cost`). A variant that costs more an update gets fewer updates, in all phases alike.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import environment
from flashdiff.components import Components
from flashdiff.config import load_recipe
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.distill.loop import distill
from flashdiff.distill.plan import cost
from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.evaluation.command import EvaluateOptions, evaluate
from flashdiff.files import write_whole
from flashdiff.lora import FLASH

TEACHER = "teacher"
_PAPER = {"adversarial": {"kind": "lsgan", "r1_weight": 0.0}, "distribution_matching": {"times": (0.0, 1.0)}}

VARIANTS: dict[str, dict[str, Any]] = {
    # The paper, loss by loss: every target used once. Weights are those of its second and of its last phase.
    "distillation": {"target_uses": 1},
    "+adversarial": {"target_uses": 1, "loss": _PAPER, "weights": {"adversarial": (0.1, 0.3)}},
    "paper": {"target_uses": 1, "loss": _PAPER, "weights": {"adversarial": (0.1, 0.3), "distribution_matching": (0.3, 0.7)}},
    # LCM: one teacher step and the averaged student from there, over all times of the grid alike.
    "lcm": {"target_uses": 1, "target": "consistency", "every_time": True},
    # Ours: targets are used again, so most of the budget goes to the student; then one change each.
    "ours": {},
    "ours+huber": {"loss": {"distillation": "pseudo_huber"}},
    "ours+perceptual": {"loss": {"distillation": "perceptual"}},
    "ours+simulation": {"backward_simulation": 0.5},
    "ours+adversarial": {"weights": {"adversarial": (0.02, 0.05)}},
    "ours+matching": {
        "loss": {"distribution_matching": {"fake_score": "lora"}},
        "weights": {"distribution_matching": (0.02, 0.05)},
    },
}
"""Changes of the recipe by name. `weights` gives a loss's weight in the first and in the later phases."""

METRICS = ("FID", "KID x1000", "large %", "small %", "text", "diversity")


def variant(recipe: Recipe, name: str, seed: int, scale: float) -> Recipe:
    """The recipe changed as `name` says, as long as the budget allows: `scale` times the length of `recipe`."""
    budget = scale * cost(_changed(recipe, VARIANTS["distillation"]))
    changed = _changed(recipe, {**VARIANTS[name], "seed": seed})
    share = budget / cost(changed)
    phases = [{**phase.model_dump(), "updates": max(1, round(phase.updates * share))} for phase in changed.phases]
    settings = {
        "phases": phases,
        "checkpoint_every": max(1, sum(phase["updates"] for phase in phases) // 4),
        "preview_prompts": (),
    }
    return Recipe.model_validate({**changed.model_dump(), **settings})


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    settings = {key: value for key, value in changes.items() if key not in ("weights", "every_time")}
    phases = [phase.model_dump() for phase in recipe.phases]
    for loss, weights in changes.get("weights", {}).items():
        for index, phase in enumerate(phases):
            phase[loss] = weights[min(index, 1)]
    grid = recipe.grid.model_dump()
    if changes.get("every_time"):
        grid["modes"] = grid["solver_steps"]
        for phase in phases:
            phase["mode_weights"] = (1,) * grid["modes"]
    return Recipe.model_validate({**recipe.model_dump(), "grid": grid, "phases": phases, **settings})


def run(recipe: Recipe, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one variant with one seed, unless it has been: its updates, seconds, and rows by number of steps."""
    result = out.with_suffix(".json")
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    started = time.monotonic()
    if not (out / FLASH).exists():
        distill(recipe, out)
    seconds = time.monotonic() - started  # of this process: a run that went on after a kill tells its last part
    rows = _measured(recipe.base, (str(out),), options.steps, options)
    rows.pop("real")  # the teacher's result has it
    found = {"updates": recipe.updates, "cost": cost(recipe), "seconds": round(seconds), "rows": rows}
    write_whole(result, json.dumps(found, indent=2) + "\n")
    return found


def _measured(base: str, loras: Sequence[str], steps: Sequence[int], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Metrics by number of steps; the real images' own under `real`."""
    report = options.out / "report.json"
    settings = EvaluateOptions(
        subject=base,
        loras=tuple((lora, 1.0) for lora in loras),
        steps=tuple(steps),
        guidance=None if loras else options.guidance,
        count=options.count,
        reference_count=options.reference_count,
        json_file=report,
    )
    evaluate(settings, open_bundle=_no_bundle, report=lambda line: print(line, file=sys.stderr, flush=True))
    rows = json.loads(report.read_text())["rows"]
    report.unlink()
    return {name: _numbers(row) for name, row in zip(("real", *map(str, steps)), rows, strict=True)}


def _no_bundle(path: Path) -> Components:
    raise ConfigError(f"{path} is a bundle; the recipe's base must be a model")


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    attributes = {name: 100 * row["attributes"][name]["value"] for name in ("large", "small") if name in row["attributes"]}
    values = {
        name: row[key]["value"]
        for name, key in (("FID", "fid"), ("KID x1000", "kid"), ("text", "text"), ("diversity", "diversity"))
    }
    return {**values, **{f"{name} %": value for name, value in attributes.items()}}


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line a variant and number of steps: the mean over seeds, and their standard deviation where there are several."""
    head = ["variant", "seeds", "updates", "minutes", "steps", *METRICS]
    lines = [head, ["---"] * len(head)]
    for name, seeds in results.items():
        for steps in seeds[0]["rows"]:
            cells = [_mean([seed["rows"][steps][metric] for seed in seeds]) for metric in METRICS]
            minutes = f"{statistics.mean(seed['seconds'] for seed in seeds) / 60:.1f}"
            lines.append([name, str(len(seeds)), str(seeds[0]["updates"]), minutes, steps, *cells])
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
        "--only", type=lambda text: text.split(","), default=[*VARIANTS], metavar="NAME[,NAME...]", help="variants"
    )
    parser.add_argument("--seeds", type=_whole_numbers, default=(0, 1, 2), metavar="N[,N...]", help="default: 0,1,2")
    parser.add_argument("--steps", type=_whole_numbers, default=(4, 2, 1), metavar="N[,N...]", help="default: 4,2,1")
    parser.add_argument("--scale", type=float, default=1.0, help="budget in lengths of the recipe; default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teacher's rows; default: %(default)s")
    parser.add_argument("--count", type=int, default=500, help="prompts, with two seeds each; default: %(default)s")
    parser.add_argument("--reference-count", type=int, default=5000, help="reference images; default: %(default)s")
    options = parser.parse_args(arguments)
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
    options.out.mkdir(parents=True, exist_ok=True)
    teacher = options.out / f"{TEACHER}.json"
    if not teacher.exists():
        rows = _measured(recipe.base, (), (50, *(steps for steps in options.steps if steps > 1)), options)
        write_whole(teacher, json.dumps({"updates": 0, "cost": 0, "seconds": 0, "rows": rows}, indent=2) + "\n")
    results: dict[str, list[dict[str, Any]]] = {TEACHER: [json.loads(teacher.read_text())]}
    for seed in options.seeds:  # all variants with one seed first: a table of all comes early
        for name in options.only:
            changed = variant(recipe, name, seed, options.scale)
            found = run(changed, options.out / f"{name}-{seed}", options)
            results.setdefault(name, []).append(found)
            _write(options.out, recipe, results)


def _write(out: Path, recipe: Recipe, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    record = {"environment": environment({}), "recipe_hash": recipe.content_hash, "results": results}
    write_whole(out / "ablation.json", json.dumps(record, indent=2) + "\n")
    write_whole(out / "ablation.md", table({name: seeds for name, seeds in results.items() if seeds}) + "\n")


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
