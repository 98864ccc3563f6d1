"""`--backend torch --compile`: packages of machine code, made at build time, that make torch's images."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.export import ExportedProgram

from flashdiff.components import Size
from flashdiff.engines.backends import find_backend
from flashdiff.engines.backends.torch import WEIGHTS
from flashdiff.engines.backends.torch_compiler import _add_weights, _deciding, at_bucket
from flashdiff.engines.backends.torch_runner import _packages
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import BuildInputs, Machine, Manifest
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.export import trace
from flashdiff.engines.parts import parts_of, random_inputs
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.shapes import dimensions_of
from flashdiff.errors import BackendError, BundleError
from flashdiff.generate import generate
from flashdiff.lora import load_fused
from flashdiff.tasks import check_order

SIZE = Size(32, 32)
CPU = Machine(system="Linux x86_64", processor="One", device="cpu", features=("avx2", "avx512f"))
GPU = Machine(system="Linux x86_64", processor="H200", device="cuda", features=("sm_90",))


def _options(base: Path, lora: Path, out: Path) -> BuildOptions:
    loras = ((str(lora), 1.0),)
    return BuildOptions(
        base=str(base), loras=loras, out=out, backend="torch", compile=True, batch_sizes=(1,), compare_stock=False
    )


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, flash_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildInputs:
    return plan_build(_options(tiny_base, flash_lora, tmp_path_factory.mktemp("plan") / "out")).inputs


def test_a_part_at_one_shape_is_the_part(tiny_base: Path, flash_lora: Path) -> None:
    family, model = load_fused(str(tiny_base), [(flash_lora, 1.0)], None)
    part = next(part for part in parts_of(family, model) if part.name == "denoiser")
    program, weights = trace(model, part, SIZE, "fp32"), dict[str, torch.Tensor]()
    for batch in (1, 3):
        fixed = at_bucket(program, part, dimensions_of(model.spec, SIZE, batch), "cpu")
        shapes = [getattr(node.meta.get("val"), "shape", ()) for node in fixed.graph.nodes]
        assert all(isinstance(side, int) for shape in shapes for side in shape)
        _add_weights(weights, fixed)
        given = random_inputs(model, part, batch, SIZE, torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(fixed.module()(*given), part.module(*given), rtol=1e-5, atol=1e-5)
    assert any(values.isnan().any() for values in weights.values())  # at times that a student does not know


def test_packages_are_those_of_a_graph_whatever_its_weights(tiny_base: Path, inputs: BuildInputs) -> None:
    family, model = load_fused(str(tiny_base), [], None)
    part = next(part for part in parts_of(family, model) if part.name == "decoder")

    def deciding(program: ExportedProgram, batch: int) -> dict[str, Any]:
        return _deciding(at_bucket(program, part, dimensions_of(model.spec, SIZE, batch), "cpu"), inputs)

    program = trace(model, part, SIZE, "fp32")
    before, larger = deciding(program, 1), deciding(program, 2)
    for parameter in part.module.parameters():
        parameter.data.mul_(1.5)
    assert deciding(trace(model, part, SIZE, "fp32"), 1) == before
    assert larger != before


def test_only_torch_has_it(tiny_base: Path, flash_lora: Path, tmp_path: Path) -> None:
    options = _options(tiny_base, flash_lora, tmp_path / "out").model_copy(update={"backend": "openvino"})
    with pytest.raises(BackendError, match=r"^--compile: it is for --backend torch;"):
        plan_build(options)


def test_a_machine_without_a_compiler_is_refused_before_any_work(tiny_base: Path, flash_lora: Path, tmp_path: Path) -> None:
    from torch._inductor import config, cpp_builder

    refused = pytest.raises(BackendError, match=r"^--compile needs a C\+\+ compiler, and '.*no-compiler' is not one")
    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch("cpp.cxx", (None, str(tmp_path / "no-compiler"))), refused:
        plan_build(_options(tiny_base, flash_lora, tmp_path / "out"))
    cpp_builder.cpp_compiler_search.cache_clear()


def test_the_key_stays_out_of_what_was_built_before(inputs: BuildInputs) -> None:
    plain = inputs.model_copy(update={"compiled": False})
    assert "compiled" not in plain.canonical_json()
    assert inputs.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("made", "torch_version", "here", "refusal"),
    [
        (CPU, "1.0", CPU, "compiled by torch 1.0, here is"),
        (CPU, None, CPU.model_copy(update={"features": ("avx2",)}), r"a CPU with avx512f \(One\), this one lacks it"),
        (CPU, None, CPU.model_copy(update={"system": "Linux aarch64"}), "compiled for Linux x86_64, this is Linux aarch64"),
        (GPU, None, GPU.model_copy(update={"features": ("sm_80",)}), "a GPU of sm_90, this one is sm_80"),
    ],
)
def test_what_was_compiled_for_another_machine_is_refused(
    inputs: BuildInputs, made: Machine, torch_version: str | None, here: Machine, refusal: str
) -> None:
    versions = {"torch": torch_version or importlib.metadata.version("torch")}
    fields = {name: getattr(inputs, name) for name in BuildInputs.model_fields} | {"machine": made, "library_versions": versions}
    manifest = Manifest.model_construct(**fields)
    check = find_backend("torch").check_bundle
    with pytest.raises(BundleError, match=f"{refusal}.*build it on this one"):
        check(manifest, here)
    check(manifest.model_copy(update={"compiled": False}), here)


def test_a_better_processor_runs_it(inputs: BuildInputs) -> None:
    fields = {name: getattr(inputs, name) for name in BuildInputs.model_fields} | {"machine": CPU}
    better = CPU.model_copy(update={"features": (*CPU.features, "amx_bf16")})
    find_backend("torch").check_bundle(Manifest.model_construct(**fields), better)


def test_a_bundle_for_cpus_is_checked_against_the_cpu_of_a_machine_with_a_gpu(
    inputs: BuildInputs, on_gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu("sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fields = {name: getattr(inputs, name) for name in BuildInputs.model_fields}
    find_backend("torch").check_machine(Manifest.model_construct(**fields))


def test_buckets_share_one_copy_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []

    class Package:
        def get_constant_fqns(self) -> list[str]:
            return ["used"]

        def load_constants(self, tensors: dict[str, torch.Tensor], *, check_full_update: bool, user_managed: bool) -> None:
            assert check_full_update
            assert user_managed  # otherwise it would copy them
            given.append(tensors["used"])

    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: Package())
    save_file({"used": np.ones(3, dtype=np.float32), "unused": np.ones(3, dtype=np.float32)}, tmp_path / WEIGHTS)
    module_of = _packages(torch.device("cpu"))
    modules = [module_of("denoiser", tmp_path / f"batch{batch}.pt2") for batch in (1, 2)]
    assert len({tensor.data_ptr() for tensor in given}) == 1
    assert len(modules) == len(given)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What inductor compiles from now on."""
    from torch._inductor import codecache, compile_fx

    found: list[str] = []

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found.append(name)
            return original(*args, **options)

        return call

    monkeypatch.setattr(compile_fx, "compile_fx_inner", counting("graph", compile_fx.compile_fx_inner))
    monkeypatch.setattr(codecache.AotCodeCompiler, "compile", counting("code", codecache.AotCodeCompiler.compile))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # importing its compiler warns of its own code
def test_a_compiled_bundle_makes_torchs_images_and_compiles_nothing_more(
    tiny_base: Path, flash_lora: Path, tmp_path: Path, compilations: list[str]
) -> None:
    out = tmp_path / "compiled"
    manifest = build_engine(_options(tiny_base, flash_lora, out), print)
    assert compilations.count("code") == len(manifest.parts)  # one bucket each
    for name, part in manifest.parts.items():
        (file,) = part.files
        assert f"{name}/{WEIGHTS}" in manifest.files
        package, weights = (out / file.file).read_bytes(), load_file(out / name / WEIGHTS)
        varied = [values for values in weights.values() if len(np.unique(values)) > 99]
        assert varied
        assert not any(values.tobytes()[:64] in package for values in varied)
        loaded = torch._inductor.aoti_load_package(str(out / file.file), run_single_threaded=True)
        assert set(loaded.get_constant_fqns()) == set(weights)  # small ones too, such as the last bias
    compilations.clear()
    engine = open_bundle(out)
    order = check_order(engine.spec, prompt="a dog", seed=3)
    _, model = load_fused(str(tiny_base), [(flash_lora, 1.0)], None)
    (image,), (expected,) = generate(engine, [order])[0], generate(model, [order])[0]
    assert np.abs(image.astype(int) - expected).max() <= 1
    build_engine(_options(tiny_base, flash_lora, tmp_path / "again"), print)
    assert compilations == []
