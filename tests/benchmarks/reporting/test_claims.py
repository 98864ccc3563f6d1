"""The report's sentences: their numbers."""

import re
from pathlib import Path

from benchmarks.reporting.claims import claims
from benchmarks.reporting.result_files import read_results


def test_claims_have_the_numbers_of_the_measurements(files: list[Path]) -> None:
    speed, stock, quality = [re.findall(r"\d+(?:\.\d+)?", claim) for claim in claims(read_results(files))]
    # 4 steps and their ms, the teacher's steps and ms, speed-up, share of the ideal, ideal
    assert speed == ["4", "20.0", "50", "400", "20.0", "0.80", "25"]
    assert stock == ["4", "90.0", "4.5"]  # ms, and the ratio to the student's
    kid = ["20.0", "19.0", "21.0", "50", "10.0", "9.0", "11.0", "1.0", "0.0", "2.0"]  # student's, teacher's, real images'
    assert quality == ["4", "1000", *kid, "20.0", "20.0", "90.0", "90.0"]  # text score and large attributes of both


def test_claims_need_the_results_they_speak_of(files: list[Path]) -> None:
    assert len(claims(read_results(files[:1]))) == 2
    assert claims(read_results(files[1:2])) == []
