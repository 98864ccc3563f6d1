"""What a recipe needs of its base and of this machine, checked before data are read."""

from flashdiff.distill import processes
from flashdiff.distill.config import Recipe
from flashdiff.distill.student import optimizer_of
from flashdiff.distill.trackers import check_tracker
from flashdiff.errors import ConfigError, RequestError, TrainingError
from flashdiff.families.base import TorchModel


def check_run(model: TorchModel, recipe: Recipe) -> None:
    """ConfigError or TrainingError for a recipe that its base, or what is installed here, cannot follow."""
    if model.spec.prediction == "trigflow":
        raise TrainingError(f"{recipe.base} is a consistency student already, and no teacher; distil the base it comes from")
    trained = model.spec.sampler.schedule.num_train_timesteps
    if recipe.grid.num_train_timesteps != trained:
        raise TrainingError(
            f"grid.num_train_timesteps is {recipe.grid.num_train_timesteps}, the base was trained on {trained}: set that"
        )
    optimizer_of(recipe)
    if processes.is_main():
        check_tracker(recipe.tracker)
    for prompt in recipe.preview_prompts:
        try:
            model.tokenize([prompt])
        except RequestError as error:
            why = str(error).removesuffix("; truncate_prompt cuts it")  # which is for requests
            raise ConfigError(f"preview_prompts: {why}; shorten it") from None
