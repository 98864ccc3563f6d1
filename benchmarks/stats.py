"""Statistics of samples: percentiles, and the confidence interval and range of a median."""

import math
import statistics
from collections.abc import Sequence


def percentile(samples: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile, in the samples' unit: the smallest sample that `percent` % of the samples do not exceed."""
    return sorted(samples)[max(0, -(-percent * len(samples) // 100) - 1)]


def rounded_percentile(samples: Sequence[float], percent: int) -> float | None:
    """The percentile to two decimals, in the samples' unit; None without samples."""
    return round(percentile(samples, percent), 2) if samples else None


def median_ranks(n: int) -> tuple[int, int]:
    """The ranks, from 0 on, of the two of n sorted samples that enclose the median with at least 95 % confidence.

    The number of samples below the median is binomial with p = 1/2, whatever the samples' distribution: 2.5 % of it is cut off
    on either side. Fewer than six samples are too few to cut any off.
    """
    rank, tail = 0, 1 / 2**n
    while tail + (more := math.comb(n, rank + 1) / 2**n) <= 0.025:
        rank, tail = rank + 1, tail + more
    return rank, n - 1 - rank


def median_and_range(values: Sequence[float | None], digits: int = 1) -> str:
    """`36.1 (35.0 to 38.2)` for the values of several runs; runs without a value are left out."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    median, low, high = (f"{of(known):.{digits}f}" for of in (statistics.median, min, max))
    return f"{median} ({low} to {high})" if len(known) > 1 else median
