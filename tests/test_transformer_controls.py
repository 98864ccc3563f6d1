"""ControlNets of SD3 and FLUX on tiny random weights: diffusers' own pipelines against ours, and the engines against torch."""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, SD3ControlNetModel
from numpy.typing import NDArray
from PIL import Image
from tiny import make_tiny_flux, make_tiny_flux_fill, make_tiny_flux_kontext, make_tiny_sd3

from flashdiff.components import Components, Size
from flashdiff.controls import ControlRequest
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.export import export_onnx
from flashdiff.engines.parts import parts_of, random_inputs
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ModelError, RequestError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.control import with_controls
from flashdiff.families.control_transformer import spread_evenly, spread_in_runs
from flashdiff.generate import generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

PROMPT, SEED, STEPS, SIZE = "a red dog", 3, 4, Size(48, 32)
PIPELINE = {"sd3": "StableDiffusion3ControlNetPipeline", "flux": "FluxControlNetPipeline"}
CLASS = {"sd3": SD3ControlNetModel, "flux": FluxControlNetModel}
MULTI = {"sd3": diffusers.SD3MultiControlNetModel, "flux": diffusers.FluxMultiControlNetModel}
SAMPLING = {
    "sd3": SamplingOptions(sampler="flow-euler", guidance=3.0),
    "flux": SamplingOptions(sampler="flow-euler"),
}
_random = np.random.default_rng(0)
EDGES, POSE = (_random.integers(0, 256, (SIZE.height, SIZE.width, 3), dtype=np.uint8) for _ in range(2))
CONTROLS = {
    "sd3-edges": {"num_layers": 2},
    "sd3-pose": {"num_layers": 2, "force_zeros_for_pooled_projection": True},
    # As SD3.5 large's own: no text, the base's places.
    "sd3-plain": {"num_layers": 2, "joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None},
    "flux-edges": {"num_layers": 2, "num_single_layers": 1, "guidance_embeds": True},
    "flux-pose": {"num_layers": 2, "num_single_layers": 1},
    "flux-double": {"num_layers": 1, "num_single_layers": 0},
}


def _network(folder: Path, name: str, **changes: Any) -> Path:
    """As it would be after training: none of its outputs is 0."""
    torch.manual_seed(len(name))
    shared: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
    if name.startswith("sd3"):
        own = {
            **{"sample_size": 8, "joint_attention_dim": 80, "caption_projection_dim": 32, "pooled_projection_dim": 64},
            **{"pos_embed_max_size": 16, "force_zeros_for_pooled_projection": False},
        }
    else:
        own = {"in_channels": 64, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)}
    network = CLASS[name.partition("-")[0]](**{**shared, **own, **CONTROLS.get(name, {}), **changes})
    for part, module in network.named_modules():
        if part.startswith("controlnet_") or part == "pos_embed_input.proj":
            for parameter in module.parameters(recurse=False):
                torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three blocks of two streams and three of one: more than the control networks have."""
    folder = tmp_path_factory.mktemp("bases")
    make_tiny_sd3(folder / "sd3", num_layers=3)
    make_tiny_flux(folder / "flux", num_layers=3, num_single_layers=3)
    for name in CONTROLS:
        _network(folder / name, name)
    return {path.name: path for path in folder.iterdir()}


@functools.cache
def _plain(base: Path) -> tuple[ModelFamily, TorchModel]:
    return load_fused(str(base), (), SAMPLING[base.name])


def _model(bases: dict[str, Path], family: str, **controls: str) -> TorchModel:
    found, model = _plain(bases[family])
    model = replace(model, spec=model.spec.model_copy(update={"sizes": (*model.spec.sizes, SIZE)}))
    return with_controls(found, model, {name: bases[place] for name, place in controls.items()})


def _made(model: Components, *controls: ControlRequest, **options: Any) -> NDArray[np.float32]:
    given = {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "size": SIZE, **options}
    return generate_rows(model, [check_order(model.spec, controls=controls, **given)])[0][0][0].latents


def _stock(bases: dict[str, Path], family: str, networks: Sequence[str], **call: Any) -> NDArray[np.float32]:
    """The latents [C, h, w] of diffusers' pipeline, with our noise."""
    loaded = [CLASS[family].from_pretrained(bases[name]) for name in networks]
    controlnet = loaded[0] if len(loaded) == 1 else MULTI[family](loaded)
    pipeline: Any = getattr(diffusers, PIPELINE[family]).from_pretrained(bases[family], controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(image_noise(SEED, 0, (16, SIZE.height // 4, SIZE.width // 4)))[None]
    encode = pipeline.vae.encode

    def to_mean(images: torch.Tensor) -> Any:
        encoded = encode(images)
        encoded.latent_dist.sample = lambda *_, **__: encoded.latent_dist.mode()
        return encoded

    pipeline.vae.encode = to_mean
    given: dict[str, Any] = {"guidance_scale": 3.0, "latents": noise} if family == "sd3" else {"guidance_scale": 3.5}
    if family == "flux":
        given["latents"] = pipeline._pack_latents(noise, *noise.shape)
    latents = pipeline(
        prompt=PROMPT, height=SIZE.height, width=SIZE.width, num_inference_steps=STEPS, output_type="latent", **given, **call
    ).images
    if family == "flux":
        latents = pipeline._unpack_latents(latents, SIZE.height, SIZE.width, 4)
    result: NDArray[np.float32] = latents[0].numpy()
    return result


@pytest.mark.parametrize("scale", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONTROLS)
def test_a_controlnet_steers_as_in_the_stock_pipeline(bases: dict[str, Path], name: str, scale: float) -> None:
    family, (start, end) = name.partition("-")[0], (0.25, 0.75) if scale == 0.5 else (0.0, 1.0)
    model = _model(bases, family, edges=name)
    stock = _stock(
        bases, family, [name], control_image=Image.fromarray(EDGES), controlnet_conditioning_scale=scale,
        control_guidance_start=start, control_guidance_end=end,
    )  # fmt: skip
    ours = _made(model, ControlRequest(name="edges", image=EDGES, scale=scale, start=start, end=end))
    np.testing.assert_allclose(ours, stock, atol=1e-4, rtol=0)
    plain = _made(model)
    assert np.abs(ours - plain).max() > 0.02
    np.testing.assert_allclose(_made(model, ControlRequest(name="edges", image=EDGES, scale=0)), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd3-edges", "flux-pose"])
def test_two_controls_add_up_as_in_the_stock_pipeline(bases: dict[str, Path], name: str) -> None:
    """Networks of one form: the pipelines ask the first one alone what they all read."""
    family = name.partition("-")[0]
    model = _model(bases, family, edges=name, pose=name)
    stock = _stock(
        bases, family, [name, name], control_image=[Image.fromarray(EDGES), Image.fromarray(POSE)],
        controlnet_conditioning_scale=[0.5, 1.0], control_guidance_start=[0.0, 0.5], control_guidance_end=[1.0, 1.0],
        **({"control_mode": [None, None]} if family == "flux" else {}),
    )  # fmt: skip
    controls = ControlRequest(name="edges", image=EDGES, scale=0.5), ControlRequest(name="pose", image=POSE, start=0.5)
    np.testing.assert_allclose(_made(model, *controls), stock, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", PIPELINE)
def test_networks_of_different_depths_add_up_block_by_block(bases: dict[str, Path], family: str) -> None:
    """diffusers would add as many residuals as the shortest network has; here each network steers as it does alone."""
    other = {"sd3": "sd3-plain", "flux": "flux-double"}[family]
    model = _model(bases, family, edges=f"{family}-edges", other=other)
    for name, place in (("edges", f"{family}-edges"), ("other", other)):
        control = ControlRequest(name=name, image=EDGES)
        alone = _made(_model(bases, family, **{name: place}), control)
        np.testing.assert_allclose(_made(model, control), alone, atol=1e-5, rtol=0)


def test_residuals_are_spread_as_diffusers_spreads_them() -> None:
    made = [torch.full((1,), float(index)) for index in range(5)]
    assert [int(one) for one in spread_in_runs(made, 19)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 3
    assert [int(one) for one in spread_evenly(made[:3], 8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    for spread in (spread_in_runs, spread_evenly):
        assert len(spread(made, 3)) == 3


@pytest.mark.parametrize("family", PIPELINE)
def test_rows_with_controls_have_the_latents_that_they_have_alone(bases: dict[str, Path], family: str) -> None:
    model = _model(bases, family, edges=f"{family}-edges", pose=f"{family}-pose")
    controls: list[list[ControlRequest]] = [
        [],
        [ControlRequest(name="edges", image=EDGES)],
        [ControlRequest(name="edges", image=EDGES, end=0.5), ControlRequest(name="pose", image=POSE, scale=0.5)],
    ]
    orders = [
        check_order(model.spec, prompt=PROMPT, seed=SEED, steps=2, size=SIZE, controls=given, inputs={}) for given in controls
    ]
    encoded: list[int] = []
    call = model.call

    def count(part: str, inputs: Any) -> Any:
        encoded.extend([len(inputs["images"])] if part == "encoder" else [])
        return call(part, inputs)

    model.call = count  # type: ignore[method-assign]
    together = [rows[0][0].latents for rows in generate_rows(model, orders)]
    assert sum(encoded) == 3
    for order, latents in zip(orders, together, strict=True):
        np.testing.assert_allclose(latents, generate_rows(model, [order])[0][0][0].latents, atol=1e-5, rtol=0)
    assert min(np.abs(one - other).max() for one, other in pairwise(together)) > 0.02


def test_bad_controls_are_refused_by_field(bases: dict[str, Path]) -> None:
    model = _model(bases, "flux", edges="flux-edges")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": None}, r"controls.edges.image: None is not allowed; a control needs an image"),
        ({"image": EDGES[:16]}, r"controls.edges.image: '48x16' is not allowed; it must have 48x32 pixels"),
        ({"scale": 3.0}, r"controls.edges.scale: 3.0 is not allowed; it must be between 0 and 2"),
        ({"name": "depth"}, r"controls.name: 'depth' is not allowed; this model takes edges"),
    ]
    for changes, message in cases:
        with pytest.raises(RequestError, match=message):
            _made(model, ControlRequest(**{"name": "edges", "image": EDGES, **changes}))


def test_a_control_of_another_base_is_refused_at_build(bases: dict[str, Path], tmp_path: Path) -> None:
    def refused(base: Path, control: Path, message: str) -> None:
        options = BuildOptions(base=str(base), out=tmp_path / "out", backend="torch", controls=(("edges", str(control)),))
        with pytest.raises(ModelError, match=message):
            plan_build(options)

    refused(bases["flux"], bases["sd3-edges"], "it is a SD3ControlNetModel; flux can be steered by FluxControlNetModel")
    refused(bases["sd3"], bases["flux-edges"], "it is a FluxControlNetModel; sd3 can be steered by SD3ControlNetModel")
    wide = _network(tmp_path / "flux-wide", "flux-edges", num_attention_heads=4)
    refused(bases["flux"], wide, r"another base: its width \(heads x head_dim\) is 64, flux needs 32 \(the control is ")
    near = _network(tmp_path / "sd3-near", "sd3-edges", pos_embed_max_size=8)
    refused(bases["sd3"], near, r"another base: its pos_embed_max_size is 8, sd3 needs 16")
    far = _network(tmp_path / "sd3-far", "sd3-edges", pos_embed_max_size=32)
    plan_build(BuildOptions(base=str(bases["sd3"]), out=tmp_path / "out", backend="torch", controls=(("edges", str(far)),)))
    for base, setting, value in (("flux", "num_mode", 10), ("flux", "conditioning_embedding_channels", 16)):
        changed = copytree(bases[f"{base}-edges"], tmp_path / setting)
        config = json.loads((changed / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps({**config, setting: value}))
        refused(bases[base], changed, f"'{setting}' is {value}, which is not supported; null is")
    refused(make_tiny_flux_fill(tmp_path / "fill"), bases["flux-edges"], "its in_channels is 64, fill needs 192")
    kontext = make_tiny_flux_kontext(tmp_path / "kontext")
    refused(kontext, bases["flux-edges"], "kontext reads image_latents in its sequence, where a control network has no part")


@pytest.mark.long
def test_a_bundle_steers_as_torch_does(bases: dict[str, Path], tmp_path: Path) -> None:
    places = {"edges": "sd3-edges", "pose": "sd3-plain"}
    options = BuildOptions(
        base=str(bases["sd3"]), out=tmp_path / "out", backend="openvino", batch_sizes=(2,), sizes=(SIZE,), sampler="flow-euler",
        guidance=3, controls=tuple((name, str(bases[place])) for name, place in places.items()),
    )  # fmt: skip
    manifest = build_engine(options, print)
    assert manifest.max_error["denoiser_control"] <= 1e-4
    assert manifest.max_error["denoiser_control at scale 0"] <= 1e-4
    assert plan_build(options).changes == []
    engine, model = open_bundle(tmp_path / "out"), _model(bases, "sd3", **places)
    controls = ControlRequest(name="edges", image=EDGES, scale=0.7), ControlRequest(name="pose", image=POSE, end=0.5)
    made, expected = (_made(components, *controls, steps=2) for components in (engine, model))
    np.testing.assert_allclose(made, expected, atol=1e-4, rtol=0)
    assert np.abs(made - _made(model, steps=2)).max() > 0.02


@pytest.mark.long
def test_the_onnx_graph_with_a_network_gives_torchs_output(bases: dict[str, Path], tmp_path: Path) -> None:
    import onnxruntime

    base = make_tiny_flux(tmp_path / "flux")  # of fewer blocks: the exporter's time grows with them
    model = _model({**bases, "flux": base}, "flux", edges="flux-double")
    part = next(part for part in parts_of(_plain(base)[0], model) if part.name == "denoiser_control")
    export_onnx(model, part, tmp_path, size=SIZE)
    inputs = random_inputs(model, part, 3, model.spec.sizes[0], torch.Generator().manual_seed(3))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {tensor.name: values.numpy() for tensor, values in zip(part.inputs, inputs, strict=True)})
    with torch.no_grad():
        np.testing.assert_allclose(made, part.module(*inputs).numpy(), atol=1e-4, rtol=0)
