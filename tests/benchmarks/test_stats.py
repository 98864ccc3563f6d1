"""Percentiles, and the confidence interval and range of medians."""

import numpy as np
import pytest

from benchmarks.stats import median_and_range, median_ranks, percentile, rounded_percentile


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile(range(20, 0, -1), 95) == 19
    assert [percentile(range(1, 11), percent) for percent in (0, 50, 95, 100)] == [1, 5, 10, 10]
    assert percentile([7.0], 99) == 7
    assert (rounded_percentile([1.2345], 50), rounded_percentile([], 50)) == (1.23, None)


def test_median_lies_in_its_interval_19_times_of_20() -> None:
    assert [median_ranks(n) for n in (1, 5, 6, 20, 100)] == [(0, 0), (0, 4), (0, 5), (5, 14), (39, 60)]
    rng = np.random.default_rng(0)
    low, high = median_ranks(20)
    sorted_samples = np.sort(rng.exponential(size=(4000, 20)))  # of a lopsided distribution, whose median is ln 2
    inside = (sorted_samples[:, low] <= np.log(2)) & (np.log(2) <= sorted_samples[:, high])
    assert inside.mean() == pytest.approx(0.959, abs=0.01)


def test_runs_without_a_value_are_left_out_of_the_range() -> None:
    assert median_and_range([3.0, None, 1.0, 2.0]) == "2.0 (1.0 to 3.0)"
    assert median_and_range([0.456, None], digits=2) == "0.46"
    assert median_and_range([None]) == "-"
