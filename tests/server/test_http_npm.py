"""The stock npm `openai` client against the server; skipped where npm is missing or cannot reach its registry."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from served import FakeComponents, serving

from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.images import encode_image

_PACKAGE = "openai@6.49.0"
_SCRIPT = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script in a folder that has the client."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("npm and node are not installed: Debian has them as nodejs and npm")
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--prefix", str(tmp_path), _PACKAGE]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"npm cannot install {_PACKAGE}: {installed.stderr.strip().splitlines()[:1]}")
    return shutil.copy(_SCRIPT, tmp_path)


def test_the_npm_client_generates_streams_edits_and_reads_errors(script: Path) -> None:
    image = encode_image(np.full((64, 64, 3), 40, dtype=np.uint8), "png")
    with serving(FakeComponents(), Listen(port=0, http_port=0)) as running, Client(running.address) as client:
        command = ["node", str(script), f"{running.url}/v1", base64.b64encode(image).decode()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        expected = client.generate("a red car", seed=5, steps=4, timeout_s=10).images[0]
        edited = client.generate("a red car", seed=5, steps=4, image=image, timeout_s=10).images[0]
    got = json.loads(result.stdout)
    assert base64.b64decode(got["plain"]) == base64.b64decode(got["streamed"]) == expected
    assert base64.b64decode(got["edit"]) == edited
    assert got["events"] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert got["models"] == ["fake"]
    assert got["refused"] == [400, "steps", "invalid_request_error"]
