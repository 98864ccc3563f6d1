"""The examples, as their users run them."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from served import Running

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False)


def test_our_client(running: Running, tmp_path: Path) -> None:
    run = _run(EXAMPLES / "client.py", "a red car", "--server", running.address, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    made = {"image.png", *(f"preview-{step}.png" for step in (1, 2, 3, 4)), *(f"{steps}-steps.png" for steps in (1, 2, 3, 4))}
    assert {path.name for path in tmp_path.iterdir()} == made
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)
    assert "step 4 of 4" in run.stdout
    assert "1 steps: batches of [" in run.stdout


def test_stock_tritonclient(running: Running, tmp_path: Path) -> None:
    run = _run(EXAMPLES / "triton_client.py", "fake", "a red car", "--server", running.address, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert [line.split(" (")[0] for line in run.stdout.splitlines()] == [f"step {step} of 4" for step in (1, 2, 3, 4)]
    for name in ("image.jpg", "streamed.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)


@pytest.mark.parametrize("arguments", [("client.py", "x"), ("triton_client.py", "fake", "x")], ids=lambda names: names[0])
def test_no_server_is_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = _run(EXAMPLES / arguments[0], *arguments[1:], "--server", "127.0.0.1:9", "--out", tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith(f"{arguments[0]}: ")
    assert len(run.stderr.splitlines()) == 1
