"""Engines take as many threads as this process may keep busy."""

import os
from pathlib import Path

import pytest

from flashdiff.engines.runtime import threads


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("nonsense", 8)],
)
def test_a_containers_quota_counts(cgroup: Path, limit: str, expected: int) -> None:
    (cgroup / "cpu.max").write_text(f"{limit}\n")
    assert threads.cpu_threads() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3)])
def test_so_does_that_of_an_older_kernel(cgroup: Path, quota: str, expected: int) -> None:
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (cgroup / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert threads.cpu_threads() == expected


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("2,1", 2), ("64", 8), ("0", 8), ("", 8), ("many", 8)])
def test_omp_num_threads_may_lower_it(cgroup: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads.cpu_threads() == expected
