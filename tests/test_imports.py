"""Imports point one way: cli -> {distill, engines, server} -> core; heavy packages load only where they are used."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashdiff.engines.backends import BACKENDS

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "distill": {"distill"},
    "engines": {"engines"},
    "server": {"server", "engines", "proto"},
    "proto": {"proto"},
    "core": set(),
    "cli": {"cli", "distill", "engines", "server"},
}
LINKED = {"distill", "engines", "server", "proto"}
"""Folders at the top, which symbolic links lead to from flashdiff/."""
LAYERS = {*LINKED, "cli"}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_layer_imports_one_above_it() -> None:
    wrong = []
    folders = {**{layer: ROOT / layer for layer in LINKED}, "cli": ROOT / "flashdiff" / "cli", "core": ROOT / "flashdiff"}
    for layer, folder in folders.items():
        forbidden = LAYERS - ALLOWED[layer]
        for path in folder.rglob("*.py"):
            place = path.relative_to(folder).parts[0]
            if layer == "core" and place in (*LAYERS, "__main__.py"):
                continue
            for name in _imports(path):
                parts = name.split(".")
                if parts[0] == "benchmarks" or (parts[0] == "flashdiff" and len(parts) > 1 and parts[1] in forbidden):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_only_translators_know_protobuf_messages() -> None:
    knowing = {path.name for path in (ROOT / "server").rglob("*.py") if "flashdiff.proto.v1" in path.read_text()}
    translators = {
        "convert.py",
        "replies.py",
        "wire.py",
        "triton.py",
        "triton_grpc.py",
        "triton_convert.py",
        "kserve.py",
        "kserve_convert.py",
    }
    assert knowing <= translators | {
        "app.py",
        "service.py",
        "client.py",
        "ray_proxy.py",
        "ray_replica.py",
    }  # these name services, not fields


def test_only_backends_know_engine_libraries() -> None:
    libraries = {"openvino", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}
    for path in _outside_backends():
        assert not libraries & {name.split(".")[0] for name in _imports(path)}, path


def test_only_backends_test_for_a_backends_name() -> None:
    wrong = []
    for path in (*_outside_backends(), *(ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            # Benchmarks may list what they measure.
            tested = [*_tested(node), *(_listed(node) if "benchmarks" not in path.parts else ())]
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}" for name in tested if name in BACKENDS]
    assert not wrong


def _outside_backends() -> list[Path]:
    folders = [ROOT / "flashdiff", *(ROOT / layer for layer in LAYERS)]  # links are not followed
    return [path for folder in folders for path in folder.rglob("*.py") if "backends" not in path.parts]


def _tested(node: ast.AST) -> Iterator[object]:
    """Constants that a value is compared with or looked up by: in comparisons, `match`, `startswith`, and as keys of tables."""
    match node:
        case ast.Compare(left=left, comparators=others):
            yield from _constants([left, *others])
            yield from (name for other in others for name in _listed(other))
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith" | "removeprefix" | "removesuffix"), args=args):
            yield from _constants(args)
        case ast.Dict(keys=keys):
            yield from _constants(keys)
        case ast.MatchValue(value=value):
            yield from _constants([value])


def _listed(node: ast.AST) -> Iterator[object]:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        yield from _constants(node.elts)


def _constants(nodes: Sequence[ast.AST | None]) -> Iterator[object]:
    return (node.value for node in nodes if isinstance(node, ast.Constant))


def test_a_client_imports_no_server_code_and_no_engine() -> None:
    code = """
import sys, flashdiff.server.client
print(sorted(name for name in sys.modules if name.startswith(("flashdiff.server.", "flashdiff.engines", "PIL", "torch"))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = [f"flashdiff.server.{name}" for name in ("client", "names", "replies", "wire")]
    assert result.stdout.splitlines()[-1] == str(ours)


def test_only_tasks_know_a_tasks_name() -> None:
    names = {"text_to_image", "image_to_image"}
    for layer in (*LAYERS, "flashdiff"):
        for path in (ROOT / layer).rglob("*.py"):
            if "flashdiff/tasks" not in path.as_posix():
                found = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
                assert not names & {value for value in found if isinstance(value, str)} or path.name == "components.py", path


def test_help_needs_no_heavy_import() -> None:
    code = """
import sys, flashdiff.cli
try:
    flashdiff.cli.main(["--help"])
except SystemExit:
    print({"torch", "grpc", "numpy", "pydantic"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


def test_without_http_nothing_of_it_is_imported() -> None:
    code = """
import asyncio, sys
sys.path.insert(0, "tests")
from served import FakeComponents, serving
with serving(FakeComponents()):
    wanted = ("starlette", "uvicorn", "python_multipart", "h11", "flashdiff.server.http")
    print(sorted(name for name in sys.modules if name.startswith(wanted)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "[]"
