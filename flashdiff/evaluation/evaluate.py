"""Measurements of subjects with the same prompts, seeds and reference.

A subject is a model at a number of steps, a folder of images, or the real images themselves. The real images are the floor:
no model can be expected to be closer to the reference than other real images are.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Components
from flashdiff.config import Record
from flashdiff.errors import EvaluationError
from flashdiff.evaluation.features import FeatureExtractor, TextScorer, attribute_reader
from flashdiff.evaluation.images import ImageSet, Prompt, attributes_of, sheet
from flashdiff.evaluation.metrics import (
    Interval,
    KernelDistance,
    Moments,
    bootstrap,
    frechet_distance,
    nearest,
    share,
    spread_within_groups,
    weighted_mean,
)
from flashdiff.evaluation.tasks import TaskData
from flashdiff.generate import finish_rows, generate_rows
from flashdiff.orders import Pixels
from flashdiff.tasks import check_order

LARGE = ("kind", "color", "background", "plant", "ring", "top", "outfit", "face")
SMALL = ("eyes", "mouth", "pattern", "chest", "moons", "surface", "beard", "glasses")
"""Attributes of the embedded world by how much of the image they take."""

_ORDERS_AT_ONCE = 32


class Measurement(Record):
    """The numbers of one subject; None for what cannot be measured on it."""

    name: str
    images: int
    fid: Interval
    """Frechet distance to the reference, in the named features; FID where they are Inception's."""
    second_fid: Interval | None
    """The same in the second features, where there are some."""
    kid: Interval | None
    """1000 times the kernel distance to the reference; it needs images of two prompts."""
    text: Interval | None
    """100 times the cosine between image and prompt."""
    text_shuffled: float | None
    """The same with shuffled prompts: the score of unrelated text."""
    diversity: Interval | None
    """Mean feature distance between images of one prompt with different seeds."""
    nearest: Interval
    """Mean feature distance to the nearest reference image; far below that of real images, it indicates copies."""
    attributes: dict[str, Interval]
    """Share of images on which the probe reads what the prompt says; `large` and `small` average over attributes."""
    latent_mean: float | None
    latent_std: float | None
    """Mean and standard deviation of all values of the final latents; compare with the teacher's to see a student drift."""
    of_task: dict[str, Interval]
    """What only the task measures: see `TaskData.numbers`."""


class Report(Record):
    """All measurements and what they were made with."""

    features: str
    second_features: str | None
    feature_dimension: int
    resize: str
    text_scorer: str | None
    reference: str
    reference_images: int
    rows: tuple[Measurement, ...]
    """Named after the rows of the tables; JSON files have them under this name."""
    warnings: tuple[str, ...]


@dataclass
class Subject:
    """Images to measure, and the latents' mean and standard deviation where a model made them."""

    images: ImageSet
    latents: tuple[float, float] | None = None
    of_task: dict[str, Interval] = field(default_factory=dict)


@dataclass
class Evaluator:
    """The networks and the reference that every subject is measured with."""

    features: FeatureExtractor
    text_scorer: TextScorer | None
    reference: ImageSet
    second: FeatureExtractor | None = None
    """Another network, so that no gain is one network's taste."""
    reference_features: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        _need_two(self.reference)
        self.reference_features = self.features(self.reference.pixels)
        self.moments = Moments.of(self.reference_features)
        self.second_moments = Moments.of(self.second(self.reference.pixels)) if self.second else None

    def second_fid(self, images: ImageSet) -> Interval | None:
        """The Frechet distance in the second features; None without them."""
        if self.second is None or self.second_moments is None:
            return None
        features, moments = self.second(images.pixels), self.second_moments
        return bootstrap(lambda w: frechet_distance(moments, Moments.of(features, w)), images.groups)


def make_images(
    components: Components,
    prompts: Sequence[Prompt],
    *,
    seeds: int,
    steps: int,
    name: str,
    report: Callable[[str], None],
    task: TaskData | None = None,
) -> Subject:
    """Every prompt with `seeds` seeds; image i of a prompt has the same noise for every model and number of steps.

    With a task, image i has the task's i-th inputs.
    """
    given = task.requests if task else [{}] * (len(prompts) * seeds)
    prompted = [prompt for prompt in prompts for _ in range(seeds)]
    latents, pixels, of_images = [], list[Pixels](), list[dict[str, float]]()
    for start in range(0, len(prompted), _ORDERS_AT_ONCE * seeds):
        orders = [
            check_order(components.spec, prompt=prompt.text, seed=start + number, steps=steps, **request)
            for number, (prompt, request) in enumerate(
                zip(*(of[start : start + _ORDERS_AT_ONCE * seeds] for of in (prompted, given)), strict=True)
            )
        ]
        for order, of_order in zip(orders, generate_rows(components, orders), strict=True):
            rows = [row for row, _ in of_order]
            latents += [row.latents for row in rows]
            (image,) = order.task.whole_images(order, [image for _, image in of_order])
            if task:
                of_images.append(task.of_image(len(pixels), image, lambda: finish_rows(components, rows)[0]))  # noqa: B023
            pixels.append(image)
        report(f"{name}: {len(pixels)} of {len(prompted)} images")
    values = np.stack(latents)
    images = ImageSet(name, np.stack(pixels), tuple(prompted), tuple(range(len(prompted))))
    of_task = task.numbers(of_images, images.groups) if task else {}
    return Subject(images, (float(values.mean()), float(values.std())), of_task)


def measure(subject: Subject, evaluator: Evaluator) -> tuple[Measurement, NDArray[np.int64]]:
    """The subject's numbers, and for each image the index [N] of its nearest reference. EvaluationError below two images."""
    images = subject.images
    _need_two(images)
    groups = images.groups
    features = evaluator.features(images.pixels)
    kid = KernelDistance(features, evaluator.reference_features, groups)
    far, which = nearest(features, evaluator.reference_features)
    spread = spread_within_groups(features, groups)
    text, shuffled = _text_scores(images, evaluator.text_scorer)
    return Measurement(
        name=images.name,
        images=len(images),
        fid=bootstrap(lambda w: frechet_distance(evaluator.moments, Moments.of(features, w)), groups),
        second_fid=evaluator.second_fid(images),
        kid=bootstrap(lambda w: 1000 * kid(w), groups, least=3) if groups.max() else None,  # two give one value, or none
        text=_mean(text, groups),
        text_shuffled=None if shuffled is None else weighted_mean(shuffled),
        diversity=_mean(spread, groups),
        nearest=bootstrap(lambda w: weighted_mean(far, w), groups),
        attributes=_attributes(images, groups),
        latent_mean=subject.latents[0] if subject.latents else None,
        latent_std=subject.latents[1] if subject.latents else None,
        of_task=subject.of_task,
    ), which


def _need_two(images: ImageSet) -> None:
    if len(images) < 2:
        raise EvaluationError(f"{images.name}: {len(images)} image cannot be measured as a set; give at least 2")


def _mean(values: NDArray[np.floating] | None, groups: NDArray[np.int64]) -> Interval | None:
    if values is None or np.isnan(values).all():
        return None
    counts = ~np.isnan(values)
    return bootstrap(lambda weights: weighted_mean(values[counts], weights), groups[counts])


def _text_scores(images: ImageSet, scorer: TextScorer | None) -> tuple[NDArray[np.floating] | None, NDArray[np.floating] | None]:
    """Scores of every image with its own prompt, and with another prompt of the set drawn at random; NaN without a prompt."""
    said = np.array([prompt is not None for prompt in images.prompts])
    if scorer and not scorer.reads_text:
        return scorer(images.pixels, [""] * len(images)), None
    if scorer is None or not said.any():
        return None, None
    texts = [prompt.text for prompt in images.prompts if prompt]

    def scores(texts: Sequence[str]) -> NDArray[np.floating]:
        found = np.full(len(images), np.nan)
        found[said] = scorer(images.pixels[said], texts)
        return found

    own = scores(texts)
    different = list(dict.fromkeys(texts))
    if len(different) == 1:
        return own, None
    steps = np.random.default_rng(0).integers(1, len(different), len(texts))
    place = {text: index for index, text in enumerate(different)}
    others = [different[(place[text] + int(step)) % len(different)] for text, step in zip(texts, steps, strict=True)]
    return own, scores(others)


def _attributes(images: ImageSet, groups: NDArray[np.int64]) -> dict[str, Interval]:
    """Accuracy per attribute, over the images whose prompt says it."""
    asked = [attributes_of(prompt) if prompt else {} for prompt in images.prompts]
    if not any(asked):
        return {}
    read = attribute_reader()(images.pixels)
    right: dict[str, NDArray[np.float64]] = {}
    for name in (*LARGE, *SMALL):
        hits = [float(read[name][i] == words[name]) if name in words else math.nan for i, words in enumerate(asked)]
        right[name] = np.array(hits)
    averages = {"large": LARGE, "small": SMALL}
    result = {}
    for title, names in ({name: (name,) for name in right} | averages).items():
        known = np.array([right[name] for name in names if not np.isnan(right[name]).all()])
        if len(known):  # attributes count alike, however many prompts say them
            prompts = len(np.unique(groups[~np.isnan(known).all(0)]))
            result[title] = share(float(np.nanmean(known, axis=1).mean()), prompts)
    return result


def warnings_for(evaluator: Evaluator, counts: Iterable[int]) -> tuple[str, ...]:
    """What makes the Frechet distance unsound: with fewer than some 20 images a feature (the usual 50,000 are 24 for each of
    Inception's 2048) much of it is the bias of a small sample (1911.07023), the same for every subject."""
    dimension, needed = evaluator.features.dimension, 20 * evaluator.features.dimension
    few = [f"{count} {side}" for side, count in (("images", min(counts)), ("of the reference", len(evaluator.reference)))
           if count <= needed]  # fmt: skip
    if not few:
        return ()
    return (
        f"{' and '.join(few)} are too few for a Frechet distance of {dimension} features: it comes out too large; "
        f"give more than {needed} on both sides, or read KID, which has no such bias",
    )


# --- what people read ------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report as tables: one line a subject, then one line an attribute."""
    has_latents = any(m.latent_std is not None for m in report.rows)
    second = ["second FID"] if report.second_features else []
    head = ["", "images", "FID", *second, "KID x1000", "text", "(shuffled)", "diversity", "nearest"]
    own = list(dict.fromkeys(name for m in report.rows for name in m.of_task))
    lines = [[*head, *own, *(["latents: mean, std"] if has_latents else [])]]
    for m in report.rows:
        shuffled = "-" if m.text_shuffled is None else f"{m.text_shuffled:.1f}"
        distances = [m.fid, *([m.second_fid] if second else []), m.kid]
        cells = [m.name, str(m.images), *distances, m.text, shuffled, m.diversity, m.nearest, *map(m.of_task.get, own)]
        drift = "-" if m.latent_std is None else f"{m.latent_mean:.3f}, {m.latent_std:.3f}"
        lines.append([_cell(value) for value in (*cells, *([drift] if has_latents else []))])
    text = _table(lines)
    names = [name for name in ("large", *LARGE, "small", *SMALL) if any(name in m.attributes for m in report.rows)]
    if names:
        shares = [["attributes read right, %", *(m.name for m in report.rows)]]
        for name in names:
            title = f"**{name}**" if name in ("large", "small") else name
            shares.append([title, *(_percent(m.attributes.get(name)) for m in report.rows)])
        text += "\n\n" + _table(shares)
    again = f", and {report.second_features}" if report.second_features else ""
    scored = f"; text: {report.text_scorer}" if report.text_scorer else ""
    text += (
        f"\n\nFeatures: {report.features}{again}, {report.feature_dimension} an image, resized: {report.resize}{scored}. "
        f"Reference: {report.reference}, {report.reference_images} images. "
        "± is the 95 % interval of a bootstrap over prompts, - where there are too few; shares stand with their score interval."
    )
    return "\n\n".join([text, *(f"**Warning:** {warning}." for warning in report.warnings)])


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _percent(value: Interval | None) -> str:
    if value is None or value.low is None or value.high is None:
        return "-"
    return f"{100 * value.value:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _table(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def write_sheets(folder: Path, subject: Subject, which: NDArray[np.int64], reference: ImageSet) -> None:
    """`NAME.png`: the first 64 images; `NAME-nearest.png`: sixteen images, each above its nearest reference image.

    `which` [N] holds the index of every image's nearest reference, as `measure` returns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = subject.images
    sheet(images.pixels[:64]).save(folder / f"{images.name}.png")
    if images.pixels.shape[1:] != reference.pixels.shape[1:]:
        return
    picked = np.linspace(0, len(images) - 1, min(16, len(images))).astype(int)
    lines = [part for eight in np.array_split(picked, 2) for part in (images.pixels[eight], reference.pixels[which[eight]])]
    sheet(np.concatenate(lines), columns=max(1, len(lines[0]))).save(folder / f"{images.name}-nearest.png")
