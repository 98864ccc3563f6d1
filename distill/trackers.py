"""Curves and previews of a run, in TensorBoard files in OUT/training or in Weights & Biases."""

import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from flashdiff.distill.config import Recipe
from flashdiff.errors import ConfigError
from flashdiff.files import write_whole
from flashdiff.orders import Pixels


class Tracker(Protocol):
    """Receives the numbers and previews of a run."""

    def numbers(self, update: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of each name."""
        ...

    def image(self, update: int, sheet: Pixels) -> None:
        """Add a preview sheet [H, W, 3]."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_tracker(recipe: Recipe, work: Path, update: int) -> Tracker:
    """The recipe's tracker from `update` on: points that a killed run logged after it are replaced."""
    check_tracker(recipe.tracker)
    return (_TensorBoard if recipe.tracker == "tensorboard" else _WandB)(recipe, work, update)


def check_tracker(name: str) -> None:
    """ConfigError when the package of the tracker is missing."""
    try:
        import_module({"tensorboard": "tensorboardX", "wandb": "wandb"}[name])
    except ImportError as error:
        raise ConfigError(f"tracker '{name}' needs '{error.name}', which is not installed: pip install {error.name}") from None


class _TensorBoard:
    def __init__(self, recipe: Recipe, work: Path, update: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(work / "tensorboard"), purge_step=update)

    def numbers(self, update: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)

    def image(self, update: int, sheet: Pixels) -> None:
        self._writer.add_image("preview", sheet, update, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, recipe: Recipe, work: Path, update: int) -> None:
        import wandb

        self._wandb: Any = wandb
        config = recipe.model_dump(mode="json")
        kept = work / "wandb-id"  # so that a resumed run continues its own curve, and no other run's
        if not kept.exists():
            write_whole(kept, secrets.token_hex(8))
        self._run: Any = wandb.init(project="flashdiff", id=kept.read_text(), resume="allow", dir=str(work), config=config)

    def numbers(self, update: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=update)

    def image(self, update: int, sheet: Pixels) -> None:
        self._run.log({"preview": self._wandb.Image(sheet)}, step=update)

    def close(self) -> None:
        self._run.finish()
