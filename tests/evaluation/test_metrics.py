import sys
import warnings
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from flashdiff.evaluation import metrics
from flashdiff.evaluation.metrics import (
    KernelDistance,
    Moments,
    bootstrap,
    distances,
    frechet_distance,
    nearest,
    share,
    spread_within_groups,
    weighted_mean,
)


def test_the_frechet_distance_of_gaussians_is_the_published_one() -> None:
    """d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) (Dowson & Landau 1982); for commuting C the roots are plain."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0.5, 2, 6), rng.uniform(0.5, 2, 6)
    shift = rng.normal(size=6)
    known = shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    first, second = (Moments(mean, basis * values @ basis.T) for mean, values in ((np.zeros(6), a), (shift, b)))
    assert frechet_distance(first, second) == pytest.approx(known)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)

    samples = [rng.normal(size=(200_000, 6)) * np.sqrt(values) @ basis.T for values in (a, b)]
    estimated = frechet_distance(Moments.of(samples[0]), Moments.of(samples[1] + shift))
    assert estimated == pytest.approx(known, rel=0.03)


def test_non_commuting_covariances_agree_with_the_matrix_root() -> None:
    rng = np.random.default_rng(1)
    a, b = (np.cov(rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)), rowvar=False) for _ in range(2))
    values, vectors = np.linalg.eig(a @ b)
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    known = np.trace(a) + np.trace(b) - 2 * np.trace(root).real
    assert frechet_distance(Moments(np.zeros(5), a), Moments(np.zeros(5), b)) == pytest.approx(known)


def test_the_kernel_distance_is_unbiased_and_grows_with_the_shift() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(size=(400, 4))
    alone = np.arange(60)
    same = [KernelDistance(rng.normal(size=(60, 4)), reference, alone)() for _ in range(60)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(60)
    twins = [KernelDistance(np.repeat(rng.normal(size=(30, 4)), 2, axis=0), reference, alone // 2)() for _ in range(60)]
    assert abs(np.mean(twins)) < 4 * np.std(twins) / np.sqrt(60)
    shifted = [KernelDistance(rng.normal(size=(60, 4)) + shift, reference, alone)() for shift in (0.5, 1.0, 2.0)]
    assert 0 < shifted[0] < shifted[1] < shifted[2]


def test_the_kernel_distance_is_the_sum_over_pairs_it_claims_to_be() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(9, 3))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(9) for j in range(9) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert KernelDistance(x, y, np.arange(7))() == pytest.approx(xx + yy - 2 * xy)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_the_distances_are_those_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    rng = np.random.default_rng(7)
    real, made = (rng.integers(0, 256, (count, 3, 2, 2), dtype=np.uint8) // part for count, part in ((80, 1), (60, 2)))

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).float() / 64

    features = [images.reshape(len(images), -1).astype(np.float32) / 64 for images in (made, real)]
    frechet = FrechetInceptionDistance(Pixels()).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(Pixels(), subsets=1, subset_size=60)
    for metric in (frechet, kernel):
        metric.update(torch.from_numpy(real[:60] if metric is kernel else real), real=True)
        metric.update(torch.from_numpy(made), real=False)
    assert frechet_distance(*map(Moments.of, features)) == pytest.approx(float(frechet.compute()), rel=1e-5)
    assert KernelDistance(features[0], features[1][:60], np.arange(60))() == pytest.approx(float(kernel.compute()[0]), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated")  # of scipy, by clean-fid
def test_the_distances_are_those_of_clean_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cleanfid", reason="pip install --no-deps clean-fid==0.1.35")
    for name in ("torchvision", "torchvision.transforms"):  # which its arithmetic does not use, and which is not installed
        monkeypatch.setitem(sys.modules, name, MagicMock())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid import fid
    rng = np.random.default_rng(8)
    made, real = rng.normal(size=(60, 12)), rng.normal(0.3, 1.2, size=(60, 12))
    a, b = Moments.of(made), Moments.of(real)
    theirs = fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    theirs = fid.kernel_distance(real, made, num_subsets=1, max_subset_size=60)
    assert KernelDistance(made, real, np.arange(60))() == pytest.approx(theirs, rel=1e-6)


def test_the_kernel_distance_of_many_groups_is_the_same_and_its_interval_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    groups = rng.permutation(np.repeat(np.arange(300) * 2, rng.integers(1, 4, 300)))  # of one to three images, with gaps
    features, reference = rng.normal(0.5, 1, size=(len(groups), 4)), rng.normal(0.9, 1, size=(700, 4))
    whole = KernelDistance(features, reference, groups)
    monkeypatch.setattr(metrics, "_MOST_GROUPS", 10)
    without = KernelDistance(features, reference, groups)
    assert without() == pytest.approx(whole())
    exact, near = (bootstrap(distance, groups) for distance in (whole, without))
    assert near.high - near.low == pytest.approx(exact.high - exact.low, rel=0.15)


def test_weights_count_images_as_copies_would() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(5, 3))
    weights = np.array([0, 1, 3, 1, 0], dtype=np.float64)
    copied = x[[1, 2, 2, 2, 3]]
    weighted, plain = Moments.of(x, weights), Moments.of(copied)
    np.testing.assert_allclose(weighted.covariance, plain.covariance)
    np.testing.assert_allclose(weighted.mean, plain.mean)
    assert weighted_mean(np.array([9.0, 1, 2, np.nan, 9]), weights) == pytest.approx(7 / 4)


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(100):
        values = rng.normal(size=80)
        found = bootstrap(lambda weights, values=values: weighted_mean(values, weights), np.arange(80), seed=trial)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert 86 <= covered <= 100


def test_images_of_one_prompt_are_drawn_together() -> None:
    values = np.repeat(np.random.default_rng(6).normal(size=50), 20)  # twenty equal images a prompt tell no more than one
    alone = bootstrap(lambda w: weighted_mean(values, w), np.arange(1000))
    together = bootstrap(lambda w: weighted_mean(values, w), np.repeat(np.arange(50), 20))
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_one_prompt_has_no_interval() -> None:
    found = bootstrap(lambda w: weighted_mean(np.array([1.0, 3.0]), w), np.zeros(2, dtype=int))
    assert (found.value, found.low, found.high) == (2, None, None)
    assert str(found) == "2 ± -"


def test_a_share_has_wilsons_interval() -> None:
    middle = share(0.5, 10)  # Brown, Cai & DasGupta: 5 of 10
    assert (middle.low, middle.high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    none, all_of_them = share(0.0, 10), share(1.0, 10)
    assert (none.low, none.high) == (0, pytest.approx(0.2775, abs=1e-4))
    assert (all_of_them.low, all_of_them.high) == (pytest.approx(0.7225, abs=1e-4), 1)


def test_spread_and_nearest_are_plain_distances() -> None:
    features = np.array([[0.0, 0], [3, 4], [10, 0], [0, 1]])
    spread = spread_within_groups(features, np.array([0, 0, 1, 2]))
    np.testing.assert_allclose(spread[:2], 5)
    assert np.isnan(spread[2:]).all()
    far, which = nearest(features[:2], features[2:])
    np.testing.assert_array_equal(which, [1, 1])
    np.testing.assert_allclose(far, distances(features[:2], features[3:])[:, 0])
