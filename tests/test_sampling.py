"""The samplers against closed forms: for data x_0 ~ N(0, s^2) the best denoiser and the ODE's solution are known."""

import numpy as np
import pytest

from flashdiff.prediction import Prediction, to_x0, with_norm_of
from flashdiff.sampling import Sampler, extrapolate, ode_step, ode_weights, renoise
from flashdiff.schedule import NoiseSchedule, trailing_times
from flashdiff.tasks import TASKS

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DATA_STD = 0.5


def _walk(steps: int, second_order: bool) -> float:
    """The ODE from x = 1 at t = 999 down to t = 499, half of the steps, with the exact denoiser of Gaussian data."""
    times = trailing_times(1000, steps)
    alphas, sigmas = SCHEDULE.levels([*times, -1])
    weights = ode_weights(*SCHEDULE.levels(times))
    x, previous = np.ones(1), None
    for i in range(steps // 2):
        x0 = x * alphas[i] * DATA_STD**2 / (alphas[i] ** 2 * DATA_STD**2 + sigmas[i] ** 2)
        estimate = extrapolate(x0, previous, weights[i]) if second_order and previous is not None else x0
        x, previous = ode_step(x, estimate, alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]), x0
    return float(x[0])


def test_the_ode_converges_to_the_exact_solution_with_the_order_it_claims() -> None:
    alphas, sigmas = SCHEDULE.levels([999, 499])
    variances = alphas**2 * DATA_STD**2 + sigmas**2
    exact = np.sqrt(variances[1] / variances[0])  # the ODE maps marginals to marginals
    for second_order, ratio in ((False, 2), (True, 4)):
        errors = [abs(_walk(steps, second_order) - exact) for steps in (40, 80, 160)]
        assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.2)
        assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.2)


def test_the_whole_ode_ends_at_the_clean_image() -> None:
    alphas, sigmas = SCHEDULE.levels([19, -1])
    assert ode_step(np.array(0.7), np.array(0.3), alphas[0], sigmas[0], alphas[1], sigmas[1]) == 0.3
    assert ode_weights(*SCHEDULE.levels(trailing_times(1000, 10)))[-1] == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_x0_comes_back_from_every_prediction(prediction: Prediction) -> None:
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 4, 4))
    alpha, sigma = (level.reshape(2, 1, 1, 1) for level in SCHEDULE.levels([10, 900]))
    x_t = renoise(x0, noise, alpha, sigma)
    output = noise if prediction == "epsilon" else alpha * noise - sigma * x0
    np.testing.assert_allclose(to_x0(prediction, output, x_t, alpha, sigma), x0, atol=1e-9)


def test_guidance_one_is_the_conditional_and_more_goes_beyond_it() -> None:
    conditional, unconditional = 2.0, 1.0
    for scale, wanted in ((1.0, 2.0), (3.0, 4.0)):
        weights = TASKS["text_to_image"].weights(scale, {})
        assert weights[0] * conditional + weights[1] * unconditional == wanted


def test_an_edits_three_weights_are_those_of_the_papers_nested_sums() -> None:
    both, image, neither = 2.0, 5.0, 1.0
    weights = TASKS["edit"].weights(7.5, {"image_guidance": 1.5})
    found = sum(weight * output for weight, output in zip(weights, (both, image, neither), strict=True))
    assert found == neither + 1.5 * (image - neither) + 7.5 * (both - image)
    assert sum(weights) == 1


def test_guided_outputs_take_the_lengths_of_others_patch_by_patch() -> None:
    import torch

    values, reference = np.random.default_rng(0).normal(size=(2, 3, 16, 4, 6))
    found = with_norm_of(values, reference)

    def packed(x: np.ndarray) -> np.ndarray:  # [B, tokens, 4 C], as Qwen-Image's pipeline sees them
        return x.reshape(3, 16, 2, 2, 3, 2).transpose(0, 2, 4, 1, 3, 5).reshape(3, 6, 64)

    norms = np.linalg.norm(packed(reference), axis=-1, keepdims=True) / np.linalg.norm(packed(values), axis=-1, keepdims=True)
    np.testing.assert_allclose(packed(found), packed(values) * norms)
    np.testing.assert_allclose(with_norm_of(torch.from_numpy(values), torch.from_numpy(reference)).numpy(), found)


def test_a_flash_sampler_without_its_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="flash sampler needs its grid"):
        Sampler(kind="flash", schedule=SCHEDULE, default_steps=4)


def test_ddim_of_diffusers_takes_the_same_step() -> None:
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(5)
    x, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = scheduler.step(noise, 799, x).prev_sample
    alphas, sigmas = SCHEDULE.levels([799, 599])
    x0 = to_x0("epsilon", noise.numpy(), x.numpy(), alphas[0], sigmas[0])
    np.testing.assert_allclose(ode_step(x.numpy(), x0, alphas[0], sigmas[0], alphas[1], sigmas[1]), expected.numpy(), atol=1e-4)
