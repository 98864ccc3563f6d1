"""The numbers, as pure functions of features: arrays [N, D] in, floats out. No network, no file.

Every statistic is a function of weights over the N images (how often each counts), so that one bootstrap serves all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flashdiff.config import Record

Array = NDArray[np.float64]

BOOTSTRAP_DRAWS = 100

_MOST_GROUPS = 8192
"""The most groups whose kernel matrix is kept: half a gigabyte."""


class Interval(Record):
    """A statistic's value and its 95 % confidence interval; `low` and `high` are None where too few prompts count for one."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        error = "-" if self.low is None or self.high is None else f"{(self.high - self.low) / 2:.2g}"
        return f"{self.value:.3g} ± {error}"


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of a set of features."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: NDArray[np.floating], weights: Array | None = None) -> "Moments":
        """Mean [D] and covariance [D, D] of features [N, D], each counted as often as its weight [N] says."""
        x = features.astype(np.float64)
        w = np.ones(len(x)) if weights is None else weights
        mean = w @ x / w.sum()
        centred = x - mean
        return cls(mean, (centred * w[:, None]).T @ centred / (w.sum() - 1))

    @cached_property
    def root(self) -> Array:
        """The symmetric square root of the covariance, [D, D]."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: Array = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        return root


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2): FID (1706.08500, eq. 6) where the features are Inception's.

    The trace of the root is taken from the eigenvalues of S_a^1/2 S_b S_a^1/2, which is symmetric, so nothing complex arises.
    """
    cross = np.linalg.eigvalsh(a.root @ b.covariance @ a.root)
    difference = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(difference @ difference + traces)


class KernelDistance:
    """KID: the unbiased squared MMD with kernel (x.y / D + 1)^3 (1801.01401, section 4), against one reference set.

    Images of one group (one prompt) are not independent draws, so pairs of them are left out like an image with itself.
    """

    def __init__(self, features: NDArray[np.floating], reference: NDArray[np.floating], groups: NDArray[np.int64]) -> None:
        parts = np.array_split(reference, 1 + len(reference) // 500)
        self.across = sum(_kernel(features, part).sum(1) for part in parts) / len(reference)
        own = ((reference.astype(np.float64) ** 2).sum(1) / reference.shape[1] + 1) ** 3
        total = sum(_kernel(part, reference).sum() for part in parts) - own.sum()
        self.reference = float(total / (len(reference) * (len(reference) - 1)))
        self.groups = np.unique(groups, return_inverse=True)[1]
        self.sizes = np.bincount(self.groups).astype(np.float64)
        order = np.argsort(self.groups, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(int)
        # By group, a part of them at a time: all pairs of 40,000 images would take 13 GB.
        self.within = np.zeros((len(starts), len(starts))) if len(starts) <= _MOST_GROUPS else None
        self.sums = np.zeros(len(starts))
        for members in np.array_split(np.arange(len(starts)), 1 + len(features) // 500):
            rows = order[np.isin(self.groups[order], members)]
            if not len(rows):
                continue
            by_group = np.add.reduceat(_kernel(features[rows], features[order]), starts, axis=1)
            by_group = np.add.reduceat(by_group, np.searchsorted(self.groups[rows], members), axis=0)
            by_group[np.arange(len(members)), members] = 0
            self.sums[members] = by_group.sum(1)
            if self.within is not None:
                self.within[members] = by_group

    def __call__(self, weights: Array | None = None) -> float:
        """The distance; `weights` [N] says how often each image counts, alike within a group."""
        w = np.ones(len(self.groups)) if weights is None else weights
        counts = np.bincount(self.groups, weights=w) / self.sizes
        pairs = w.sum() ** 2 - ((counts * self.sizes) ** 2).sum()
        if self.within is None:
            within = self._first_order(counts)
        else:
            within = counts @ self.within @ counts / pairs if pairs else float("nan")
        return float(within + self.reference - 2 * (w @ self.across) / w.sum())

    def _first_order(self, counts: Array) -> float:
        """The mean over pairs, to first order in how far the groups' counts are from one; exact where all are one."""
        images, sizes, total = len(self.groups), self.sizes, self.sums.sum()
        pairs = images**2 - (sizes**2).sum()
        change = 2 * self.sums / pairs - total / pairs**2 * (2 * images * sizes - 2 * sizes**2)
        return float(total / pairs + (counts - 1) @ change)


def _kernel(a: NDArray[np.floating], b: NDArray[np.floating]) -> Array:
    kernel: Array = (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3
    return kernel


def weighted_mean(values: NDArray[np.floating], weights: Array | None = None) -> float:
    """Mean of values [N]; NaN entries do not count."""
    known = ~np.isnan(values)
    w = np.ones(len(values)) if weights is None else weights
    total = w[known].sum()
    return float((w[known] * values[known]).sum() / total) if total else float("nan")


def spread_within_groups(features: NDArray[np.floating], groups: NDArray[np.int64]) -> Array:
    """For every image, its mean distance to the other images of its group [N]; NaN where it is alone."""
    spread = np.full(len(features), np.nan)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        if len(members) > 1:
            spread[members] = distances(features[members], features[members]).sum(1) / (len(members) - 1)
    return spread


def nearest(features: NDArray[np.floating], reference: NDArray[np.floating]) -> tuple[Array, NDArray[np.int64]]:
    """For features [N, D] the distances [N] to the nearest of the reference [M, D], and the indices [N] of those."""
    far: list[Array] = []
    which: list[NDArray[np.int64]] = []
    for part in np.array_split(features, 1 + len(features) // 500):
        between = distances(part, reference)
        which.append(between.argmin(1))
        far.append(between.min(1))
    return np.concatenate(far), np.concatenate(which)


def distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> Array:
    """Euclidean, [N, M]."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * x @ y.T
    result: Array = np.sqrt(np.clip(squares, 0, None))
    return result


def bootstrap(
    statistic: Callable[[Array | None], float], groups: NDArray[np.int64], *, least: int = 2, seed: int = 0
) -> Interval:
    """The statistic with its 95 % interval: images of one group (a prompt's), numbered by `groups` [N], are drawn together.

    `statistic` maps how often each image counts, [N], or None for once each, to a number.
    The interval is the value plus or minus 1.96 bootstrap standard errors, and not the draws' percentiles: a draw holds
    fewer different images than the set, and distances between distributions grow when it does. Fewer than `least` groups have no
    interval.
    """
    value = statistic(None)
    _, index = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    count = int(index.max()) + 1
    draws: Sequence[float] = [
        statistic(np.bincount(rng.integers(0, count, count), minlength=count)[index].astype(np.float64))
        for _ in range(BOOTSTRAP_DRAWS)
    ]
    known = np.array(draws)[np.isfinite(draws)]
    if count < least or len(known) < 2:
        return Interval(value=value, low=None, high=None)
    error = 1.96 * float(known.std(ddof=1))
    return Interval(value=value, low=value - error, high=value + error)


def share(value: float, prompts: int) -> Interval:
    """A share in [0, 1] with its 95 % score interval (Wilson 1927; Brown, Cai & DasGupta 2001, section 3.1.1), never empty.

    `prompts` is how many different ones count: two images of one prompt are not two trials.
    """
    z = 1.96
    middle = (value + z**2 / (2 * prompts)) / (1 + z**2 / prompts)
    error = z / (1 + z**2 / prompts) * math.sqrt(value * (1 - value) / prompts + z**2 / (4 * prompts**2))
    return Interval(value=value, low=max(0.0, middle - error), high=min(1.0, middle + error))
