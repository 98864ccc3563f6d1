"""A control, a reference and LoRAs of a request in one model: against diffusers' pipeline, and built."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Once
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from tiny import IMAGE_SIDE, make_tiny_controlnet, make_tiny_ip_adapter

from flashdiff.components import Components
from flashdiff.controls import ControlRequest
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.families import family_of
from flashdiff.families.base import TorchModel
from flashdiff.families.control import with_controls
from flashdiff.families.ip_adapter import find_adapter, with_adapter
from flashdiff.families.slots import layers_of_base, table_of, with_slots
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import load_fused
from flashdiff.lora_requests import LoraRequest
from flashdiff.lora_slots import SlotTable, read_slot_lora
from flashdiff.noise import image_noise
from flashdiff.orders import Order
from flashdiff.references import ReferenceRequest
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

PROMPT, SEED, STEPS = "a red dog", 3, 2
_random = np.random.default_rng(0)
FACE = _random.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
IMAGE = _random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
DENOISERS = {
    (False, False): "denoiser",
    (True, False): "denoiser_control",
    (False, True): "denoiser_lora",
    (True, True): "denoiser_control_lora",
}
"""By whether a request has a control and LoRAs."""


@pytest.fixture(scope="module")
def files(tiny_base: Path, once: Once) -> Path:
    """A folder with a control network, an IP-Adapter and two LoRAs of the tiny base."""

    def make(folder: Path) -> None:
        make_tiny_controlnet(folder / "edges", tiny_base)
        make_tiny_ip_adapter(folder / "adapter.safetensors", tiny_base)
        for seed in (0, 1):
            torch.manual_seed(seed)
            tensors = {}
            for layer in layers_of_base(tiny_base, family_of(tiny_base)):
                sides = (1, 1) if layer.name.endswith(("proj_in", "proj_out")) else ()
                tensors[f"unet.{layer.name}.lora_A.weight"] = 0.2 * torch.randn(3, layer.inputs, *sides)
                tensors[f"unet.{layer.name}.lora_B.weight"] = 0.2 * torch.randn(layer.outputs, 3, *sides)
            save_file(tensors, folder / f"{seed}.safetensors")

    return once("together", make)


@pytest.fixture(scope="module")
def model(tiny_base: Path, files: Path) -> tuple[TorchModel, SlotTable]:
    family, model = load_fused(str(tiny_base), (), SamplingOptions(sampler="ddim", guidance=3.0))
    model = with_adapter(family, model, find_adapter(str(files / "adapter.safetensors"), None))
    model = with_slots(with_controls(family, model, {"edges": files / "edges"}), family, 2, 4)
    return model, table_of(model, family, 4)


def _order(components: Components, table: SlotTable, files: Path, *, has_control: bool, has_lora: bool, reads: bool) -> Order:
    loras = [(0, 0.7), (1, -0.5)] if has_lora else []
    return check_order(
        components.spec,
        prompt=PROMPT,
        seed=SEED,
        steps=STEPS,
        controls=[ControlRequest(name="edges", image=IMAGE, scale=0.7)] if has_control else [],
        reference=ReferenceRequest(image=FACE, scale=0.5) if reads else None,
        loras=[
            LoraRequest(
                name=str(seed), scale=scale, values=read_slot_lora(files / f"{seed}.safetensors", table, str(seed)).values
            )
            for seed, scale in loras
        ],
    )


def _all_orders(components: Components, table: SlotTable, files: Path) -> Iterator[Order]:
    for has_control, has_lora, reads in product((False, True), repeat=3):
        yield _order(components, table, files, has_control=has_control, has_lora=has_lora, reads=reads)


def _latents(components: Components, orders: Sequence[Order]) -> list[NDArray[np.float32]]:
    return [rows[0][0].latents for rows in generate_rows(components, orders)]


@pytest.mark.parametrize("reads", [True, False])
def test_all_three_make_the_latents_of_the_stock_pipeline(
    model: tuple[TorchModel, SlotTable], tiny_base: Path, files: Path, reads: bool
) -> None:
    """The LoRAs change the UNet, and neither the control network nor the adapter's own keys and values."""
    network = diffusers.ControlNetModel.from_pretrained(files / "edges")
    pipeline: Any = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tiny_base, controlnet=network)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    for seed, scale in ((0, 0.7), (1, -0.5)):
        pipeline.load_lora_weights(files / f"{seed}.safetensors")
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    referred = {}
    if reads:
        pipeline.load_ip_adapter(files, subfolder="", weight_name="adapter.safetensors")
        pipeline.set_ip_adapter_scale(0.5)
        referred["ip_adapter_image"] = Image.fromarray(FACE)
    expected = pipeline(
        PROMPT, image=Image.fromarray(IMAGE), controlnet_conditioning_scale=0.7, num_inference_steps=STEPS, guidance_scale=3.0,
        latents=torch.from_numpy(image_noise(SEED, 0, (4, 8, 8)))[None], height=32, width=32, output_type="latent", **referred,
    ).images[0].numpy()  # fmt: skip
    (found,) = _latents(model[0], [_order(*model, files, has_control=True, has_lora=True, reads=reads)])
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4, rtol=0)


def test_rows_share_the_steps_of_those_with_the_same_networks(
    model: tuple[TorchModel, SlotTable], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference decides nothing: rows with one and without share a step."""
    components, orders = model[0], list(_all_orders(*model, files))
    calls: list[tuple[str, int]] = []
    call = components.call

    def count(part: str, inputs: Any) -> Any:
        calls.append((part, len(next(iter(inputs.values())))))
        return call(part, inputs)

    monkeypatch.setattr(components, "call", count)
    together = _latents(components, orders)
    for name in DENOISERS.values():
        assert [rows for part, rows in calls if part == name] == [4] * STEPS  # two guided rows
    for order, latents in zip(orders, together, strict=True):
        scale = float(np.abs(latents).max())
        np.testing.assert_allclose(_latents(components, [order])[0] / scale, latents / scale, atol=1e-5, rtol=0)
    for index, one in enumerate(together):
        assert all(np.abs(one - other).max() > 0.01 for other in together[:index])


@pytest.mark.slow
def test_a_bundle_with_all_three_gives_every_row_the_pixels_that_it_has_alone(
    model: tuple[TorchModel, SlotTable], tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    manifest = build_engine(
        BuildOptions(
            base=str(tiny_base), out=tmp_path / "out", backend="openvino", batch_sizes=(4,), sampler="ddim", guidance=3.0,
            controls=(("edges", str(files / "edges")),), reference=str(files / "adapter.safetensors"), lora_slots=2, lora_rank=4,
        ),
        print,
    )  # fmt: skip
    assert manifest.rows_are_exact
    assert not isinstance(manifest.stock, str)
    assert manifest.stock.error <= 1e-4
    for name in DENOISERS.values():
        assert manifest.max_error[name] <= 1e-4
        assert manifest.max_error[f"{name} at scale 0"] <= 1e-4
    engine = open_bundle(tmp_path / "out")
    assert engine.slots == model[1]
    orders = list(_all_orders(engine, engine.slots, files))
    together = [pixels for (pixels,) in generate(engine, orders)]
    wanted = [pixels for (pixels,) in generate(model[0], orders)]
    for order, pixels, by_torch in zip(orders, together, wanted, strict=True):
        np.testing.assert_array_equal(generate(engine, [order])[0][0], pixels)
        np.testing.assert_allclose(pixels.astype(float), by_torch.astype(float), atol=1)
    assert len({pixels.tobytes() for pixels in together}) == len(together)
