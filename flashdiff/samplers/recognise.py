"""What a base's configuration says about its sampling, and which names look like a few-step student's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flashdiff.errors import ConfigError
from flashdiff.presets import PRESETS
from flashdiff.samplers.tcd import TCD

_FEW_STEP = re.compile(
    r"lightning|turbo|hyper-?(sd|flux)|\blcm|\bdmd|\btcd\b|\bpcm\b|schnell|\bflash-(sd|pixart)|\b(1|2|4|6|8|16)-?steps?\b"
)


def recognised(scheduler: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of a `Sampler` that a diffusers scheduler's configuration settles; empty where it settles none.

    LCM and TCD are few-step samplers whatever the model; Euler's is taken where it is `trailing`, as turbo models have it.
    ConfigError for settings of these samplers that are not supported.
    """
    name, is_trailing = scheduler.get("_class_name"), scheduler.get("timestep_spacing") == "trailing"
    euler = {"EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler-ancestral"}
    if name in euler and is_trailing:
        refuse(scheduler, source, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        if scheduler.get("interpolation_type", "linear") != "linear":
            raise ConfigError(f"{source}: interpolation_type = {scheduler['interpolation_type']!r} is not supported")
        for setting, followed in (("final_sigmas_type", "zero"), ("timestep_type", "discrete")):
            if scheduler.get(setting, followed) != followed:
                raise ConfigError(
                    f"{source}: the scheduler's {setting} = {scheduler[setting]!r} is not supported; set it to {followed!r}"
                )
        return {"kind": euler[name], "spacing": "trailing"}
    if name in ("LCMScheduler", "TCDScheduler"):
        refuse(scheduler, source, "thresholding", *(["clip_sample"] if name == "LCMScheduler" else []))
        few: dict[str, Any] = {
            "guidance": 1.0,
            "default_steps": 4,
            "original_steps": scheduler.get("original_inference_steps", 50),
        }
        if name == "TCDScheduler":
            return {"kind": "tcd", **TCD.defaults, **few}
        return {"kind": "lcm", "timestep_scaling": scheduler.get("timestep_scaling", 10.0), **few}
    return {}


def refuse(scheduler: Mapping[str, Any], source: str, *settings: str) -> None:
    """ConfigError for the first of these settings that is on."""
    for setting in settings:
        if scheduler.get(setting):
            raise ConfigError(f"{source}: the scheduler's {setting} = {scheduler[setting]!r} is not supported; set it to false")


def few_step_hint(family: str, names: Sequence[str]) -> str | None:
    """Where a name looks like a few-step student's: what to add to the command. None where none does."""
    plain = [re.sub(r"[^a-z0-9]+", "-", name.lower()) for name in names]
    matching = [name for name in plain if _FEW_STEP.search(name)]
    if not matching:
        return None
    for preset in PRESETS.values():
        if preset.family == family and preset.pattern and any(re.search(preset.pattern, name) for name in matching):
            return f"--preset {preset.name}"
    return "--sampler NAME --steps N --guidance W, or --preset NAME"
