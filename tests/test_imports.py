"""Imports point one way: cli -> {distill, engines, server} -> core; heavy packages load only where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

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


def test_only_translators_know_protobuf_messages_and_only_runtime_knows_engine_libraries() -> None:
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
    assert knowing <= translators | {"app.py", "service.py", "client.py"}  # these name services, not fields
    for path in (ROOT / "engines").glob("*.py"):
        assert not {"openvino", "onnxruntime"} & {name.split(".")[0] for name in _imports(path)}, path


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
