"""Samples that no update sees: how far the averaged student is from the teacher there, and the checkpoint that came nearest."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashdiff.checkpoint import load_state, save_state
from flashdiff.distill import processes
from flashdiff.distill.branches import Branches
from flashdiff.distill.conditions import ImageConditions
from flashdiff.distill.config import Recipe
from flashdiff.distill.data import Dataset
from flashdiff.distill.progress import Stage
from flashdiff.distill.step import solve, student_x0, teacher_of
from flashdiff.distill.student import Student
from flashdiff.errors import TrainingError
from flashdiff.families.base import TorchModel

_SEED = 0x4E1D  # apart from the run's, so that runs with several seeds are compared on the same noise


class HeldOut:
    """The teacher's solutions of the held-out samples, and the best student so far, which a resumed run finds in its folder."""

    def __init__(
        self, model: TorchModel, branches: Branches, data: Dataset, recipe: Recipe, images: ImageConditions, work: Path
    ) -> None:
        """`data` are the held-out samples, of one size; the teacher solves them at the middle of the recipe's guidance.

        They start at the grid's modes in turn, each from its own image with noise; prompts alone start from pure noise.
        """
        count, size, grid = len(data), data.sizes[0], recipe.grid
        generator = torch.Generator().manual_seed(_SEED)
        modes = grid.mode_indices() if data.has_images else grid.mode_indices()[:1]
        with Stage("held-out targets", "samples", count, nested=True) as stage, torch.no_grad():
            self._solved = solve(
                model,
                teacher_of(model, branches, recipe),
                data,
                recipe.model_copy(update={"target": "solution"}),
                images,
                size,
                items=np.arange(count),
                starts=torch.tensor([modes[number % len(modes)] for number in range(count)]),
                guidance=torch.full((count,), sum(recipe.guidance) / 2),
                simulated=torch.zeros(count, dtype=torch.bool),
                visits=torch.zeros(count, grid.modes, dtype=torch.bool),
                noise=torch.randn((count, *model.spec.latent_shape(size)), generator=generator),
                seed=_SEED,
                on_solved=stage.advance,
            )
        self._data, self._recipe, self._file = data, recipe, work / "best.pt"
        self._least = float(self.best()["distance"]) if self._file.exists() else math.inf

    def best(self) -> dict[str, Any]:
        """`update`, `distance` and the averaged `weights` then; TrainingError where the file is gone."""
        if not self._file.exists():
            raise TrainingError(f"{self._file} is missing, which holds the best student; put it back, or choose another --out")
        return load_state(self._file)

    def measure(self, model: TorchModel, student: Student) -> float:
        """The averaged student's distance now; the main process keeps its weights where no earlier one came nearer."""
        with student.holding(student.average):
            distance = self._distance(model)
        if distance < self._least:
            self._least = distance
            if processes.is_main():
                save_state(self._file, {"update": student.update, "distance": distance, "weights": student.average})
        return distance

    @torch.no_grad()
    def _distance(self, model: TorchModel) -> float:
        """The mean squared error of x_0 in scaled latents, over all samples, channels and cells."""
        errors: list[Tensor] = []
        unused = torch.ones(self._solved.x0.shape[1])
        for rows in processes.rows(len(self._data), len(self._data) // self._recipe.batch_size * self._recipe.accumulate):
            targets = self._solved.targets(torch.arange(len(self._data))[rows], self._data, model.device, unused)
            errors.append((student_x0(model, targets) - targets.x0).square().mean())
        return float(processes.mean(torch.stack(errors).mean()))
