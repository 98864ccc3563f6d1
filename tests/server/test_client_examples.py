"""The clients in Go, Java and TypeScript of examples/clients: generated from the `.proto`, compiled, and run against a server.

Go's and Java's gRPC come from Debian, TypeScript's from npm; where they are missing the test says what is.
"""

import os
import shutil
import subprocess
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from served import serving

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import OverloadedError
from flashdiff.server.client import Client
from flashdiff.server.requests import Requests

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLIENTS, PROTO = ROOT / "examples" / "clients", ROOT / "proto"
_GO_SOURCES = Path("/usr/share/gocode")
_GO_LIBRARIES = (
    "google.golang.org/grpc", "google.golang.org/protobuf", "google.golang.org/genproto", "golang.org/x/net", "golang.org/x/sys",
)  # fmt: skip
_JARS = Path("/usr/share/java")
_JAVA_LIBRARIES = ("grpc-*", "netty-*", "protobuf", "guava", "perfmark-*", "geronimo-annotation-1.3-spec")
_NPM_PACKAGES = ("@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1", "typescript@5.9.3", "@types/node@24.19.4")
_NPM_S = 300


def _need(*programs: str, package: str) -> None:
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: Debian has {package}")


def _do(command: list[str | Path], **options: Any) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def _go(folder: Path) -> list[str]:
    """The command of the compiled client."""
    _need(
        "go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc",
        package="golang-go, protobuf-compiler, protoc-gen-go and protoc-gen-go-grpc",
    )  # fmt: skip
    if missing := [name for name in _GO_LIBRARIES if not (_GO_SOURCES / "src" / name).is_dir()]:
        packages = "golang-google-grpc-dev, -protobuf-dev and -genproto-dev, golang-golang-x-net-dev and -sys-dev"
        pytest.skip(f"{', '.join(missing)} not installed: Debian has {packages}")
    sources = folder / "src"
    shutil.copytree(CLIENTS / "go", sources / "flashdiff" / "generate")
    shutil.copy(Path(__file__).with_name("debian_codec.go"), sources / "flashdiff" / "generate")
    _do(["protoc", "-I", PROTO, f"--go_out={sources}", f"--go-grpc_out={sources}", "v1/image.proto"])
    environment = {**os.environ, "GOPATH": f"{folder}:{_GO_SOURCES}", "GO111MODULE": "off", "GOFLAGS": ""}
    _do(["go", "build", "-o", folder / "generate", "flashdiff/generate"], env=environment)
    return [str(folder / "generate")]


def _java(folder: Path) -> list[str]:
    _need(
        "javac", "java", "protoc", "grpc_java_plugin",
        package="default-jdk-headless, protobuf-compiler and protobuf-compiler-grpc-java-plugin",
    )  # fmt: skip
    if missing := [name for name in _JAVA_LIBRARIES if not list(_JARS.glob(f"{name}.jar"))]:
        packages = "libgrpc-java, libnetty-java, libprotobuf-java and libperfmark-java"
        pytest.skip(f"{', '.join(missing)} not installed: Debian has {packages}")
    plugin = f"--plugin=protoc-gen-grpc-java={shutil.which('grpc_java_plugin')}"
    _do(["protoc", plugin, "-I", PROTO, f"--java_out={folder}", f"--grpc-java_out={folder}", "v1/image.proto"])
    jars = ":".join(str(jar) for name in _JAVA_LIBRARIES for jar in sorted(_JARS.glob(f"{name}.jar")))
    generated = sorted(folder.rglob("*.java"))
    _do(["javac", "-Xlint:-options", "-cp", jars, "-d", folder / "classes", CLIENTS / "java" / "Generate.java", *generated])
    return ["java", "-cp", f"{folder / 'classes'}:{jars}", "Generate"]


def _typescript(folder: Path) -> list[str]:
    _need("npm", "node", package="nodejs and npm")
    shutil.copytree(CLIENTS / "typescript", folder, dirs_exist_ok=True)
    install = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--prefix", str(folder), *_NPM_PACKAGES]
    try:
        installed = subprocess.run(install, capture_output=True, text=True, timeout=_NPM_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm has not installed {', '.join(_NPM_PACKAGES)} within {_NPM_S} s")
    if installed.returncode:
        pytest.skip(f"npm cannot install {', '.join(_NPM_PACKAGES)}: {installed.stderr.strip().splitlines()[:1]}")
    programs, options = folder / "node_modules" / ".bin", ["--grpcLib=@grpc/grpc-js", "--longs=String", "--outDir=generated"]
    _do([programs / "proto-loader-gen-types", "v1/image.proto", *options, f"--includeDirs={PROTO}"], cwd=folder)
    _do([programs / "tsc"], cwd=folder)
    return ["node", str(folder / "generate.js")]


_CLIENTS: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "go": (_go, ()),
    "java": (_java, ()),
    "typescript": (_typescript, (str(PROTO),)),
}


@pytest.mark.parametrize("language", _CLIENTS)
def test_a_client_saves_an_image_and_waits_as_long_as_a_refusal_says(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, more = _CLIENTS[language]
    command = build(tmp_path)
    serve, refusals = Requests.serve, [OverloadedError("no room", retry_after_s=0.05)]

    async def refuse_first(self: Requests, *arguments: Any) -> AsyncGenerator[Any, None]:
        if refusals:
            raise refusals.pop()
        async for update in serve(self, *arguments):
            yield update

    def run(address: str, prompt: str) -> "subprocess.CompletedProcess[str]":
        words = [*command, address, prompt, str(tmp_path / "image.png"), *more]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    with serving(FakeComponents()) as running, Client(running.address) as client:
        expected = client.generate("a red car", seed=7, timeout_s=60).images[0]
        monkeypatch.setattr(Requests, "serve", refuse_first)
        done = run(running.address, "a red car")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "image.png").read_bytes() == expected
        first, last = done.stdout.splitlines()
        assert first == "refused, again in 50 ms"
        assert last.startswith("seed 7, ")
        assert last.endswith(" ms in the server")
        wrong = run(running.address, "x" * 70_000)
        assert wrong.returncode == 1
        assert "is not allowed" in wrong.stderr
