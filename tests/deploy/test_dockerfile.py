"""The Dockerfile: its stages and settings, and its steps run in an environment of their own, without a container engine."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashdiff import defaults
from flashdiff.cli import serve

ROOT = Path(__file__).parents[2]


def _stages() -> list[list[str]]:
    """The instructions of each stage, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line]
    stages: list[list[str]] = []
    for line in lines:
        if line.startswith("FROM "):
            stages.append([])
        if stages:
            stages[-1].append(line)
    return stages


def _all(stage: list[str], instruction: str) -> list[str]:
    return [line.partition(" ")[2] for line in stage if line.startswith(instruction + " ")]


def test_what_runs_has_no_sources_and_no_root() -> None:
    base, build, final = _stages()
    assert _all(base, "FROM") == ["${BASE} AS base"]
    assert _all(build, "COPY") == [". ."]
    assert _all(final, "COPY") == ["--from=build /opt/flashdiff /opt/flashdiff"]
    (user,) = _all(final, "USER")
    uid, _, _ = user.partition(":")
    assert int(uid) > 0
    assert f"--uid {uid} " in "".join(_all(final, "RUN"))
    manifest = (ROOT / "deploy" / "kubernetes" / "base" / "deployment.yaml").read_text()
    assert f"runAsUser: {uid}\n" in manifest


def test_its_variables_are_options_and_its_port_is_the_default() -> None:
    final = _stages()[-1]
    environment = dict(pair.split("=", 1) for line in _all(final, "ENV") for pair in shlex.split(line))
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    options = parser.parse_args([])
    options.variables.fill(options, environment)
    assert (options.host, options.no_auth, [str(bundle) for bundle in options.bundles]) == ("0.0.0.0", True, ["/bundle"])
    assert str(defaults.PORT) in _all(final, "EXPOSE")[0].split()


@pytest.mark.slow
def test_its_steps_make_a_server_that_starts_without_sources(tmp_path: Path) -> None:
    """Those of the build stage, in a copy of the sources, with another place for the environment."""
    place, source = tmp_path / "flashdiff", tmp_path / "src"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    build = _stages()[1]
    path = f"{place}/bin:{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower().endswith("_proxy")}
    environment = {**kept, "PATH": path, "HOME": str(tmp_path), "EXTRAS": "http,cpu", "TRACES": ""}
    for step in _all(build, "RUN"):
        command = step.replace("/opt/flashdiff", str(place))
        done = subprocess.run(["sh", "-c", command], cwd=source, env=environment, capture_output=True, text=True)
        if done.returncode and re.search(r"No matching distribution|ConnectionError|Temporary failure", done.stderr):
            pytest.skip(f"packages cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    program = [str(place / "bin" / "flashdiff"), "serve"]
    running = {"PATH": path, "FLASHDIFF_BUNDLES": str(tmp_path / "none"), "HOME": "/"}
    refused = subprocess.run(program, cwd="/", env=running, capture_output=True, text=True)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert "no such bundle" in refused.stderr
    assert not (place / "bin" / "pip").exists()
