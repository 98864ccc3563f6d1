"""`serve` and `generate` with `--base`: a bundle is built into the cache, once, and used as a bundle is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashdiff import cli
from flashdiff.cli.bundles import bundle_of_base
from flashdiff.errors import ConfigError

ORDER = ("--steps", "2", "--seed", "3")


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.slow
def test_generate_builds_once_and_gives_the_pixels_of_the_bundle(
    capfd: pytest.CaptureFixture[str], tiny_base: Path, flash_lora: Path, student_bundle: Path, tmp_path: Path
) -> None:
    asked = ["--base", tiny_base, "--lora", flash_lora, "--batch", "1,2,4"]
    for said in ("published", "is up to date"):
        assert cli.main(["generate", *map(str, asked), "a monster", "-o", str(tmp_path / "base.png"), *ORDER]) == 0
        report = capfd.readouterr().err
        assert f"{os.environ['XDG_CACHE_HOME']}/flashdiff/bundles/" in report
        assert said in report
    assert cli.main(["generate", str(student_bundle), "-o", str(tmp_path / "bundle.png"), *ORDER, "a monster"]) == 0
    assert np.array_equal(_pixels(tmp_path / "base.png"), _pixels(tmp_path / "bundle.png"))


@pytest.mark.slow
def test_serve_builds_and_serves_under_the_names_of_base_and_lora(tiny_base: Path, flash_lora: Path) -> None:
    command = ["serve", "--base", str(tiny_base), "--lora", str(flash_lora), "--batch", "1,2,4", "--port", "0"]
    with subprocess.Popen([sys.executable, "-m", "flashdiff", *command], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        lines: list[str] = []
        try:
            log = next(line for line in server.stderr if lines.append(line) or "serving" in line)  # type: ignore[func-returns-value]
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        assert "tiny+flash" in log
        assert any("/bundles/" in line for line in lines)


def test_a_failed_build_ends_the_command_with_its_error(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--base", "nothing", "a monster", "-o", str(tmp_path / "x.png")])
    assert ended.value.code == 2
    assert "flashdiff: error: no base model 'nothing'" in capfd.readouterr().err


def test_options_of_a_build_need_a_base(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    for option, value in (("lora", "x"), ("preset", "lcm"), ("precision", "fp16"), ("variant", "fp16")):
        said = f"--{option} is settled when a bundle is built: give it to build-engine, or with --base"
        assert said in _refused(capsys, "serve", "bundle", f"--{option}", value)
        assert said in _refused(capsys, "generate", "bundle", "x", "-o", out, f"--{option}", value)
    assert "leave 'bundle' out" in _refused(capsys, "generate", "bundle", "x", "-o", out, "--base", "base")
    assert "give a BUNDLE, a --base to build one from, or a --repository" in _refused(capsys, "serve")


def test_a_revision_is_for_a_base_on_the_hub(capsys: pytest.CaptureFixture[str], tiny_base: Path, tmp_path: Path) -> None:
    for base in (tiny_base, "owner/name@main", "avatars"):
        said = f"--revision v1: it is for a base on the hub, owner/name, and {base} is none"
        assert said in _refused(capsys, "build-engine", base, "--revision", "v1", "--out", tmp_path / "out")


def test_other_folders_and_other_options_are_other_bundles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr("flashdiff.cli.bundles._built", lambda command, bundle: made.append(command) or bundle)
    parser = cli._parser()

    def place(*arguments: str) -> Path:
        options = parser.parse_args(["serve", *arguments])
        options.variables.fill(options, {})
        return bundle_of_base(options)

    for name in ("one", "other"):
        (tmp_path / name / "base").mkdir(parents=True)
    places = [
        place("--base", "owner/base"),
        place("--base", "owner/base", "--lora", "owner/lcm/weights.safetensors:0.5", "--sampler", "lcm"),
        place("--base", "owner/base", "--revision", "v2"),
        *(place("--base", str(tmp_path / name / "base")) for name in ("one", "other")),
    ]
    assert len({*places}) == len(places)
    assert [path.name for path in places] == ["base", "base+weights", "base", "base", "base"]
    assert made[1] == ["build-engine", "owner/base", "--lora=owner/lcm/weights.safetensors:0.5", "--sampler=lcm"]
    assert place("--base", "owner/base") == places[0]


def test_a_bundle_in_the_cache_serves_where_nothing_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    parser = cli._parser()
    options = parser.parse_args(["serve", "--base", "never-built"])
    options.variables.fill(options, {})
    with pytest.raises(ConfigError, match="this command needs 'torch'"):
        bundle_of_base(options)
    monkeypatch.setattr("flashdiff.cli.bundles.need", lambda *_: pytest.fail("the bundle is there"))
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: path.name == "manifest.json")
    assert bundle_of_base(options).name == "never-built"
