"""Every mistake a user can make is one clear line and a non-zero exit, and leaves nothing half-written."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from flashdiff import cli, defaults
from flashdiff.engines.backends import BACKENDS, best_backend
from flashdiff.engines.config import PrecisionChoice


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashdiff: error: ")
    assert error.count("\n") == 1
    return error


def test_wrong_input_of_every_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, student_bundle: Path, flash_lora: Path
) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "typo.toml").write_text("base = 'avatars'\nbatchsize = 3\n")
    cases = [
        (("distill", tmp_path / "none.toml", "--out", out), "cannot read the recipe"),
        (("distill", tmp_path / "typo.toml", "--out", out), "unknown key 'batchsize', did you mean 'batch_size'?"),
        (("distill", "avatars.toml"), "give --out FOLDER for the student, or --dry-run"),
        (("build-engine", "nothing", "--out", out), "no base model 'nothing'"),
        (("build-engine", empty, "--out", out), "not a diffusers model directory"),
        (("build-engine", "avatars", "--lora", empty, "--out", out), "no LoRA"),
        (("build-engine", "avatars", "--lora", f"{flash_lora}:much", "--out", out), "must be a number"),
        (("build-engine", "avatars", "--lora", flash_lora, "--out", out), "build it with its own base"),
        (("build-engine", "avatars", "--batch", "0", "--out", out), "--batch '0'"),
        (("build-engine", "avatars", "--size", "big", "--out", out), "--size 'big'"),
        (("build-engine", "avatars", "--out", empty), "exists already"),
        (("serve", empty), "not a bundle"),
        (("serve", tmp_path / "none"), "no such bundle; there are avatars (the embedded model)\n"),
        (("serve", student_bundle.parent / "none"), f"no such bundle; there are avatars (the embedded model), {student_bundle}"),
        (("serve", student_bundle, "--port", 99999), "--port 99999"),
        (("serve", student_bundle, "--http-port", 99999), "--http-port 99999"),
        (("serve", student_bundle, "--alias", "a=student"), "give --http-port"),
        (("serve", student_bundle, "--metrics-host", "0.0.0.0"), "--metrics-host is for --metrics-port"),
        (("serve", student_bundle, "--http-port", 0, "--alias", "a"), "--alias a: write ALIAS=NAME"),
        (("serve", student_bundle, "--http-port", 0, "--alias", "a=b"), "there is no model 'b', but student"),
        (("generate", tmp_path / "none", "x", "-o", tmp_path / "x.png"), "no such bundle; there are avatars"),
        (("inspect", tmp_path / "none"), "no such bundle; there are avatars"),
        (("inspect", tmp_path / "typo.toml"), "is a file; a bundle is a folder"),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.bmp"), "must end in .png"),
        (("generate", student_bundle, "x", "-o", tmp_path / "no" / "x.png"), "there is no folder"),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--steps", 9), "this model takes 1 to 4"),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--size", "32x32,64x64"), "--size 32x32,64x64: give one"),
        (
            ("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--negative-prompt", "y"),
            "this model runs without guidance",
        ),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--strength", 0.5), "it needs an image (image_to_image)"),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--noise-level", 20), "noise_level: 20.0 is not allowed"),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--image", tmp_path / "none.png"), "No such file"),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--mask", empty, "--mask", empty), "'mask' is given twice"),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--control", "a=b:1:x"), "--control a=b:1:x: there is no"),
        (("generate", student_bundle, "x", "-o", tmp_path / "x.png", "--reference", "b:x"), "--reference b:x: there is no such"),
        (("build-engine", "avatars", "--reference", "a", "--reference", "b", "--out", out), "--reference is given twice"),
    ]
    for arguments, message in cases:
        assert message in _run(capsys, *arguments), arguments
    assert {path.name for path in tmp_path.iterdir()} <= {"empty", "typo.toml"}
    assert not list(empty.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[
            (name, ("build-engine", "avatars", "--out", "x", name, ""))
            for name in ("--vae", "--variant", "--revision", "--config")
        ],
        *[(name, ("build-engine", "avatars", "--out", "x", f"{name}=")) for name in ("--size", "--batch", "--lora", "--preset")],
        ("--steps", ("evaluate", "avatars", "--steps", "")),
        ("--size", ("generate", "avatars", "a dog", "--out", "x.png", "--size", "")),
        ("--image", ("generate", "avatars", "a dog", "--out", "x.png", "--image", "")),
        ("BUNDLE", ("generate", "", "a dog", "--out", "x.png")),
        ("--size", ("plan", "avatars", "--rate", "1", "--size", "")),
        ("BUNDLE", ("serve", "")),
        ("BUNDLE", ("inspect", "")),
    ],
)
def test_an_empty_value_is_refused_and_means_no_default(
    capsys: pytest.CaptureFixture[str], name: str, arguments: tuple[str, ...]
) -> None:
    assert f"error: {name} '': give a value, or leave it out" in _run(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("serve", "b", "--port", "abc"),
            "argument --port: invalid int value: 'abc'; `flashdiff serve --help` lists the options",
        ),
        (("serve", "b", "--nope"), "unrecognized arguments: --nope; `flashdiff --help` lists the options"),
        (("distill",), "the following arguments are required: RECIPE; `flashdiff distill --help` lists the options"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"flashdiff: error: {message}\n"


def test_an_empty_prompt_is_refused_as_a_prompt(student_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "prompt: '' is not allowed" in _run(capsys, "generate", student_bundle, "", "-o", tmp_path / "x.png")


@pytest.mark.parametrize(("chosen", "seen"), [({}, "1 1"), ({"HF_HUB_DISABLE_TELEMETRY": "", "DO_NOT_TRACK": ""}, "1 1"),
                                              ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "0 None")])  # fmt: skip
def test_telemetry_is_off_unless_chosen(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], seen: str) -> None:
    names = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    for name in names:
        monkeypatch.setenv(name, chosen.get(name, "x"))
        if name not in chosen:
            monkeypatch.delenv(name)
    cli.main(["inspect", "none"])
    assert " ".join(str(os.environ.get(name)) for name in names) == seen


def test_a_missing_package_is_named_with_its_cure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install '.[server]' from flashdiff's checkout" in _run(capsys, "serve", "bundle")


def test_generate_writes_one_file_an_image(student_bundle: Path, tmp_path: Path) -> None:
    assert (
        cli.main(["generate", str(student_bundle), "a dog", "-o", str(tmp_path / "dog.png"), "--count", "2", "--steps", "2"]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dog-0.png", "dog-1.png"]


@pytest.mark.parametrize("option", ["--port", "--http-port", "--metrics-port"])
@pytest.mark.parametrize("model", [("--base", "no-such-base"), ("avatars",)])
def test_a_port_in_use_is_found_before_a_model_is_built(
    model: tuple[str, ...], option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import socket

    monkeypatch.chdir(tmp_path)  # no folder of the embedded model's name is here
    monkeypatch.setattr("flashdiff.cli.bundles._built", lambda *_: pytest.fail("it builds"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        others = () if option == "--port" else ("--port", 0)
        said = _run(capsys, "serve", *model, option, port, *others)
    assert f"cannot listen on 127.0.0.1:{port}: the port is in use; choose another with {option}" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [(("--tokens", "none"), "none: cannot read"), (("--tls-cert", "none", "--tls-key", "none"), "--tls-cert none: cannot read")],
)
def test_a_file_that_cannot_be_read_is_found_before_a_model_is_built(
    options: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashdiff.cli.bundles._built", lambda *_: pytest.fail("it builds"))
    for model in (("--base", "no-such-base"), ("avatars",)):
        assert why in _run(capsys, "serve", *model, "--port", 0, *options)


@pytest.mark.slow
def test_the_served_pixels_are_those_of_generate_and_sigterm_ends_the_server_well(student_bundle: Path, tmp_path: Path) -> None:
    import base64
    import io
    import signal

    import httpx2
    import numpy as np
    from PIL import Image
    from ports import reserved_ports

    from flashdiff.server.client import Client

    assert cli.main(["generate", str(student_bundle), "a dog", "-o", str(tmp_path / "dog.png"), "--seed", "5"]) == 0
    with reserved_ports(2) as (port, http_port):
        ports = ["--port", str(port), "--http-port", str(http_port)]
        process = subprocess.Popen([sys.executable, "-m", "flashdiff", "serve", str(student_bundle), *ports])
        try:
            with Client(f"127.0.0.1:{port}") as client:
                client.wait_until_ready(600)
                served = client.generate("a dog", seed=5, image_format="raw").images[0]
            url = f"http://127.0.0.1:{http_port}/v1/images/generations"
            answer = httpx2.post(url, json={"prompt": "a dog", "seed": 5}, timeout=60).json()
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
    np.testing.assert_array_equal(
        np.frombuffer(served, np.uint8).reshape(32, 32, 3), np.asarray(Image.open(tmp_path / "dog.png"))
    )
    over_http = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    np.testing.assert_array_equal(np.asarray(over_http), np.asarray(Image.open(tmp_path / "dog.png")))


def test_the_choices_of_an_option_are_those_of_its_record() -> None:
    assert best_backend() in BACKENDS
    assert get_args(PrecisionChoice) == defaults.PRECISIONS


def test_version_is_the_changelogs_newest_release(capsys: pytest.CaptureFixture[str]) -> None:

    with pytest.raises(SystemExit):
        cli.main(["--version"])
    changelog = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    _, newest, _ = re.split(r"^## \[(\d+\.\d+\.\d+)\]", changelog, maxsplit=1, flags=re.MULTILINE)
    assert capsys.readouterr().out.split()[1] == newest


def test_no_library_reports_its_use() -> None:
    program = (
        "from flashdiff.cli import main; main(['inspect', 'none']); import os, openvino.tools.ovc.telemetry_utils as used;"
        "print(used.tm.__name__, os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["openvino.tools.ovc.telemetry_stub", "1"]


def test_the_command_line_enlarges(student_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("RGB", (70, 45)).save(small)
    given = ["generate", str(student_bundle), "x", "-o", str(large), "--image", str(small), "--upscale"]
    assert cli.main([*given, "1.5"]) == 0
    assert capsys.readouterr().out == f"{large}  105x68  steps 4  seed 0\n"
    with Image.open(large) as enlarged:
        assert enlarged.size == (105, 68)
    assert cli.main([*given, "0.9"]) == 2
    assert "upscale: 0.9 is not allowed; it must be between 1 and 8" in capsys.readouterr().err
