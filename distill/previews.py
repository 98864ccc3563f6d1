"""Preview sheets: the teacher and the student at few steps, with the same prompts and seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashdiff.components import ModelSpec
from flashdiff.distill.network import as_teacher
from flashdiff.families.base import TorchModel
from flashdiff.generate import generate
from flashdiff.orders import Pixels
from flashdiff.sampling import Sampler
from flashdiff.tasks import check_order

TEACHER_STEPS = 50


Request = Mapping[str, Any]
"""A prompt with what else a request brings, as `check_order` takes them."""


def preview_steps(model: TorchModel, student: Sampler, requests: Sequence[Request], *, branches: int) -> int:
    """How often `preview` calls `on_step`, for as many requests, where a step of the teacher has so many branches."""
    teacher, few = (-(-len(requests) // rows) for rows in (max(1, model.max_batch // branches), model.max_batch))
    return TEACHER_STEPS * teacher + sum(_student_steps(student)) * few


def preview(
    model: TorchModel,
    student: Sampler,
    guidance: float,
    requests: Sequence[Request],
    on_step: Callable[[], None] | None = None,
    *,
    negative_prompt: str = "",
) -> Pixels:
    """A sheet [H, W, 3] with a column per request. Rows from the top: the teacher at 50 steps, the student at its most, 2 and 1.

    `guidance` is the teacher's scale, which contrasts prompts with `negative_prompt`; `on_step` is called after each step of a
    batch of images.
    """
    teacher = model  # a network that takes its guidance as an input has its own scale
    if model.guides_twice:
        teacher = replace(model, spec=_sampled_by(model, model.spec.sampler.model_copy(update={"guidance": guidance})))
    contrast = {"negative_prompt": negative_prompt} if teacher.spec.sampler.evaluations_per_step > 1 else {}
    with as_teacher(model):
        rows = [_images(teacher, [{**request, **contrast} for request in requests], TEACHER_STEPS, on_step)]
    flash = replace(model, spec=_sampled_by(model, student))
    rows += [_images(flash, requests, steps, on_step) for steps in _student_steps(student)]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def save_image(sheet: Pixels, path: Path) -> None:
    """Write pixels [H, W, 3] as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def _sampled_by(model: TorchModel, sampler: Sampler) -> ModelSpec:
    return model.spec.model_copy(update={"sampler": sampler})


def _student_steps(student: Sampler) -> list[int]:
    return sorted({student.max_steps, min(2, student.max_steps), 1}, reverse=True)


def _images(model: TorchModel, requests: Sequence[Request], steps: int, on_step: Callable[[], None] | None) -> list[Pixels]:
    orders = [check_order(model.spec, seed=seed, steps=steps, **request) for seed, request in enumerate(requests)]
    return [images[0] for images in generate(model, orders, on_step)]
