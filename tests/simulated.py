"""Costs of the fake model for simulated devices."""

from collections.abc import Mapping

from flashdiff.components import Costs
from flashdiff.engines.runtime.fake import FakeComponents

RISING = {1: 5.0, 2: 8.0, 4: 13.0}
"""Milliseconds of a step by batch size: a full batch is cheaper by the row."""


def costs_of(fake: FakeComponents, step: Mapping[int, float], other: Mapping[int, float]) -> Costs:
    """The costs of all its parts: those of a step, and those of all others."""
    return {key: dict(step if key[0] == "denoiser" else other) for key in fake.costs}
