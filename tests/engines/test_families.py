"""Every family through export, both CPU engines and the gate, on tiny random models; and a test for each known trap."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny import FAMILIES, MODELS, STUDENTS
from torch import Tensor, nn

from flashdiff.components import Size
from flashdiff.engines.backends import find_backend
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import BackendName, TensorSpec
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.export import export_onnx
from flashdiff.engines.parts import AtPrecision, Part, parts_of, random_inputs
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import BundleError
from flashdiff.families import load_base
from flashdiff.generate import generate
from flashdiff.tasks import check_order

pytestmark = pytest.mark.slow

Build = Callable[[str, BackendName], Path]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("family", [*MODELS, *STUDENTS])
def test_every_family_is_built_and_passes_the_gate(family: str, backend: BackendName, family_bundle: Build) -> None:
    engine = open_bundle(family_bundle(family, backend))
    assert engine.manifest.rows_are_exact
    assert max(engine.manifest.max_error.values()) <= 1e-4
    orders = [check_order(engine.spec, prompt="A dog", seed=3, steps=2, size=size) for size in engine.spec.sizes]
    for (image,), size in zip(generate(engine, orders), engine.spec.sizes, strict=True):
        assert image.shape == (size.height, size.width, 3)
        assert image.std() > 1


def test_positions_that_are_baked_in_get_a_graph_a_size(family_bundle: Build) -> None:
    files = open_bundle(family_bundle("pixart", "onnxruntime")).manifest.parts["denoiser"].files
    assert [(file.file, file.size) for file in files] == [
        ("denoiser/32x32/model.onnx", Size(32, 32)),
        ("denoiser/48x32/model.onnx", Size(48, 32)),
    ]


def test_graphs_name_their_dimensions(family_bundle: Build) -> None:
    graph = onnx.load(family_bundle("sdxl", "onnxruntime") / "denoiser" / "model.onnx", load_external_data=False).graph
    latents = next(value for value in graph.input if value.name == "latents")
    assert [d.dim_param or d.dim_value for d in latents.type.tensor_type.shape.dim] == ["batch", 4, "height", "width"]


def test_a_part_exported_twice_by_one_process_gives_the_same_files(tmp_path: Path) -> None:
    family, model = load_base(str(FAMILIES["sdxl"](tmp_path / "sdxl")))
    part = next(part for part in parts_of(family, model) if part.name == "denoiser")
    form = find_backend("openvino").graph
    assert form
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        form.export(model, part, tmp_path / name, size=Size(32, 32))
    for file in ("model.xml", "model.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_openvino_gets_attention_and_normalisation_whole(family_bundle: Build) -> None:
    kinds = Counter(re.findall(r' type="(\w+)"', (family_bundle("sd15", "openvino") / "denoiser" / "model.xml").read_text()))
    assert kinds["ScaledDotProductAttention"] > 0
    assert kinds["GroupNormalization"] > 0
    assert not kinds["Softmax"]  # attention in pieces


def test_sdxl_in_half_precision_keeps_the_pooled_text_in_float32(tmp_path: Path) -> None:
    import onnxruntime

    family, model = load_base(str(FAMILIES["sdxl"](tmp_path / "sdxl")))
    part = next(part for part in parts_of(family, model) if part.name == "denoiser")
    assert part.float32_inputs == ("text_embeds",)
    for name, given in (("right", part), ("wrong", replace(part, float32_inputs=()))):
        (tmp_path / name).mkdir()
        export_onnx(model, given, tmp_path / name, size=Size(32, 32), precision="fp16")
    onnxruntime.InferenceSession(str(tmp_path / "right" / "model.onnx"), providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="float16"):  # it would join float16 to float32
        onnxruntime.InferenceSession(str(tmp_path / "wrong" / "model.onnx"), providers=["CPUExecutionProvider"])


class _Squeezing(nn.Module):
    """What PixArt's blocks do: squeeze a dimension that is 1 for one mask and not for another."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.scale * latents.squeeze(1)


def test_a_squeeze_that_does_nothing_in_torch_does_nothing_in_onnx(tiny_base: Path, tmp_path: Path) -> None:
    import onnxruntime

    _, model = load_base(str(tiny_base))
    shape = ("batch", 4, "height", "width")
    latents = TensorSpec(name="latents", dtype="float32", shape=shape)
    part = Part("decoder", _Squeezing(), (latents,), (TensorSpec(name="images", dtype="float32", shape=shape),))
    export_onnx(model, part, tmp_path, size=Size(32, 32))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    values = np.random.default_rng(0).standard_normal((3, 4, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"latents": values})[0], values)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_tables_of_noise_levels_are_not_rounded_with_the_weights(family: str, tmp_path: Path) -> None:
    family_record, model = load_base(str(FAMILIES[family](tmp_path / family)))
    part = next(part for part in parts_of(family_record, model) if part.name == "denoiser")
    tables = {name: table.clone() for name, table in part.module.named_buffers() if table.is_floating_point()}
    module = AtPrecision(part, "bf16")
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    assert tables
    for name, table in part.module.named_buffers():
        if name in tables:
            torch.testing.assert_close(table, tables[name], atol=0, rtol=0)


def test_layers_of_t5_whose_outputs_float16_cannot_hold_stay_float32(tmp_path: Path) -> None:
    """As transformers loads T5 in float16; published ones reach beyond its 65,504."""
    family, model = load_base(str(FAMILIES["pixart"](tmp_path / "pixart")))
    part = next(part for part in parts_of(family, model) if part.name == "text_encoder")
    large = [weight for name, weight in part.module.named_parameters() if ".wo." in name]
    with torch.no_grad():
        for weight in large:
            weight.mul_(1e7)
    inputs = random_inputs(model, part, 2, model.spec.sizes[0], torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = part.module(*inputs)
        made = AtPrecision(part, "fp16")(*inputs)
    assert large
    assert {weight.dtype for weight in part.module.parameters()} == {torch.float16, torch.float32}
    torch.testing.assert_close(made, wanted, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(("says", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_an_autoencoder_that_its_pipeline_upcasts_stays_float32(says: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """SDXL's own says so; the repaired one, `sdxl-vae-fp16-fix`, does not."""
    base = FAMILIES["sdxl"](tmp_path / "sdxl")
    config = base / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": says}))
    family, model = load_base(str(base))
    parts = {part.name: AtPrecision(part, "fp16") for part in parts_of(family, model)}
    dtypes = {name: {weight.dtype for weight in module.parameters()} for name, module in parts.items()}
    assert dtypes == {
        "text_encoder": {torch.float16},
        "denoiser": {torch.float16},
        "encoder": {dtype},
        "decoder": {dtype},
    }
    latents = torch.zeros(1, 4, 4, 4)
    assert parts["decoder"](latents).dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("sdxl", Size(36, 32), "sdxl needs width and height in multiples of 8"),
        ("pixart", Size(32, 36), "pixart needs width and height in multiples of 8"),
        ("flux", Size(32, 28), "flux needs width and height in multiples of 8"),
        ("sd3", Size(136, 32), "positions for at most 128 pixels a side"),
    ],
)
def test_a_size_that_the_family_cannot_do_is_refused(family: str, size: Size, message: str, tmp_path: Path) -> None:
    base = FAMILIES[family](tmp_path / family)
    with pytest.raises(BundleError, match=message):
        plan_build(BuildOptions(base=str(base), out=tmp_path / "bundle", sizes=(size,)))


@pytest.mark.parametrize(
    ("family", "backend", "precision"),
    [*((family, "torch", "bf16") for family in (*MODELS, *STUDENTS)), ("sd15", "torch", "fp16"), ("sd15", "onnxruntime", "fp16")],
)
def test_lower_precisions_pass_a_gate_of_their_own(family: str, tmp_path: Path, backend: BackendName, precision: str) -> None:
    base = (MODELS | STUDENTS)[family](tmp_path / family)
    options = BuildOptions(base=str(base), out=tmp_path / "bundle", backend=backend, precision=precision, batch_sizes=(2, 4))
    manifest = build_engine(options, print)
    assert 1e-4 < manifest.max_error["denoiser"] <= manifest.max_error_allowed["denoiser"]  # not float32 in disguise
    assert {tensor.dtype for part in manifest.parts.values() for tensor in part.outputs} == {"float32"}


def test_families_that_share_weights_share_no_graph(tmp_path: Path) -> None:
    """PixArt-Sigma's text encoder reads 300 tokens, PixArt-Alpha's with the same weights 120."""
    keys = [
        {
            export.key
            for export in plan_build(BuildOptions(base=str(FAMILIES[name](tmp_path / name)), out=tmp_path / "out")).exports
        }
        for name in ("pixart", "pixart-sigma")
    ]
    assert keys[0].isdisjoint(keys[1])


def _export_keys(base: Path, **options: Any) -> dict[str, str]:
    options = {"out": base.parent / "out", "batch_sizes": (2,)} | options
    return {export.part: export.key for export in plan_build(BuildOptions(base=str(base), **options)).exports}


def test_graphs_whose_times_have_another_type_are_not_shared(tmp_path: Path) -> None:
    """Euler's linspace spacing gives the network fractions of times, the ODE sampler whole ones."""
    base = MODELS["sd15"](tmp_path / "sd15")
    whole, fractions = _export_keys(base), _export_keys(base, sampler="euler", spacing="linspace", guidance=3)
    other_scale = _export_keys(base, guidance=2)
    assert {part for part, key in whole.items() if key != fractions[part]} == {"denoiser"}
    assert whole == other_scale


def test_graphs_that_hold_another_embedded_guidance_are_not_shared(tmp_path: Path) -> None:
    base = MODELS["flux"](tmp_path / "flux")
    assert _export_keys(base)["text_encoder"] != _export_keys(base, sampler="flow-euler", guidance=2)["text_encoder"]
