"""`flashdiff plan`."""

import json
import os
from pathlib import Path

import pytest

from flashdiff.cli import main
from flashdiff.cli.plan import parse_mix
from flashdiff.errors import ConfigError
from flashdiff.server.planning import measuring
from flashdiff.server.planning import plan as planning


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("2:0.5,4:0.4", "--mix '2:0.5,4:0.4': the shares sum to 0.9, they must sum to 1"),
        ("2:1,4:1", "--mix '2:1,4:1': the shares sum to 2, they must sum to 1"),
        ("2", "--mix '2': '2' is not STEPS:SHARE, as in 2:0.5,4:0.5"),
        ("", "--mix '': '' is not STEPS:SHARE, as in 2:0.5,4:0.5"),
        ("two:1", "--mix 'two:1': 'two:1' is not STEPS:SHARE, as in 2:0.5,4:0.5"),
        ("2:0.5,2:0.5", "--mix '2:0.5,2:0.5': 2 steps are there twice"),
        ("2:nan", "--mix '2:nan': the share nan of 2 steps must be above 0 and at most 1"),
        ("2:-1,4:2", "--mix '2:-1,4:2': the share -1 of 2 steps must be above 0 and at most 1"),
    ],
)
def test_a_mix_that_is_none_is_refused(mix: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mix(mix)
    assert str(caught.value) == message


def test_shares_that_were_rounded_are_scaled_to_1() -> None:
    assert parse_mix("2:0.33,4:0.33,8:0.33") == pytest.approx({2: 1 / 3, 4: 1 / 3, 8: 1 / 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "0", "--p99", "1"], "--rate 0: give a number above 0"),
        (["--rate", "inf", "--p99", "1"], "--rate inf: give a number above 0"),
        (["--rate", "1", "--p99", "-0.5"], "--p99 -0.5: give a number above 0"),
        (["--rate", "1", "--p99", "1", "--timeout", "0"], "--timeout 0: give a number above 0"),
        (["--rate", "1", "--p99", "1", "--size", "64x64,32x32"], "--size 64x64,32x32: give one size"),
    ],
)
def test_wrong_numbers_are_refused_before_the_bundle_is_opened(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "no-such-bundle", *options]) == 2
    assert capsys.readouterr().err == f"flashdiff: error: {message}\n"


def test_steps_and_sizes_that_the_bundle_lacks_are_refused(student_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = [str(student_bundle), "--rate", "1", "--p99", "1"]
    assert main(["plan", *load, "--mix", "2:0.5,99:0.5"]) == 2
    assert capsys.readouterr().err.startswith("flashdiff: error: --mix: steps: 99 is not allowed; this model takes 1 to ")
    assert main(["plan", *load, "--size", "7x7"]) == 2
    assert capsys.readouterr().err.startswith("flashdiff: error: --size: size: '7x7' is not allowed; ")


def test_the_plan_of_a_bundle(student_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "REQUESTS", 200)
    monkeypatch.setattr(measuring, "REHEARSAL_S", 0.5)
    load = [str(student_bundle), "--rate", "0.01", "--p99", "1000", "--mix", "1:0.5,2:0.5", "--format", "jpeg"]
    assert main(["plan", *load, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 1
    assert found["in_time"] == 1.0
    assert found["demand"]["mix"] == {"1": 0.5, "2": 0.5}
    assert found["latency_ms"]["p99"] > 0
    assert main(["plan", *load]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "devices      1"


def test_core_sets_of_all_cores_leave_none_for_the_server(
    student_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "REQUESTS", 50)
    monkeypatch.setattr(measuring, "REHEARSAL_S", 0.1)
    load = [str(student_bundle), "--rate", "0.01", "--p99", "1000", "--mix", "1:1"]
    first, *others = sorted(os.sched_getaffinity(0))
    assert main(["plan", *load, "--device", "cpu:" + "+".join(map(str, (first, *others)))]) == 0
    assert "is every core of this process" in capsys.readouterr().err
    if others:
        assert main(["plan", *load, "--device", f"cpu:{first}"]) == 0
        assert "every core" not in capsys.readouterr().err


def test_a_p99_that_no_device_can_have_is_refused(
    student_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "REHEARSAL_S", 0.1)
    assert main(["plan", str(student_bundle), "--rate", "1", "--p99", "1e-9"]) == 2
    assert "s on an idle device, so no number of devices has a lower 99th percentile" in capsys.readouterr().err
