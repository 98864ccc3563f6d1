"""What a precision costs in quality, by images of the calibration prompts against torch's in float32, and another decoder."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flashdiff.components import Components
from flashdiff.engines.bundle import Quality
from flashdiff.engines.calibration import Recorder, Samples, orders_of
from flashdiff.engines.parts import Part
from flashdiff.engines.reference import on_gpu, sample_image
from flashdiff.families.base import TorchModel
from flashdiff.generate import generate, to_pixels
from flashdiff.orders import Pixels

_REFERENCES = 1000
_HIGHEST = 99.0  # of images that are equal


def measure_quality(components: Components, samples: Samples) -> Quality:
    """How near the engine's images are to float32's; of the embedded world also what `flashdiff evaluate` reads in both."""
    made = [image for of_order in generate(components, orders_of(components.spec, samples.prompts)) for image in of_order]
    quality = Quality(images=len(made), steps=samples.steps, psnr=round(_psnr(made, samples.images), 2))
    if any(prompt.scene is None for prompt in samples.prompts):
        return quality
    return quality.model_copy(update=_of_world(samples, made))


def decoder_psnr(model: TorchModel, parts: Sequence[Part], own: nn.Module) -> float:
    """Between what the model's decoder and `own` make of the latents of an image of each size, in decibels of 8-bit images."""
    recorder, made = Recorder(model, "decoder"), list[tuple[Pixels, Pixels]]()
    with on_gpu(parts):
        for size in model.spec.sizes:
            sample_image(recorder, model.spec, size)
        place = next(model.decoder.parameters()).device
        own.to(place)
        for row in recorder.rows:
            latents = torch.from_numpy(row["latents"]).to(place)
            with torch.inference_mode():  # not around the moves: parameters would become inference tensors
                ours, theirs = (to_pixels(decoder(latents).cpu().numpy())[0] for decoder in (model.decoder, own))
            made.append((ours, theirs))
    own.to("cpu")
    return _psnr(*zip(*made, strict=True))


def _psnr(made: Sequence[Pixels], expected: Sequence[Pixels]) -> float:
    """In decibels, over all pixels of all images."""
    error = float(np.mean([np.mean(np.square(_floats(one) - _floats(other))) for one, other in zip(made, expected, strict=True)]))
    return min(_HIGHEST, 10 * math.log10(255**2 / error)) if error else _HIGHEST


def _floats(image: Pixels) -> NDArray[np.float64]:
    return image.astype(np.float64)


def _of_world(samples: Samples, made: Sequence[Pixels]) -> dict[str, tuple[float, float]]:
    """Attributes and kernel distance, in float32 and of the engine, by the names of `Quality`."""
    from flashdiff.evaluation.evaluate import Evaluator, Subject, measure
    from flashdiff.evaluation.features import feature_extractor
    from flashdiff.evaluation.images import WORLD, WORLD_SIZE, ImageSet, read_reference

    evaluator = Evaluator(feature_extractor(WORLD), None, read_reference(WORLD, _REFERENCES, WORLD_SIZE))
    attributes, distances = [], []
    for name, images in (("float32", samples.images), ("engine", made)):
        measurement, _ = measure(Subject(ImageSet(name, np.stack(images), samples.prompts)), evaluator)
        attributes.append(round(measurement.attributes["large"].value, 4))
        assert measurement.kid
        distances.append(round(measurement.kid.value, 3))
    return {"attributes": (attributes[0], attributes[1]), "kid": (distances[0], distances[1])}
