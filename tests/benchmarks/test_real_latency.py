"""Latency at real size, on a tiny network: that all is timed which should be, and nothing is called what it is not."""

from pathlib import Path

import pytest
from tiny import FAMILIES

from benchmarks.real_latency import main, run


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_students_teachers_and_stock_diffusers_are_timed_and_so_is_the_worker(family: str, tmp_path: Path) -> None:
    said: list[str] = []
    found = run(
        family,
        FAMILIES[family](tmp_path / family),
        precision="bf16",
        batches=(1, 2),
        repeats=1,
        teacher_steps=(2,),
        compiles=False,
        worker_s=0.2,
        report=said.append,
    )
    totals = [(row["model"], row["batch"], row["steps"], row["nfe"]) for row in found["rows"] if row["stage"] == "total"]
    ours = [("student", batch, steps, steps) for batch in (1, 2) for steps in (1, 2, 3, 4)]
    stock = [("diffusers", batch, steps, steps) for batch in (1, 2) for steps in (2, 4)]
    guided = [("teacher", 1, 2, 4), ("teacher", 2, 2, 4), ("diffusers, guided", 1, 2, 4)]
    assert sorted(totals) == sorted([*ours, *stock, *guided])
    assert {row["precision"] for row in found["rows"]} == {"bf16"}
    assert [row["decoding"] for row in found["worker"]] == ["beside", "in turn"] * 2
    assert all(row["images_per_s"] > 0 for row in found["worker"])
    assert any("Where the rest of the ideal speed-up went" in line for line in said)


def test_options_that_make_no_sense_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sd15", "--repeats", "0", "--json", str(tmp_path / "x.json")]) == 1
    assert "--repeats 0: give a number from 1 on" in capsys.readouterr().err
