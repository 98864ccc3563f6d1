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
    "cli": {"distill", "engines", "server"},
}
LAYERS = {"distill", "engines", "server", "proto"}


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
    for layer in (*LAYERS, "core"):
        folder = ROOT / ("flashdiff" if layer == "core" else layer)
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder)
            if layer == "core" and (relative.parts[0] in LAYERS or relative.name == "__main__.py"):
                continue
            allowed = ALLOWED["cli" if layer == "core" and relative.name == "cli.py" else layer]
            for name in _imports(path):
                parts = name.split(".")
                if parts[0] == "benchmarks" or (parts[0] == "flashdiff" and len(parts) > 1 and parts[1] in LAYERS - allowed):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_only_convert_knows_protobuf_messages() -> None:
    knowing = {path.name for path in (ROOT / "server").rglob("*.py") if "flashdiff.proto.v1" in path.read_text()}
    # The last three name services, not fields.
    assert knowing <= {"convert.py", "triton.py", "triton_convert.py", "app.py", "service.py", "client.py"}


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
