"""Where a run's first weights come from: `init_from`."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from flashdiff.checkpoint import load_state
from flashdiff.distill.checkpoints import RECIPE, checkpoints
from flashdiff.distill.config import Recipe
from flashdiff.distill.student_kinds import StudentKind, kind_of
from flashdiff.errors import ConfigError, LoraError, first_line
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.files import hash_of_all
from flashdiff.families.prints import shared_precision
from flashdiff.lora import read_flash_info
from flashdiff.lora_files import FLASH
from flashdiff.reading import read_json

_log = logging.getLogger(__name__)

_ADVICE = "give a run with the same base, student, lora.rank, lora.ranks, lora.targets and lora.dora"


def first_weights(
    place: str, model: TorchModel, family: ModelFamily, recipe: Recipe, *, label: str = "init_from "
) -> dict[str, Tensor]:
    """The student's weights in a checkpoint or a run's folder, by the names of the network's parameters: those that would be
    published. ConfigError, which begins with `label` and the place, where they are not those of such a student on this base.

    `recipe` describes the one in `model`. Bases and alpha are compared where the run recorded them; the same base in another
    precision is accepted with a warning.
    """
    said = f"{label}'{place}'"
    kind = kind_of(recipe)
    found, base_hash, prints = _read(Path(place), kind, family, said)
    if base_hash not in (None, model.base_hash, hash_of_all(model.folder)):
        same = shared_precision(model.folder, prints)
        if same is None:
            raise ConfigError(f"{said}: its base has the hash {base_hash[:12]}, this one's has {model.base_hash[:12]}; {_ADVICE}")
        _log.warning("%s: its base is this one in another precision: both are the same once rounded to %s", said, same)
    wanted = kind.parameters(model.network)
    for name, parameter in wanted.items():
        if name not in found or found[name].shape != parameter.shape:
            has = f"has the shape {list(found[name].shape)}" if name in found else "is missing"
            raise ConfigError(f"{said}: its '{name}' {has}, this run's has {list(parameter.shape)}; {_ADVICE}")
    if more := sorted(set(found) - set(wanted)):
        raise ConfigError(f"{said}: it has '{more[0]}', this run's student does not; {_ADVICE}")
    alpha = _recorded_alpha(Path(place))
    if recipe.student == "lora" and recipe.lora and alpha not in (None, recipe.lora.alpha):
        raise ConfigError(f"{said}: its lora.alpha is {alpha:g}, this run's is {recipe.lora.alpha:g}; set it to {alpha:g}")
    return {name: found[name].float() for name in wanted}


def _read(place: Path, kind: StudentKind, family: ModelFamily, said: str) -> tuple[dict[str, Tensor], Any, Any]:
    """The weights, and the base's hash and prints where they were recorded."""
    if place.suffix == ".pt":
        if not place.is_file():
            raise ConfigError(f"{said}: there is no such file")
        return _averages(place, said)
    if (place / FLASH).is_file() and kind.is_in(place):
        try:
            info = read_flash_info(place)
        except LoraError as error:
            raise ConfigError(f"{said}: {error}") from None
        try:
            weights = kind.read(place, family)
        except Exception as error:  # safetensors' errors for a damaged file
            raise ConfigError(f"{said}: its weights are damaged: {first_line(error)}") from None
        return weights, info and info.base_hash, info.base_prints if info else {}
    if saved := checkpoints(place / "training"):
        return _averages(saved[-1], said)
    raise ConfigError(f"{said}: neither a checkpoint (.pt) nor the folder of a run that has one")


def _averages(checkpoint: Path, said: str) -> tuple[dict[str, Tensor], Any, Any]:
    try:
        state = load_state(checkpoint)
        # flashdiff 0.2 did not record its base.
        return dict(state["student"]["average"]), state.get("base_hash"), dict(state.get("base_prints", {}))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{said}: {checkpoint.name} is no checkpoint of a distillation") from None


def _recorded_alpha(place: Path) -> float | None:
    """The LoRA's alpha, which its weights do not show, by the recipe of its run; None where that is not there."""
    folders = (place / "training", place.resolve().parent / "training")  # OUT, or OUT/best
    work = place.resolve().parent.parent if place.suffix == ".pt" else next(filter(Path.is_dir, folders), place)
    try:
        return float(read_json(work / RECIPE)["lora"]["alpha"])
    except (OSError, ValueError, TypeError, LookupError):
        return None
