"""What a build or an evaluation is asked for about sampling, and the sampler that follows from it and the base."""

from typing import Any

from pydantic import ValidationError

from flashdiff.components import ModelSpec
from flashdiff.config import Name, Record
from flashdiff.errors import ConfigError
from flashdiff.prediction import Prediction
from flashdiff.presets import PRESETS
from flashdiff.samplers import SAMPLERS
from flashdiff.samplers.settings import Spacing
from flashdiff.sampling import Sampler
from flashdiff.schedule import FlowSchedule, Schedule

_SETTINGS = ("spacing", "timesteps", "eta")


class SamplingOptions(Record):
    """Options and recipe keys; None: what the preset says, else the base, else the sampler's own default."""

    preset: Name | None = None
    """One of `flashdiff.presets`, which gives all that is not given here."""
    sampler: Name | None = None
    """A name in `SAMPLERS`, or `ode`."""
    spacing: Spacing | None = None
    timesteps: tuple[int, ...] | None = None
    """The student's own times, noisiest first."""
    eta: float | None = None
    shift: float | None = None
    """A flow's shift at every size, where the student was trained with another than its base."""
    steps: int | None = None
    """Of requests that do not say."""
    guidance: float | None = None
    """Up to 1: none. Where the network takes its guidance as an input, that input."""
    prediction: Prediction | None = None
    """What the student predicts, where it is something else than its base does."""

    @property
    def names_sampler(self) -> bool:
        """Whether it says how few-step sampling goes, and is not about a base alone."""
        return self.preset is not None or self.sampler is not None


def sampled_as(base: ModelSpec, options: SamplingOptions) -> ModelSpec:
    """A base's spec, sampled as the options say. ConfigError names the option, its value and what to give."""
    options, most_steps = _with_preset(base, options)
    name = options.sampler or base.sampler.kind
    _check(base, options, name)
    prediction = options.prediction or base.prediction
    if (kind := SAMPLERS.get(name)) and prediction not in kind.predictions:
        raise ConfigError(f"--sampler {name}: this model predicts {prediction}; take {_names(prediction)}")
    values: dict[str, Any] = dict(base.sampler) if name == base.sampler.kind else _new(base, name)
    values |= {field: value for field in _SETTINGS if (value := getattr(options, field)) is not None}
    values |= {"most_steps": most_steps} if most_steps else {}
    if options.shift is not None:
        values["schedule"] = _shifted(base.sampler.schedule, options.shift)
    if options.guidance is not None:
        embedded = base.sampler.embedded_guidance is not None
        values["embedded_guidance" if embedded else "guidance"] = options.guidance
    if options.steps is not None:
        values["default_steps"] = options.steps
    elif name != base.sampler.kind and name != "ode":
        values["default_steps"] = len(options.timesteps or ()) or 4
    try:
        sampler = Sampler.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explained(error)) from None
    if sampler.default_steps > sampler.max_steps:
        raise ConfigError(f"--steps {sampler.default_steps}: this model takes 1 to {sampler.max_steps}")
    return base.model_copy(update={"sampler": sampler, "prediction": prediction})


def _with_preset(base: ModelSpec, options: SamplingOptions) -> tuple[SamplingOptions, int | None]:
    """The options with a preset's where they say nothing, and its largest number of steps."""
    if options.preset is None:
        return options, None
    preset = PRESETS.get(options.preset)
    if preset is None:
        known = ", ".join(name for name, known in PRESETS.items() if known.family == base.family) or "none"
        raise ConfigError(f"--preset {options.preset}: no such preset; those for {base.family}: {known}")
    if preset.family != base.family:
        raise ConfigError(f"--preset {preset.name}: it is for the family {preset.family}, this base is {base.family}")
    fields = SamplingOptions.model_fields.keys() - {"preset"}
    given = {name: value for name in fields if (value := getattr(options, name)) is not None}
    if "sampler" in given and given["sampler"] != preset.sampler:
        raise ConfigError(f"--sampler {given['sampler']}: the preset {preset.name} says {preset.sampler}; give one of the two")
    return SamplingOptions(**{**{name: getattr(preset, name) for name in fields}, **given}), preset.most_steps


def _check(base: ModelSpec, options: SamplingOptions, name: str) -> None:
    """ConfigError for settings that the sampler does not read."""
    if name != "ode" and name != "flash" and name not in SAMPLERS:
        raise ConfigError(f"--sampler {name}: give ode, {', '.join(SAMPLERS)}")
    kind = SAMPLERS.get(name)
    for setting in _SETTINGS:
        value = getattr(options, setting)
        if value is None:
            continue
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        if setting == "spacing":
            readers = [other.name for other in SAMPLERS.values() if value in other.spacings]
        else:
            readers = [other.name for other in SAMPLERS.values() if setting in other.settings]
        if kind is None or name not in readers:
            raise ConfigError(f"--{setting} {shown}: the sampler {name} does not take it; {', '.join(readers)} do")
    last = base.sampler.schedule.num_train_timesteps - 1
    if options.timesteps and max(options.timesteps) > last:
        raise ConfigError(f"--timesteps {max(options.timesteps)}: this model's times go from 0 to {last}")


def _shifted(schedule: Schedule, shift: float) -> FlowSchedule:
    if not isinstance(schedule, FlowSchedule):
        raise ConfigError(f"--shift {shift:g}: this base is no rectified flow, and has no shift")
    if not 0 < shift <= 1000:
        raise ConfigError(f"--shift {shift:g}: give a number above 0, up to 1000")
    return FlowSchedule(num_train_timesteps=schedule.num_train_timesteps, shift=shift)


def _new(base: ModelSpec, name: str) -> dict[str, Any]:
    """A sampler of another kind than the base's own, with the kind's defaults."""
    old = base.sampler
    spacing = {"spacing": base.sampler.spacing} if name == "flow-euler" else {}
    defaults = SAMPLERS[name].defaults if name in SAMPLERS else {}
    return {
        "kind": name,
        "schedule": old.schedule,
        "guidance": old.guidance if name == "ode" else 1.0,
        "keeps_norm": old.keeps_norm,
        "embedded_guidance": old.embedded_guidance,
        "default_steps": old.default_steps,
        **spacing,
        **defaults,
    }


def _names(prediction: Prediction) -> str:
    return ", ".join(["ode", *(kind.name for kind in SAMPLERS.values() if prediction in kind.predictions)])


def _explained(error: ValidationError) -> str:
    """The first of pydantic's complaints, by the option that it is about."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return str(first["msg"]).removeprefix("Value error, ")
    option = {"embedded_guidance": "guidance", "default_steps": "steps"}.get(str(first["loc"][0]), str(first["loc"][0]))
    limits = {
        "guidance": "give a number from 0 to 100",
        "eta": "give a number from 0 to 1",
        "steps": "give a whole number from 1 on",
    }
    return f"--{option} {first['input']}: {limits.get(option, str(first['msg']))}"
