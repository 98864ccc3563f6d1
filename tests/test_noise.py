import numpy as np

from flashdiff.noise import image_noise, image_seed


def test_noise_is_a_function_of_seed_and_step() -> None:
    again = image_noise(7, 0, (4, 8, 8))
    np.testing.assert_array_equal(image_noise(7, 0, (4, 8, 8)), again)
    for other in (image_noise(8, 0, (4, 8, 8)), image_noise(7, 1, (4, 8, 8))):
        assert abs(np.corrcoef(again.ravel(), other.ravel())[0, 1]) < 0.2


def test_seed_and_step_are_the_key_of_a_philox_stream() -> None:
    stream = np.random.Generator(np.random.Philox(key=np.array([7, 3], dtype=np.uint64)))
    np.testing.assert_array_equal(image_noise(7, 3, (2, 5)), stream.standard_normal((2, 5), dtype=np.float32))


def test_noise_is_standard_normal() -> None:
    noise = image_noise(0, 3, (100, 100))
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_seeds_of_a_request_count_up_and_wrap() -> None:
    assert [image_seed(5, i) for i in range(3)] == [5, 6, 7]
    assert image_seed(2**64 - 1, 1) == 0
    image_noise(2**64 - 1, 0, (1,))
