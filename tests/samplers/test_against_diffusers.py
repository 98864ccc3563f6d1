"""Every sampler against diffusers' own scheduler: the same network, the same noise, latents equal to 1e-5 after every step.

diffusers keeps its table of noise levels in float32, which alone moves latents by up to 3e-5. It is given the same table in
float64, except in the last test, which takes the schedulers as they are.
"""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.noise import image_noise
from flashdiff.prediction import Prediction
from flashdiff.presets import PRESETS, Preset
from flashdiff.rows import Row, denoise_rows, start_rows
from flashdiff.samplers.options import SamplingOptions, sampled_as
from flashdiff.sampling import Sampler
from flashdiff.schedule import FlowSchedule, NoiseSchedule, Schedule, ShiftBySize
from flashdiff.tasks import check_order

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own code

STEPS = (*range(1, 9), 50)
SHAPE = (3, 8, 8)
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
TOLERANCE = 1e-5

Network = Callable[[NDArray[Any], float, float, float], NDArray[Any]]


def _network(prediction: Prediction) -> Network:
    """A smooth stand-in for a trained network: x_0 of latents and time, as the prediction that the scheduler wants."""

    def predict(x: NDArray[Any], time: float, alpha: float, sigma: float) -> NDArray[Any]:
        x = x.astype(np.float64)
        if prediction == "trigflow":
            alpha, sigma = np.cos(time), np.sin(time)
        x0 = 0.8 * np.tanh(x[:, ::-1]) + 0.2 * np.sin(time / 90)
        eps = (x - alpha * x0) / sigma
        outputs = {"epsilon": eps, "sample": x0, "flow": eps - x0}
        return outputs[prediction] if prediction in outputs else alpha * eps - sigma * x0

    return predict


def _ours(sampler: Sampler, prediction: Prediction, steps: int, tokens: int = 16) -> tuple[list[NDArray[Any]], list[float]]:
    """The latents before each step and at the end, and the times."""
    walk = sampler.walk(prediction, steps, tokens)
    assert walk
    network = _network(prediction)
    latents = np.float32(walk.start) * image_noise(7, 0, SHAPE)
    seen = [latents]
    for step, time in enumerate(walk.times):
        output = network(latents, time, walk.alphas[step], walk.sigmas[step]).astype(np.float32)
        noise = image_noise(7, step + 1, SHAPE) if walk.needs_noise(step) else None
        latents = walk.advance(step, latents, output, noise)
        seen.append(latents)
    return seen, walk.times


def _theirs(
    monkeypatch: pytest.MonkeyPatch, scheduler: Any, sampler: Sampler, prediction: Prediction, steps: int, **settings: Any
) -> tuple[list[NDArray[Any]], list[float]]:
    """The same with a scheduler of diffusers; its latents are brought to our scale."""
    draws = iter(range(1, 1000))
    noise_of: list[int] = []
    module: Any = inspect.getmodule(type(scheduler))
    monkeypatch.setattr(
        module, "randn_tensor", lambda *_, **__: torch.from_numpy(image_noise(7, noise_of[-1], SHAPE))[None].double()
    )
    if not settings:
        settings = {"num_inference_steps": steps}
    scheduler.set_timesteps(**settings)
    if hasattr(scheduler, "sigmas") and isinstance(module.torch, _Float64Torch):
        scheduler.sigmas = scheduler.sigmas.double()
    step_settings = {"eta": sampler.eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    start = float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0
    scale = sampler.walk(prediction, steps, 16)
    assert scale
    if sampler.kind == "scm":
        start = 0.5  # the pipeline's
    latents = torch.from_numpy(image_noise(7, 0, SHAPE))[None].double() * start
    network, seen, times = _network(prediction), [], []
    timesteps = scheduler.timesteps[:-1] if sampler.kind == "scm" else scheduler.timesteps
    for step, time in enumerate(timesteps):
        noise_of.append(next(draws))
        scaled = scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents
        seen.append(scaled[0].numpy())
        times.append(float(time))
        output = network(scaled[0].numpy(), float(time), scale.alphas[step], scale.sigmas[step])
        latents = scheduler.step(torch.from_numpy(output)[None], time, latents, return_dict=False, **step_settings)[0].double()
    seen.append(latents[0].numpy())
    return seen, times


def _check(
    monkeypatch: pytest.MonkeyPatch, scheduler: Any, sampler: Sampler, prediction: Prediction, steps: int, **given: Any
) -> None:
    if isinstance(sampler.schedule, NoiseSchedule) and sampler.kind != "scm":
        alpha_bar = sampler.schedule.levels(list(range(1000)))[0] ** 2
        last = scheduler.alphas_cumprod[-1]  # Euler's is not 0 where it should be
        scheduler.alphas_cumprod = torch.from_numpy(alpha_bar)
        if sampler.schedule.rescale_betas_zero_snr:
            scheduler.alphas_cumprod[-1] = last
        if not sampler.schedule.set_alpha_to_one:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    ours, our_times = _ours(sampler, prediction, steps)
    theirs, their_times = _theirs(monkeypatch, scheduler, sampler, prediction, steps, **given)
    np.testing.assert_allclose(our_times, their_times, atol=2e-4)  # float32 holds no more of a time near 1000
    assert len(ours) == len(theirs)
    for here, there in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(here, there, atol=TOLERANCE, rtol=0)


def _schedule(**changes: Any) -> NoiseSchedule:
    return NoiseSchedule(**{**SD, **changes})


def _sampler(kind: str, schedule: Schedule, **settings: Any) -> Sampler:
    return Sampler.model_validate({"kind": kind, "schedule": schedule, "default_steps": 4, **settings})


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lcm_with_its_boundary(monkeypatch: pytest.MonkeyPatch, prediction: Prediction, steps: int) -> None:
    scheduler = diffusers.LCMScheduler(**SD, prediction_type=prediction)
    _check(monkeypatch, scheduler, _sampler("lcm", _schedule()), prediction, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8])
def test_lcm_with_another_scaling_and_solver(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    scheduler = diffusers.LCMScheduler(**SD, timestep_scaling=0.003, original_inference_steps=25)
    _check(monkeypatch, scheduler, _sampler("lcm", _schedule(), timestep_scaling=0.003, original_steps=25), "epsilon", steps)


@pytest.mark.parametrize("times", [(399,), (999, 749, 499, 249)])
def test_dmd2_at_its_times(monkeypatch: pytest.MonkeyPatch, times: tuple[int, ...]) -> None:
    sampler = _sampler("lcm", _schedule(), timesteps=times)
    assert sampler.max_steps == len(times)
    _check(monkeypatch, diffusers.LCMScheduler(**SD), sampler, "epsilon", len(times), timesteps=list(times))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler(monkeypatch: pytest.MonkeyPatch, prediction: Prediction, spacing: Any, steps: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SD, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1)
    _check(monkeypatch, scheduler, _sampler("euler", _schedule(steps_offset=1), spacing=spacing), prediction, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral(monkeypatch: pytest.MonkeyPatch, prediction: Prediction, spacing: Any, steps: int) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **SD, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
    )
    _check(monkeypatch, scheduler, _sampler("euler-ancestral", _schedule(steps_offset=1), spacing=spacing), prediction, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("eta", "final"), [(0.0, True), (0.0, False), (0.6, True), (1.0, False)])
def test_ddim(monkeypatch: pytest.MonkeyPatch, prediction: Prediction, spacing: Any, steps: int, eta: float, final: bool) -> None:
    settings: dict[str, Any] = {"steps_offset": 1, "set_alpha_to_one": final}
    scheduler = diffusers.DDIMScheduler(**SD, **settings, prediction_type=prediction, timestep_spacing=spacing, clip_sample=False)
    _check(monkeypatch, scheduler, _sampler("ddim", _schedule(**settings), spacing=spacing, eta=eta), prediction, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.75, 1.0])
def test_tcd(monkeypatch: pytest.MonkeyPatch, prediction: Prediction, steps: int, eta: float) -> None:
    scheduler = diffusers.TCDScheduler(**SD, prediction_type=prediction)
    _check(monkeypatch, scheduler, _sampler("tcd", _schedule(), eta=eta), prediction, steps)


_OF_PRESET: dict[str, tuple[str, dict[str, Any]]] = {
    "lcm": ("LCMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}),
    "tcd": ("TCDScheduler", {}),
}


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.sampler in _OF_PRESET])
def test_presets_of_diffusion_models_are_the_schedulers_their_cards_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On SD's own noise levels, at the number of steps of the card."""
    preset = PRESETS[name]
    kind, settings = _OF_PRESET[preset.sampler]
    prediction: Prediction = preset.prediction or "epsilon"
    scheduler = getattr(diffusers, kind)(**SD, **settings, prediction_type=prediction)
    given = {"timesteps": [*preset.timesteps]} if preset.timesteps else {}
    sampler = _preset_sampler(preset, _schedule(**({"set_alpha_to_one": False} if kind == "DDIMScheduler" else {})))
    _check(monkeypatch, scheduler, sampler, prediction, preset.steps, **given)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.sampler == "flow-euler"])
def test_presets_of_flows_are_the_schedulers_their_cards_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At the shift of SD3, or of FLUX by the size, or the student's own."""
    preset = PRESETS[name]
    by_size = preset.name.startswith("hyper-flux")
    shift = 1.0 if preset.family == "flux" else preset.shift or 3.0
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=shift, use_dynamic_shifting=by_size, stochastic_sampling=bool(preset.eta)
    )
    given: dict[str, Any] = {"mu": 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)} if by_size else {}  # of 16 tokens
    if preset.spacing == "linspace":
        given["num_inference_steps"] = preset.steps
    elif preset.timesteps:
        given["sigmas"] = (np.array(preset.timesteps[:: len(preset.timesteps) // preset.steps]) + 1) / 1000
    else:
        given["sigmas"] = np.linspace(1.0, 1 / preset.steps, preset.steps)
    sampler = _preset_sampler(preset, FlowSchedule(shift=shift, by_size=ShiftBySize() if by_size else None))
    _check(monkeypatch, scheduler, sampler, "flow", preset.steps, **given)


def _preset_sampler(preset: Preset, schedule: Schedule) -> Sampler:
    """As `sampled_as` makes it of the preset, on a base with these noise levels."""
    predicts: Prediction = "flow" if isinstance(schedule, FlowSchedule) else "epsilon"
    fake = FakeComponents(_sampler("ode", schedule), max_batch=1)
    spec = fake.spec.model_copy(update={"family": preset.family, "prediction": predicts})
    return sampled_as(spec, SamplingOptions(preset=preset.name)).sampler


class _Float64Torch:
    """torch, for a module that rounds to float32: near zero SNR Euler's latents are 4096 times the noise, and that shows."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["euler", "euler-ancestral", "ddim"])
def test_zero_terminal_snr(monkeypatch: pytest.MonkeyPatch, kind: str, steps: int) -> None:
    classes = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
        "ddim": diffusers.DDIMScheduler,
    }
    extra = {"clip_sample": False} if kind == "ddim" else {}
    scheduler = classes[kind](
        **SD, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, **extra
    )
    monkeypatch.setattr(inspect.getmodule(classes[kind]), "torch", _Float64Torch())
    _check(monkeypatch, scheduler, _sampler(kind, _schedule(rescale_betas_zero_snr=True)), "v_prediction", steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("shift", [1.0, 3.0, None])
def test_flow_euler(monkeypatch: pytest.MonkeyPatch, shift: float | None, spacing: Any, eta: float, steps: int) -> None:
    schedule = FlowSchedule(shift=shift or 1.0, by_size=None if shift else ShiftBySize())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=shift or 1.0, use_dynamic_shifting=shift is None, stochastic_sampling=bool(eta)
    )
    given: dict[str, Any] = {} if shift else {"mu": 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)}  # of 16 tokens
    if spacing == "trailing":
        given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    else:
        given["num_inference_steps"] = steps
    _check(monkeypatch, scheduler, _sampler("flow-euler", schedule, spacing=spacing, eta=eta), "flow", steps, **given)


@pytest.mark.parametrize("steps", STEPS)
def test_scm_of_sana_sprint(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    given = {"num_inference_steps": steps} if steps == 2 else {"num_inference_steps": steps, "intermediate_timesteps": None}
    _check(monkeypatch, diffusers.SCMScheduler(), _sampler("scm", _schedule()), "trigflow", steps, **given)


def test_the_shift_of_a_flow_follows_the_size_as_flux_has_it() -> None:
    sampler = _sampler("flow-euler", FlowSchedule(shift=ShiftBySize().at(4096), by_size=ShiftBySize()))
    walk = sampler.walk("flow", 4, 1024)  # 512x512
    assert walk
    np.testing.assert_allclose(walk.sigmas, [1, 0.849, 0.652, 0.385], atol=1e-3)


MIXED = [
    ("lcm", {}, 4),
    ("lcm", {"timesteps": (999, 749, 499, 249)}, 3),
    ("euler", {}, 5),
    ("euler-ancestral", {}, 2),
    ("ddim", {"eta": 0.5}, 7),
    ("tcd", {"eta": 0.3}, 1),
]


def _row(sampler: Sampler, steps: int, seed: int) -> tuple[FakeComponents, Row]:
    fake = FakeComponents(sampler, max_batch=8)
    order = check_order(fake.spec, prompt="red", seed=seed, steps=steps, size=Size(64, 64))
    (row,) = start_rows(fake.spec, order, {"prompt": {"color": np.full(3, 0.3, dtype=np.float32)}}, None)
    return fake, row


def test_rows_of_one_batch_take_steps_of_different_samplers_and_keep_their_bits() -> None:
    samplers = [(_sampler(kind, _schedule(), **settings), steps) for kind, settings, steps in MIXED]
    alone = []
    for seed, (sampler, steps) in enumerate(samplers):
        fake, row = _row(sampler, steps, seed)
        while not row.is_done:
            denoise_rows(fake, [row])
        alone.append(row.latents)
    fake = FakeComponents(samplers[0][0], max_batch=8)
    rows = [_row(sampler, steps, seed)[1] for seed, (sampler, steps) in enumerate(samplers)]
    while active := [row for row in rows if not row.is_done]:
        denoise_rows(fake, active)
    for row, expected in zip(rows, alone, strict=True):
        np.testing.assert_array_equal(row.latents, expected)


def test_stochastic_noise_is_a_function_of_seed_and_step() -> None:
    sampler = _sampler("euler-ancestral", _schedule())
    images = []
    for seed in (1, 1, 2):
        fake, row = _row(sampler, 4, seed)
        for _ in range(3):
            denoise_rows(fake, [row])
        images.append(row.latents)
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() > 1e-3


def test_times_that_do_not_fall_are_refused() -> None:
    with pytest.raises(ValueError, match="give falling whole numbers from 0 on"):
        _sampler("lcm", _schedule(), timesteps=(249, 999))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["lcm", "euler", "euler-ancestral", "ddim", "tcd"])
def test_as_diffusers_ships_them_only_the_rounding_of_its_tables_is_added(
    monkeypatch: pytest.MonkeyPatch, kind: str, steps: int
) -> None:
    schedulers: dict[str, Any] = {
        "lcm": diffusers.LCMScheduler(**SD),
        "euler": diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
        "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing"),
        "ddim": diffusers.DDIMScheduler(**SD, timestep_spacing="trailing", clip_sample=False),
        "tcd": diffusers.TCDScheduler(**SD),
    }
    sampler = _sampler(kind, _schedule(), eta=0.3 if kind == "tcd" else 0.0)
    ours, _ = _ours(sampler, "epsilon", steps)
    theirs, _ = _theirs(monkeypatch, schedulers[kind], sampler, "epsilon", steps)
    np.testing.assert_allclose(ours[-1], theirs[-1], atol=TOLERANCE, rtol=0)
