"""The student of a checkpoint as a model, to be measured before its run is finished."""

from pathlib import Path
from typing import Any

from flashdiff.config import parse_record
from flashdiff.distill.bases import load_trained_base
from flashdiff.distill.checkpoints import RECIPE, WEIGHTS
from flashdiff.distill.config import Recipe
from flashdiff.distill.initial import first_weights
from flashdiff.distill.student_kinds import kind_of
from flashdiff.errors import TrainingError
from flashdiff.families.base import TorchModel
from flashdiff.reading import read_json
from flashdiff.sampling import flash_student


def open_checkpoint(checkpoint: Path) -> TorchModel:
    """The averaged student of `OUT/training/checkpoints/UPDATE.pt` on its base, sampled as it will be published.

    TrainingError where the recipe is not in `OUT/training`; ConfigError where the checkpoint is not that recipe's.
    """
    resolved = checkpoint.resolve().parent.parent / RECIPE
    try:
        values: dict[str, Any] = dict(read_json(resolved))
    except (OSError, ValueError, TypeError):
        raise TrainingError(f"{checkpoint}: its run's recipe is not in {resolved}") from None
    for name in ("hash", WEIGHTS):
        values.pop(name, None)
    recipe = parse_record(values, Recipe, source=str(resolved))
    family, model = load_trained_base(recipe)
    kind_of(recipe).insert(model, family, recipe)
    parameters = kind_of(recipe).parameters(model.network)
    for name, value in first_weights(str(checkpoint), model, family, recipe, label="").items():
        parameters[name].data.copy_(value)
    model.spec = model.spec.model_copy(update={"sampler": flash_student(model.spec.sampler, recipe.grid)})
    return model
