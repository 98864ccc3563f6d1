import numpy as np
import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from flashdiff.errors import ConfigError
from flashdiff.sampling import Sampler
from flashdiff.schedule import FlowSchedule, Grid, NoiseSchedule, ShiftBySizeAndSteps, trailing_times

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_levels_equal_those_of_diffusers(beta_schedule: str) -> None:
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule)
    ours = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule)
    alphas, sigmas = ours.levels(list(range(1000)))
    np.testing.assert_allclose(alphas**2, reference.alphas_cumprod.double().numpy(), rtol=2e-4)
    np.testing.assert_allclose(alphas**2 + sigmas**2, 1)


def test_the_clean_end_has_no_noise() -> None:
    alphas, sigmas = SCHEDULE.levels([0, -1])
    assert (alphas[1], sigmas[1]) == (1, 0)
    assert sigmas[0] > 0


def test_a_scheduler_of_another_kind_is_refused() -> None:
    config = {"num_train_timesteps": 1000, "beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "squaredcos_cap_v2"}
    with pytest.raises(ConfigError, match=r"x/scheduler: 'beta_schedule' = 'squaredcos_cap_v2'"):
        NoiseSchedule.from_scheduler_config(config, source="x/scheduler")


def test_a_flow_schedulers_other_shifts_are_refused() -> None:
    dynamic = {"use_dynamic_shifting": True, "time_shift_type": "exponential", "shift_terminal": None}
    assert FlowSchedule.from_scheduler_config(dynamic, source="x", tokens=256).shift == pytest.approx(np.exp(0.5))
    for change in ({"shift_terminal": 0.02}, {"time_shift_type": "linear"}):
        with pytest.raises(ConfigError, match=f"x/scheduler: the scheduler's {next(iter(change))}"):
            FlowSchedule.from_scheduler_config({**dynamic, **change}, source="x/scheduler", tokens=256)


@pytest.mark.parametrize("steps", [2, 4, 8, 50])
def test_levels_are_stretched_to_a_terminal_one_as_by_diffusers(steps: int) -> None:
    config = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    schedule = FlowSchedule.from_scheduler_config(config, source="x", tokens=4096, may_stretch=True)
    reference = FlowMatchEulerDiscreteScheduler(**config)
    reference.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=np.log(schedule.shift))
    sampler = Sampler(kind="flow-euler", schedule=schedule, default_steps=steps)
    np.testing.assert_allclose(sampler.times(steps, 4096), reference.timesteps.numpy(), atol=1e-3)
    assert sampler.times(steps, 4096)[-1] == pytest.approx(20)
    assert sampler.times(1, 4096) == [1000]


@pytest.mark.parametrize("tokens", [4, 256, 4096, 4300, 4301, 16384])
def test_the_shift_of_flux2_is_that_of_its_pipeline(tokens: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    shift = ShiftBySizeAndSteps(measured="flux2")
    for steps in (1, 4, 10, 50, 200):
        assert np.log(shift.at(tokens, steps)) == pytest.approx(compute_empirical_mu(tokens, steps))
    assert shift.at(tokens) == shift.at(tokens, 50)


@pytest.mark.parametrize("solver_steps", [4, 8, 12, 16, 32, 64])
def test_modes_are_the_inference_grid(solver_steps: int) -> None:
    grid = Grid(solver_steps=solver_steps)
    modes = [grid.solver_times()[index] for index in grid.mode_indices()]
    assert modes == grid.inference_times(4) == [999, 749, 499, 249]
    assert grid.inference_times(2) == [999, 499]
    assert grid.inference_times(1) == [999]
    for steps in range(1, 5):
        times = grid.inference_times(steps)
        assert len(times) == steps
        assert set(times) <= set(modes)
        assert times == sorted(times, reverse=True)


def test_a_grid_whose_modes_would_fall_between_its_times_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of modes"):
        Grid(solver_steps=10)


def test_trailing_times_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps in (1, 3, 7, 50):
        scheduler.set_timesteps(steps)
        assert trailing_times(1000, steps) == scheduler.timesteps.tolist()
