"""Latency at real size, on a tiny network: what is timed, and under which names."""

from pathlib import Path

import pytest
from tiny import FAMILIES

from benchmarks.real_latency import main, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_students_teachers_and_stock_diffusers_are_timed_and_so_is_the_worker(family: str, tmp_path: Path) -> None:
    reported: list[str] = []
    found = run(
        family,
        FAMILIES[family](tmp_path / family),
        precision="bf16",
        batches=(1, 2),
        repeats=1,
        teacher_steps=(2,),
        with_compiled=False,
        worker_s=0.2,
        report=reported.append,
    )
    totals = [(one["model"], one["batch"], one["steps"], one["nfe"]) for one in found["rows"] if one["stage"] == "total"]
    ours = [("student", batch, steps, steps) for batch in (1, 2) for steps in (1, 2, 3, 4)]
    stock = [("diffusers", batch, steps, steps) for batch in (1, 2) for steps in (2, 4)]
    guided = [("teacher", 1, 2, 4), ("teacher", 2, 2, 4), ("diffusers, guided", 1, 2, 4)]
    assert sorted(totals) == sorted([*ours, *stock, *guided])
    assert {one["precision"] for one in found["rows"]} == {"bf16"}
    assert [one["decoding"] for one in found["worker"]] == ["parallel", "in turn"] * 2
    assert all(one["images_per_s"] > 0 for one in found["worker"])
    assert (
        sum(line.startswith("| student | torch | 1 | 4 |") for line in "\n".join(reported).splitlines()) == 1
    )  # the gap to the ideal


def test_options_that_make_no_sense_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sd15", "--repeats", "0", "--json", str(tmp_path / "x.json")]) == 1
    assert "--repeats 0: give a number from 1 on" in capsys.readouterr().err
