"""Networks that were trained for inpainting and edits, on tiny random weights: their own diffusers pipelines against ours."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny import make_tiny_sd15, make_tiny_sdxl

from flashdiff.components import Components
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.parts import parts_of
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.stock import StockReference, run_stock
from flashdiff.errors import BundleError, RequestError
from flashdiff.families import family_of
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise
from flashdiff.orders import Pixels
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

PROMPT, SEED, STEPS, GUIDANCE = "a red dog", 3, 4, 3.0
SAMPLING = SamplingOptions(sampler="ddim", guidance=GUIDANCE)
MAKE = {"sd15": make_tiny_sd15, "sdxl": make_tiny_sdxl}
CLASSES = {
    ("sd15", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sdxl", "inpainting"): "StableDiffusionXLInpaintPipeline",
    ("sd15", "edit"): "StableDiffusionInstructPix2PixPipeline",
    ("sdxl", "edit"): "StableDiffusionXLInstructPix2PixPipeline",
}
CHANNELS = {"inpainting": 9, "edit": 8}
IMAGE: Pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
MASK: Pixels = np.zeros((32, 32, 3), dtype=np.uint8)
MASK[5:27, 9:20] = 255


def _base(folder: Path, family: str, task: str) -> Path:
    base = MAKE[family](folder / f"{family}-{task}", in_channels=CHANNELS[task])
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": CLASSES[family, task]}))
    return base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {key: _base(folder, *key) for key in CLASSES}


def _pipeline(base: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> Any:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    noise = torch.from_numpy(image_noise(SEED, 0, shape))[None]
    module = inspect.getmodule(type(pipeline))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    take = module.retrieve_latents  # type: ignore[union-attr]
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, *_, **__: take(encoded, sample_mode="argmax"))
    return pipeline


def _inputs(task: str) -> dict[str, Pixels]:
    return {"image": IMAGE, "mask": MASK} if task == "inpainting" else {"image": IMAGE}


def _latents(components: Components, task: str, **parameters: float) -> NDArray[np.float32]:
    order = check_order(components.spec, prompt=PROMPT, seed=SEED, steps=STEPS, inputs=_inputs(task), parameters=parameters)
    assert order.task.name == task
    return generate_rows(components, [order])[0][0][0].latents


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("family", MAKE)
def test_trained_inpainting_is_that_of_the_stock_pipeline(
    bases: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, family: str, strength: float
) -> None:
    base = bases[family, "inpainting"]
    _, model = load_fused(str(base), (), SAMPLING)
    ours = _latents(model, "inpainting", strength=strength)
    pipeline = _pipeline(base, monkeypatch, model.spec.latent_shape(model.spec.sizes[0]))
    stock = pipeline(
        PROMPT, image=Image.fromarray(IMAGE), mask_image=Image.fromarray(MASK), height=32, width=32, strength=strength,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
    ).images[0]  # fmt: skip
    np.testing.assert_allclose(ours, stock, atol=1e-4, rtol=0)
    assert ours.std() > 0.1


@pytest.mark.parametrize("image_guidance", [1.5, 1.0])
@pytest.mark.parametrize("family", MAKE)
def test_edits_are_those_of_the_stock_pipeline(
    bases: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, family: str, image_guidance: float
) -> None:
    base = bases[family, "edit"]
    _, model = load_fused(str(base), (), SAMPLING)
    ours = _latents(model, "edit", image_guidance=image_guidance)
    pipeline = _pipeline(base, monkeypatch, model.spec.latent_shape(model.spec.sizes[0]))
    sizes = {"height": 32, "width": 32} if family == "sdxl" else {}
    stock = pipeline(
        PROMPT, image=Image.fromarray(IMAGE), num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        image_guidance_scale=image_guidance, output_type="latent", **sizes,
    ).images[0]  # fmt: skip
    np.testing.assert_allclose(ours, stock, atol=1e-4, rtol=0)
    assert ours.std() > 0.1


@pytest.mark.parametrize(("family", "task"), CLASSES)
def test_the_second_gate_compares_with_the_models_own_pipeline(
    bases: dict[tuple[str, str], Path], family: str, task: str
) -> None:
    base = bases[family, task]
    found, model = load_fused(str(base), (), SAMPLING)
    stock = run_stock(found, model, base, parts_of(found, model))
    assert isinstance(stock, StockReference)
    assert stock.made_by.startswith(CLASSES[family, task])
    assert stock.torch_error < 1e-5


def test_requests_without_and_with_the_conditions_share_batches(bases: dict[tuple[str, str], Path]) -> None:
    for task in CHANNELS:
        _, model = load_fused(str(bases["sd15", task]), (), SAMPLING)
        orders = [
            check_order(model.spec, prompt=PROMPT, seed=SEED, steps=2),
            check_order(model.spec, prompt=PROMPT, seed=SEED, steps=2, inputs=_inputs(task)),
        ]
        alone = [generate(model, [order])[0][0] for order in orders]
        together = generate(model, orders)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one.astype(float), other[0].astype(float), atol=1)
        assert (alone[0] != alone[1]).any()


def test_without_a_mask_all_of_a_grey_image_is_replaced(bases: dict[tuple[str, str], Path]) -> None:
    _, model = load_fused(str(bases["sd15", "inpainting"]), (), SAMPLING)
    plain = check_order(model.spec, prompt=PROMPT, seed=SEED, steps=2)
    whole = check_order(model.spec, prompt=PROMPT, seed=SEED, steps=2, inputs={"image": IMAGE, "mask": np.full_like(MASK, 255)})
    np.testing.assert_array_equal(generate(model, [plain]), generate(model, [whole]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "backend"),
    [
        ("sd15", "inpainting", "openvino"),
        ("sdxl", "inpainting", "onnxruntime"),
        ("sd15", "edit", "onnxruntime"),
        ("sdxl", "edit", "openvino"),
    ],
)
def test_engines_give_torchs_latents(
    bases: dict[tuple[str, str], Path], tmp_path: Path, family: str, task: str, backend: str
) -> None:
    base = bases[family, task]
    options = BuildOptions(base=str(base), out=tmp_path / "out", backend=backend, batch_sizes=(1, 3), sampler="ddim", guidance=3)
    build_engine(options, print)
    _, model = load_fused(str(base), (), SAMPLING)
    engine = open_bundle(tmp_path / "out")
    np.testing.assert_allclose(_latents(engine, task), _latents(model, task), atol=1e-4, rtol=0)


def test_what_such_a_model_cannot_do_is_refused(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    spec = family_of(bases["sd15", "edit"]).read_spec(bases["sd15", "edit"])
    with pytest.raises(RequestError, match=r"inputs: 'image, mask' is not allowed; .*text_to_image takes none; edit takes image"):
        check_order(spec, prompt=PROMPT, inputs=_inputs("inpainting"))
    with pytest.raises(RequestError, match=r"image_guidance: 0.0 is not allowed; it must be above 0 and at most 100"):
        check_order(spec, prompt=PROMPT, inputs=_inputs("edit"), parameters={"image_guidance": 0.0})
    with pytest.raises(RequestError, match=r"strength: 0.5 is not allowed; no task of this model takes it"):
        check_order(spec, prompt=PROMPT, inputs=_inputs("edit"), parameters={"strength": 0.5})
    with pytest.raises(BundleError, match="--batch must reach 3: guidance evaluates the network three times a step"):
        build_engine(BuildOptions(base=str(bases["sd15", "edit"]), out=tmp_path / "out", batch_sizes=(1, 2)), print)
