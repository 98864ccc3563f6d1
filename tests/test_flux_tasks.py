"""FLUX Fill and Kontext on tiny random weights: their own diffusers pipelines against ours, and the engines against torch."""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny import make_tiny_flux_fill, make_tiny_flux_kontext

from flashdiff import rows
from flashdiff.components import Components, Size
from flashdiff.engines.backends.tensorrt_builder import build_plan
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import StockComparison
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.export import export_onnx
from flashdiff.engines.parts import Part, parts_of
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.shapes import bucket_shapes, dimensions_of
from flashdiff.engines.stock import StockReference, run_stock
from flashdiff.errors import BundleError, ModelError, RequestError
from flashdiff.families import family_of
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise
from flashdiff.orders import Pixels
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order, inpainting

PROMPT, SEED, STEPS = "a red dog", 3, 4
MAKE = {"fill": make_tiny_flux_fill, "kontext": make_tiny_flux_kontext}
SAMPLING = SamplingOptions(sampler="flow-euler")
WIDE = Size(48, 32)


def _image(size: Size) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)


def _mask(size: Size) -> Pixels:
    """Its edges lie within latent cells."""
    mask = np.zeros((size.height, size.width, 3), dtype=np.uint8)
    mask[5:27, 9:-13] = 255
    return mask


def _inputs(task: str, size: Size) -> dict[str, Pixels]:
    given = {"inpainting": {"image": _image(size), "mask": _mask(size)}, "edit": {"image": _image(size)}}
    return given.get(task, {})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One block of each kind: the ONNX exporter's time grows with the blocks."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(folder / name, num_layers=1) for name, make in MAKE.items()}


@functools.cache
def _model(base: Path) -> TorchModel:
    model = load_fused(str(base), (), SAMPLING)[1]
    return replace(model, spec=model.spec.model_copy(update={"sizes": (*model.spec.sizes, WIDE)}))


def _latents(components: Components, task: str, size: Size, **parameters: float) -> NDArray[np.float32]:
    order = check_order(
        components.spec, prompt=PROMPT, seed=SEED, steps=STEPS, size=size, inputs=_inputs(task, size), parameters=parameters
    )
    assert order.task.name == task
    return generate_rows(components, [order])[0][0][0].latents


def _pipeline(base: Path) -> Any:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _stock(base: Path, monkeypatch: pytest.MonkeyPatch, size: Size, **call: Any) -> NDArray[np.float32]:
    """The latents [C, h, w] of the pipeline that the base names, with our noise."""
    pipeline = _pipeline(base)
    noise = torch.from_numpy(image_noise(SEED, 0, (16, size.height // 4, size.width // 4)))[None]
    module = inspect.getmodule(type(pipeline))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    take = module.retrieve_latents  # type: ignore[union-attr]
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, *_, **__: take(encoded, sample_mode="argmax"))
    tokens = pipeline(
        prompt=PROMPT, height=size.height, width=size.width, num_inference_steps=STEPS, output_type="latent", **call
    ).images
    latents: NDArray[np.float32] = pipeline._unpack_latents(tokens, size.height, size.width, 4)[0].numpy()
    return latents


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_fill_is_that_of_the_stock_pipeline(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, strength: float) -> None:
    model = _model(bases["fill"])
    ours = _latents(model, "inpainting", WIDE, strength=strength)
    image, mask = Image.fromarray(_image(WIDE)), Image.fromarray(_mask(WIDE))
    stock = _stock(bases["fill"], monkeypatch, WIDE, image=image, mask_image=mask, strength=strength)
    np.testing.assert_allclose(ours, stock, atol=1e-4, rtol=0)
    assert ours.std() > 0.1


def test_fill_without_a_mask_replaces_all_of_a_grey_image(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = _model(bases["fill"]), Size(32, 32)
    white, grey = (torch.full((1, channels, 32, 32), level) for channels, level in ((1, 1.0), (3, 0.5)))
    stock = _stock(bases["fill"], monkeypatch, size, image=grey, mask_image=white)
    np.testing.assert_allclose(_latents(model, "text_to_image", size), stock, atol=1e-4, rtol=0)


def test_fill_with_an_image_and_no_mask_replaces_all_of_it(bases: dict[str, Path]) -> None:
    model, size = _model(bases["fill"]), Size(32, 32)
    image = _image(size)
    given = {"image": image}, {"image": image, "mask": np.full_like(image, 255)}
    orders = [
        check_order(model.spec, prompt=PROMPT, seed=SEED, steps=STEPS, inputs=inputs, parameters={"strength": 0.5})
        for inputs in given
    ]
    assert [order.task.name for order in orders] == ["image_to_image", "inpainting"]
    without, white = (made[0][0].latents for made in generate_rows(model, orders))
    np.testing.assert_allclose(without, white, atol=1e-5, rtol=0)


@pytest.mark.parametrize("task", ["edit", "text_to_image"])
def test_kontext_is_that_of_the_stock_pipeline(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """With a reference, resized to the requested size and not to the pipeline's own, and without one."""
    model = _model(bases["kontext"])
    given = {"image": Image.fromarray(_image(WIDE))} if task == "edit" else {}
    stock = _stock(bases["kontext"], monkeypatch, WIDE, max_area=WIDE.width * WIDE.height, _auto_resize=False, **given)
    ours = _latents(model, task, WIDE)
    np.testing.assert_allclose(ours, stock, atol=1e-4, rtol=0)
    assert ours.std() > 0.1


def test_guidance_and_steps_are_those_of_each_pipeline(bases: dict[str, Path]) -> None:
    for name, (guidance, steps) in {"fill": (30, 50), "kontext": (3.5, 28)}.items():
        sampler = family_of(bases[name]).read_spec(bases[name]).sampler
        assert (sampler.embedded_guidance, sampler.default_steps) == (guidance, steps)


@pytest.mark.parametrize("name", MAKE)
def test_rows_with_and_without_the_images_have_the_latents_that_they_have_alone(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = _model(bases[name])
    task = "inpainting" if name == "fill" else "edit"
    orders = [
        check_order(model.spec, prompt=prompt, seed=SEED, steps=2, inputs=_inputs(given, model.spec.sizes[0]))
        for prompt, given in ((PROMPT, "text_to_image"), (PROMPT, task), ("a blue cat", task))
    ]
    calls: list[int] = []
    call = model.call

    def count(part: str, inputs: Any) -> Any:
        calls.extend([len(inputs["latents"])] if part == "denoiser" else [])
        return call(part, inputs)

    monkeypatch.setattr(model, "call", count)
    together = [made[0][0].latents for made in generate_rows(model, orders)]
    assert calls == [3, 3]
    for order, latents in zip(orders, together, strict=True):
        np.testing.assert_allclose(latents, generate_rows(model, [order])[0][0][0].latents, atol=1e-5, rtol=0)
    assert np.abs(together[0] - together[1]).max() > 0.02


def test_the_rest_of_the_image_is_kept_by_fill(bases: dict[str, Path]) -> None:
    model, size = _model(bases["fill"]), Size(32, 32)
    order = check_order(model.spec, prompt=PROMPT, steps=1, inputs=_inputs("inpainting", size))
    (pixels,) = generate(model, [order])[0]
    outside = _mask(size) == 0
    np.testing.assert_array_equal(pixels[outside], _image(size)[outside])


def test_what_such_a_model_cannot_do_is_refused(bases: dict[str, Path]) -> None:
    fill, kontext = (family_of(bases[name]).read_spec(bases[name]) for name in MAKE)
    image, size = _image(fill.sizes[0]), fill.sizes[0]
    with pytest.raises(RequestError, match=r"inputs: 'mask' is not allowed; .* inpainting takes image, mask"):
        check_order(fill, prompt=PROMPT, inputs={"mask": image})
    with pytest.raises(RequestError, match=r"mask: '48x32' is not allowed; it must have 32x32 pixels"):
        check_order(fill, prompt=PROMPT, inputs={"image": image, "mask": _mask(WIDE)})
    with pytest.raises(RequestError, match=r"mask: 'all black' is not allowed"):
        check_order(fill, prompt=PROMPT, inputs={"image": image, "mask": np.zeros_like(image)})
    with pytest.raises(RequestError, match=r"image: '48x32' is not allowed; it must have 32x32 pixels"):
        check_order(kontext, prompt=PROMPT, inputs={"image": _image(WIDE)})
    with pytest.raises(RequestError, match=r"inputs: 'image, mask' is not allowed; .* edit takes image"):
        check_order(kontext, prompt=PROMPT, inputs=_inputs("inpainting", size))
    with pytest.raises(RequestError, match=r"image_guidance: 1.5 is not allowed; no task of this model takes it"):
        check_order(kontext, prompt=PROMPT, inputs={"image": image}, parameters={"image_guidance": 1.5})
    with pytest.raises(RequestError, match=r"negative_prompt: 'rain' is not allowed; this model runs without guidance"):
        check_order(kontext, prompt=PROMPT, negative_prompt="rain", inputs={"image": image})


def test_a_line_of_white_pixels_is_a_mask_for_fill(bases: dict[str, Path]) -> None:
    """It reads the mask by pixels, not by latent cells."""
    spec = family_of(bases["fill"]).read_spec(bases["fill"])
    image = _image(spec.sizes[0])
    mask = np.zeros_like(image)
    mask[5] = 255
    order = check_order(spec, prompt=PROMPT, inputs={"image": image, "mask": mask})
    grey = {"masked_image_latents": {"latents": np.zeros((16, 8, 8), dtype=np.float32)}}
    made = order.task.conditions(spec, order, grey, {})["mask"]
    assert made.shape == (16, 8, 8)
    np.testing.assert_array_equal(made[4:8, 1], np.ones((4, 8)))
    assert made.sum() == 32


def test_a_network_of_another_width_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = copytree(bases["kontext"], tmp_path / "base")
    index = base / "model_index.json"
    index.write_text(index.read_text().replace("FluxKontextPipeline", "FluxFillPipeline"))
    with pytest.raises(ModelError, match=r"the transformer takes 16 channels, the autoencoder's .* that take 48"):
        family_of(base).read_spec(base)


def _mixed_pixels(patch: pytest.MonkeyPatch) -> None:
    """A mask whose pixels lie in the wrong channels."""
    made = inpainting._masked_pixels
    patch.setattr(inpainting, "_masked_pixels", lambda *given: made(*given)[::-1])


def _unseen_image(patch: pytest.MonkeyPatch) -> None:
    """A reference that no row attends to."""
    patch.setattr(rows, "_scale_of", lambda *_: 0.0)


@pytest.mark.parametrize(("name", "wrong"), [("fill", _mixed_pixels), ("kontext", _unseen_image)])
def test_the_second_gate_compares_with_an_image_and_finds_what_is_wrong(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any
) -> None:
    family, model = load_fused(str(bases[name]), (), SAMPLING)
    found = run_stock(family, model, bases[name], parts_of(family, model))
    assert isinstance(found, StockReference)
    assert found.made_by.startswith(type(_pipeline(bases[name])).__name__)
    assert found.torch_error < 1e-5
    wrong(monkeypatch)
    with pytest.raises(BundleError, match=r"differs from that of the stock Flux\w+ with"):
        run_stock(family, model, bases[name], parts_of(family, model))


@pytest.fixture(scope="module")
def graph(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The ONNX graph of a base's denoiser, exported once."""

    @functools.cache
    def export(name: str) -> Path:
        family, folder = family_of(bases[name]), tmp_path_factory.mktemp("graphs")
        model = _model(bases[name])
        export_onnx(model, _denoiser(family, model), folder, size=WIDE)
        return folder / "model.onnx"

    return export


def _denoiser(family: ModelFamily, model: TorchModel) -> Part:
    return next(part for part in parts_of(family, model) if part.name == "denoiser")


def _rows(components: Components, name: str) -> list[NDArray[np.float32]]:
    """The latents of a row with the images and of a row without, in one batch."""
    orders = [
        check_order(components.spec, prompt=PROMPT, seed=SEED, steps=2, size=WIDE, inputs=_inputs(task, WIDE))
        for task in ("inpainting" if name == "fill" else "edit", "text_to_image")
    ]
    return [rows[0][0].latents for rows in generate_rows(components, orders)]


@pytest.mark.long
@pytest.mark.parametrize("name", MAKE)
def test_the_denoisers_onnx_graph_gives_torchs_latents(
    bases: dict[str, Path], graph: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import onnxruntime

    model = _model(bases[name])
    expected, call = _rows(model, name), model.call
    session = onnxruntime.InferenceSession(str(graph(name)), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(
        model, "call", lambda part, given: {"output": session.run(None, given)[0]} if part == "denoiser" else call(part, given)
    )
    made = _rows(model, name)
    np.testing.assert_allclose(made, expected, atol=1e-4, rtol=0)
    assert np.abs(made[0] - made[1]).max() > 0.02


@pytest.mark.long
@pytest.mark.parametrize("name", MAKE)
def test_a_bundle_gives_torchs_latents(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    options = {"base": str(bases[name]), "out": tmp_path / "out", "backend": "openvino", "batch_sizes": (2,), "sizes": (WIDE,)}
    manifest = build_engine(BuildOptions.model_validate({**options, "sampler": "flow-euler"}), print)
    assert isinstance(manifest.stock, StockComparison)
    assert manifest.stock.made_by.startswith("FluxFillPipeline" if name == "fill" else "FluxKontextPipeline")
    engine, model = open_bundle(tmp_path / "out"), _model(bases[name])
    np.testing.assert_allclose(_rows(engine, name), _rows(model, name), atol=1e-4, rtol=0)


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed: pip install -e '.[dev]'")
@pytest.mark.parametrize("name", MAKE)
def test_the_denoiser_becomes_a_tensorrt_plan(
    bases: dict[str, Path], graph: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    model = _model(bases[name])
    part = _denoiser(family_of(bases[name]), model)
    shapes = bucket_shapes(part.inputs, dimensions_of(model.spec, WIDE, 2))
    plan, timings = tmp_path / "denoiser.plan", tmp_path / "timings"
    build_plan("tensorrt-rtx", graph(name), shapes, plan, timings=timings, version_compatible=False, report=print)
    assert plan.stat().st_size > 100_000
