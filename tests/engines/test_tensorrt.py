"""TensorRT-RTX plans, really built, on a machine without a GPU. Running them is under tests/gpu."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from gpus import build_rtx_plan, denoiser_of, needs_rtx
from onnx import TensorProto, helper, numpy_helper
from tiny import MODELS, STUDENTS

from flashdiff.components import Size
from flashdiff.engines.backends import tensorrt_builder
from flashdiff.engines.backends.base import Export
from flashdiff.engines.backends.tensorrt import compile_graph
from flashdiff.engines.backends.tensorrt_builder import check_opens, library
from flashdiff.engines.bundle import BackendName, read_manifest
from flashdiff.engines.runtime.machine import nvidia_gpu
from flashdiff.errors import BackendError

pytestmark = pytest.mark.slow


@needs_rtx
@pytest.mark.parametrize("family", [*MODELS, *STUDENTS])
def test_every_family_becomes_a_plan(family: str, family_bundle: Callable[[str, BackendName], Path], tmp_path: Path) -> None:
    bundle = family_bundle(family, "onnxruntime")
    graph, shapes = denoiser_of(bundle)
    said: list[str] = []
    build_rtx_plan(graph, shapes, tmp_path / "unet.plan", said)
    assert (tmp_path / "unet.plan").stat().st_size > 100_000
    assert said  # its phases


@needs_rtx
def test_a_part_becomes_one_plan_a_bucket_and_a_second_build_takes_them_from_the_cache(
    family_bundle: Callable[[str, BackendName], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = family_bundle("sd15", "onnxruntime")
    manifest = read_manifest(bundle)
    inputs = manifest.model_copy(update={"backend": "tensorrt-rtx"})
    spec = manifest.parts["decoder"]
    built: list[Path] = []
    build = tensorrt_builder.build_plan

    def counted(*arguments: object, **settings: object) -> None:
        built.append(Path(str(arguments[3])))
        build(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(tensorrt_builder, "build_plan", counted)
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        for file in (bundle / "decoder").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        files = compile_graph(spec, Export(part="decoder", size=None, key="graph", is_cached=True), inputs, folder, print)
        assert [(file.file, file.size, file.batch) for file in files] == [
            (f"batch{batch}-{size}.plan", size, batch) for size in (Size(32, 32), Size(48, 32)) for batch in (2, 3)
        ]
        assert sorted(path.name for path in folder.iterdir()) == sorted(file.file for file in files)  # the graph is gone
    assert len(built) == 4


def _graph(path: Path, *, mixed: bool) -> Path:
    """y = x W, with W in another type than x where `mixed`."""
    kind = np.float16 if mixed else np.float32
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.eye(4, dtype=kind), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@needs_rtx
def test_types_that_do_not_match_are_refused_with_the_builders_own_words(tmp_path: Path) -> None:
    build_rtx_plan(_graph(tmp_path / "right.onnx", mixed=False), {"x": (2, 4)}, tmp_path / "right.plan")
    with pytest.raises(BackendError, match=r"tensorrt-rtx cannot (read|build) .*: .*[Tt]ype"):
        build_rtx_plan(_graph(tmp_path / "mixed.onnx", mixed=True), {"x": (2, 4)}, tmp_path / "mixed.plan")
    assert not (tmp_path / "mixed.plan").exists()


@needs_rtx
def test_a_graph_with_other_inputs_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the graph takes x, not latents"):
        build_rtx_plan(_graph(tmp_path / "right.onnx", mixed=False), {"latents": (2, 4)}, tmp_path / "right.plan")
    (tmp_path / "empty.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match="tensorrt-rtx cannot read"):
        build_rtx_plan(tmp_path / "empty.onnx", {"x": (2, 4)}, tmp_path / "empty.plan")


@needs_rtx
@pytest.mark.skipif(nvidia_gpu() is not None, reason="this machine has a GPU: tests/gpu covers it")
def test_a_library_that_opens_no_plan_here_is_refused_in_its_own_words() -> None:
    with pytest.raises(BackendError, match=r"--backend tensorrt-rtx does not run here: .*Error Code"):
        check_opens("tensorrt-rtx")


def test_a_missing_library_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"needs 'tensorrt', which is not here: pip install '\.\[tensorrt\]'"):
        library("tensorrt")
