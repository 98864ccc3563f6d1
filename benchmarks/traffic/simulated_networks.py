"""Networks for simulated devices: what their calls take, as measured on an H200 or as assumed."""

import json
from collections.abc import Mapping
from pathlib import Path

from flashdiff.components import Costs, ModelSpec, Size
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.sampling import Sampler
from flashdiff.schedule import NoiseSchedule

SIZES = Size(512, 512), Size(768, 768)
_MEASURED = Path(__file__).parents[1] / "results" / "2026-11-28-sd15-latency-h200.json"

NetworkCosts = Mapping[str, Mapping[int, float]]
"""Milliseconds of a call at 512x512, by part and batch size."""


def networks() -> dict[str, NetworkCosts]:
    """The costs of each network."""
    measured: dict[str, dict[int, float]] = {}
    for part, batch, ms in json.loads(_MEASURED.read_text())["costs_ms"]:
        measured.setdefault(part, {})[batch] = ms
    assumed = {"text_encoder": 1.0, "encoder": 5.0, "denoiser": 10.0, "decoder": 5.0}
    return {
        "SD1.5 on an H200": measured,
        "batch-friendly": {part: dict.fromkeys(measured[part], ms) for part, ms in assumed.items()},
    }


def spec_and_costs(costs: NetworkCosts, *, guided: bool = False) -> tuple[ModelSpec, Costs]:
    """A model of both sizes that takes any number of steps, and its costs: those of the larger size by the number of pixels."""
    sampler = Sampler(
        kind="ode",
        schedule=NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        guidance=7.5 if guided else 1.0,
        default_steps=4,
    )
    spec = FakeComponents(sampler).spec.model_copy(update={"sizes": SIZES})
    text = spec.text_part.name
    of_sizes: Costs = {
        (part.name, size): {batch: ms * _pixels(size) / _pixels(SIZES[0]) for batch, ms in costs[part.name].items()}
        for part in spec.parts
        if part.name != text
        for size in SIZES
    }
    return spec, {(text, None): dict(costs[text]), **of_sizes}


def _pixels(size: Size) -> int:
    return size.width * size.height
