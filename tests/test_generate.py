import numpy as np
import pytest
from orders import from_image
from served import intercept

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import FLASH, GUIDED, FakeComponents
from flashdiff.errors import BackendError, RequestError
from flashdiff.generate import finish_rows, generate, prepare, unconditional_of
from flashdiff.noise import image_noise
from flashdiff.orders import Order
from flashdiff.rows import Row, denoise_rows, start_rows
from flashdiff.sampling import Sampler
from flashdiff.tasks import check_order


@pytest.mark.parametrize("sampler", [FLASH, GUIDED])
def test_images_do_not_depend_on_their_company(sampler: object) -> None:
    fake = FakeComponents(sampler)  # type: ignore[arg-type]
    orders = [check_order(fake.spec, prompt=f"prompt {i}", seed=i, steps=1 + i % 4, count=1 + i % 2) for i in range(5)]
    together = generate(fake, orders)
    for order, images in zip(orders, together, strict=True):
        np.testing.assert_array_equal(generate(fake, [order])[0], images)


def test_rows_at_different_steps_share_a_call() -> None:
    fake = FakeComponents()
    rows = [_row(fake, check_order(fake.spec, prompt=prompt, steps=steps)) for prompt, steps in (("a", 4), ("b", 2))]
    denoise_rows(fake, rows[:1])
    denoise_rows(fake, rows)
    assert [row.step for row in rows] == [2, 1]
    assert fake.calls[-1] == ("denoiser", 2)


def test_the_fake_converges_to_its_prompt_color_for_both_samplers() -> None:
    for sampler in (FLASH, GUIDED):
        fake = FakeComponents(sampler.model_copy(update={"guidance": 1.0}))
        image = generate(fake, [check_order(fake.spec, prompt="hello")])[0][0]
        color = fake.call("text_encoder", fake.tokenize(["hello"]))["color"][0]
        expected = np.clip(color * 127.5 + 127.5, 0, 255).round()
        assert np.abs(image.astype(int) - expected).max() <= 1


def test_noise_drawn_at_the_start_or_step_by_step_gives_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeComponents()
    _show_noise(fake)
    order = check_order(fake.spec, prompt="p", seed=4)
    early = generate(fake, [order])[0][0]
    monkeypatch.setattr("flashdiff.rows._EARLY_VALUES", 0)
    np.testing.assert_array_equal(generate(fake, [order])[0][0], early)


def test_image_i_of_a_request_is_the_image_of_seed_plus_i() -> None:
    fake = FakeComponents()
    _show_noise(fake)
    three = generate(fake, [check_order(fake.spec, prompt="p", seed=4, count=3, steps=1)])[0]
    alone = generate(fake, [check_order(fake.spec, prompt="p", seed=6, steps=1)])[0][0]
    np.testing.assert_array_equal(three[2], alone)
    assert (three[0] != three[1]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "prompt: '  ' is not allowed; it must not be empty"),
        ({"prompt": "caf\udce9"}, "it must be valid Unicode text"),
        ({"prompt": "x" * 10_000}, r"prompt: 'x+\.\.\. is not allowed; 10000 characters are more than 32 tokens can be"),
        ({"steps": 5}, "steps: 5 is not allowed; this model takes 1 to 4"),
        ({"steps": 0}, "steps: 0 is not allowed"),
        ({"size": Size(1, 2)}, "size: '1x2' is not allowed; this model was built for 64x64, 128x64"),
        ({"count": 17}, "count: 17 is not allowed; it must be between 1 and 16"),
        ({"seed": -1}, "seed: -1 is not allowed"),
    ],
)
def test_an_impossible_order_names_field_value_and_what_is_allowed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_order(FakeComponents().spec, **{"prompt": "p", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", [FLASH, GUIDED])
@pytest.mark.parametrize(("strength", "taken"), [(0.01, 1), (0.5, 2), (1.0, 4)])
def test_an_image_to_start_from_is_noised_to_the_first_time_that_is_left(sampler: Sampler, strength: float, taken: int) -> None:
    fake = FakeComponents(sampler)
    picture = np.full((64, 64, 3), 200, dtype=np.uint8)
    order = from_image(check_order(fake.spec, prompt="p", seed=5, steps=4), picture, strength)
    row = _row(fake, order)
    assert row.times == sampler.times(4)[-taken:]
    alphas, sigmas = sampler.schedule.levels(row.times[:1])
    noise = image_noise(5, 0, (3, 8, 8))
    np.testing.assert_allclose(row.latents, alphas[0] * (200 / 127.5 - 1) + sigmas[0] * noise, atol=1e-6)
    generate(fake, [order])
    assert [part for part, _ in fake.calls][-2 - taken :] == ["encoder", *taken * ["denoiser"], "decoder"]


@pytest.mark.parametrize(
    ("steps", "strength", "taken"),
    [(4, 0.8, 3), (2, 0.8, 1), (1, 0.8, 1), (4, 0.7, 2), (10, 0.35, 3), (10, 0.7, 7), (5, 0.2, 1), (50, 0.58, 29)],
)
def test_a_strength_takes_the_steps_that_diffusers_takes_however_it_came(steps: int, strength: float, taken: int) -> None:
    order = check_order(FakeComponents(GUIDED).spec, prompt="p", steps=steps)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    assert from_image(order, picture, strength).steps_taken == taken
    assert from_image(order, picture, float(np.float32(strength))).steps_taken == taken


@pytest.mark.parametrize(
    ("width", "strength", "message"),
    [
        (64, 0.0, "strength: 0.0 is not allowed; it must be above 0 and at most 1"),
        (64, 1.5, "strength: 1.5 is not allowed"),
        (64, float("nan"), "strength: nan is not allowed"),
        (32, 0.5, "image: '32x64' is not allowed; it must have 64x64 pixels"),
        (0, 0.5, r"strength: 0.5 is not allowed; it needs an image \(image_to_image\)"),
    ],
)
def test_an_image_that_does_not_fit_names_what_is_wrong(width: int, strength: float, message: str) -> None:
    inputs = {"image": np.zeros((64, width, 3), dtype=np.uint8)} if width else {}
    with pytest.raises(RequestError, match=message):
        check_order(FakeComponents().spec, prompt="p", inputs=inputs, parameters={"strength": strength})


def test_inputs_and_parameters_that_no_task_takes_are_named_with_what_is_taken() -> None:
    spec, image = FakeComponents().spec, np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(RequestError, match=r"inputs: 'mask' is not allowed; .*image_to_image takes image"):
        check_order(spec, prompt="p", inputs={"mask": image})
    with pytest.raises(RequestError, match=r"eta: 0\.5 is not allowed; no task of this model takes it"):
        check_order(spec, prompt="p", parameters={"eta": 0.5})


def test_a_number_that_is_not_finite_is_an_error_and_never_an_image() -> None:
    fake = FakeComponents()
    row = _row(fake, check_order(fake.spec, prompt="p", steps=1))
    row.latents[0, 0, 0] = np.nan
    with pytest.raises(BackendError, match="not finite"):
        finish_rows(fake, [row])
    with pytest.raises(BackendError, match="not finite"):
        denoise_rows(fake, [row])
    intercept(fake, "encoder", lambda call, inputs: {"latents": np.nan * call(inputs)["latents"]})
    with pytest.raises(BackendError, match="the encoder returned values that are not finite"):
        prepare(fake, "encoder", [np.zeros((64, 64, 3), dtype=np.uint8)])


def _row(fake: FakeComponents, order: Order) -> Row:
    """The only row of an order, prepared."""
    preparations = order.task.preparations(fake.spec, order)
    prepared = {name: prepare(fake, given.part, [given.value])[0] for name, given in preparations.items()}  # type: ignore[arg-type]
    (row,) = start_rows(fake.spec, order, prepared, unconditional_of(fake))
    return row


def _show_noise(fake: FakeComponents) -> None:
    """Make its images show their noise."""
    intercept(fake, "denoiser", lambda call, inputs: {"output": 0 * inputs["latents"]})
    intercept(fake, "decoder", lambda call, inputs: {"images": inputs["latents"]})
