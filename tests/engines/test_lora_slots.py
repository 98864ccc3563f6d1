"""Bundles with LoRA slots: planned, built, opened and asked, against bundles that have the LoRA fused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from flashdiff import cli
from flashdiff.config import parse_record
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import SLOTS, read_manifest
from flashdiff.engines.config import BuildOptions, BuildRecipe
from flashdiff.engines.describe import describe
from flashdiff.engines.plan import describe as describe_plan
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.errors import BundleError, ConfigError
from flashdiff.families import family_of
from flashdiff.families.slots import layers_of_base
from flashdiff.generate import generate
from flashdiff.lora_requests import LoraRequest, unslotted
from flashdiff.lora_slots import read_slot_lora
from flashdiff.orders import Pixels
from flashdiff.tasks import check_order

PROMPT, SEED, STEPS = "a red dog", 3, 3


def _options(base: Path, out: Path, **options: Any) -> BuildOptions:
    return BuildOptions(
        base=str(base), out=out, **{"backend": "openvino", "batch_sizes": (2, 4), "compare_stock": False, **options}
    )


# --- plans ------------------------------------------------------------------------------------------------------------


def test_slots_change_no_other_graph(tiny_base: Path, tmp_path: Path) -> None:
    plain = plan_build(_options(tiny_base, tmp_path / "a"))
    slotted = plan_build(_options(tiny_base, tmp_path / "a", lora_slots=2, lora_rank=4))
    more = plan_build(_options(tiny_base, tmp_path / "a", lora_slots=2))
    assert unslotted(slotted.spec) == plain.spec
    keys, own, others = ({export.part: export.key for export in plan.exports} for plan in (plain, slotted, more))
    assert own.keys() - keys.keys() == {"denoiser_lora"}
    assert own.items() >= keys.items()
    assert others["denoiser_lora"] != own["denoiser_lora"]
    assert slotted.requirements.parameters["denoiser_lora"] == slotted.requirements.parameters["denoiser"]
    assert "LoRA slots   2, of rank 4 each" in list(describe_plan(slotted))
    assert more.inputs.lora_rank == 16
    assert len({plan.inputs.fingerprint for plan in (plain, slotted, more)}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_slots": 9}, "lora_slots 9: a request may bring 0 to 8 LoRAs"),
        ({"lora_slots": -1}, "lora_slots -1: a request may bring 0 to 8 LoRAs"),
        ({"lora_slots": 1, "lora_rank": 0}, "lora_rank 0: it must be 1 to 256"),
        ({"lora_slots": 1, "lora_rank": 257}, "lora_rank 257: it must be 1 to 256"),
        ({"lora_rank": 4}, "lora_rank 4: it is the rank of slots, and there are none without lora_slots"),
        ({"lora_slots": "many"}, "lora_slots"),
    ],
)
def test_slots_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_record({"base": "x", **options}, BuildRecipe, source="build-engine")
    assert "\n" not in str(caught.value)


def test_slots_that_are_too_large_are_refused(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashdiff.engines.plan.MAX_ELEMENTS", 1000)
    with pytest.raises(BundleError, match=r"--lora-rank 16: at --batch 4 a slot would have \d+ values, and a tensor has at most"):
        plan_build(_options(tiny_base, tmp_path / "a", lora_slots=1))


# --- bundles ----------------------------------------------------------------------------------------------------------


def _lora(file: Path, base: Path, seed: int) -> Path:
    """One that shows: every layer that slots reach, of rank 3."""
    torch.manual_seed(seed)
    tensors = {}
    for layer in layers_of_base(base, family_of(base)):
        sides = (1, 1) if layer.name.endswith(("proj_in", "proj_out")) else ()
        tensors[f"unet.{layer.name}.lora_A.weight"] = 0.2 * torch.randn(3, layer.inputs, *sides)
        tensors[f"unet.{layer.name}.lora_B.weight"] = 0.2 * torch.randn(layer.outputs, 3, *sides)
    save_file(tensors, file)
    return file


def _images(engine: Engine, *orders: list[tuple[Path, float]]) -> list[Pixels]:
    """An image for each list of LoRAs, all made at once."""
    made = []
    for loras in orders:
        given = [LoraRequest(name=str(n), scale=scale, values=_values(engine, file)) for n, (file, scale) in enumerate(loras)]
        made.append(check_order(engine.spec, prompt=PROMPT, seed=SEED, steps=STEPS, loras=given))
    return [pixels for (pixels,) in generate(engine, made)]


def _values(engine: Engine, file: Path) -> NDArray[np.float32]:
    assert engine.slots
    return read_slot_lora(file, engine.slots, "a").values


def _off(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(float) - other).max())


@pytest.mark.slow
def test_a_bundle_with_slots_makes_the_images_of_one_with_the_loras_fused(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (_lora(tmp_path / f"{seed}.safetensors", tiny_base, seed) for seed in (0, 1))
    out, fused = tmp_path / "slots", tmp_path / "fused"
    manifest = build_engine(_options(tiny_base, out, lora_slots=2, lora_rank=4), print)
    assert manifest.max_error["denoiser_lora at scale 0"] <= manifest.max_error_allowed["denoiser_lora at scale 0"]
    assert manifest.rows_are_exact
    assert "LoRA slots   2, of rank 4 each" in list(describe(out, read_manifest(out)))
    build_engine(_options(tiny_base, fused, loras=((str(first), 0.7), (str(second), -0.5))), print)
    engine, both = open_bundle(out), [(first, 0.7), (second, -0.5)]
    wanted = generate(open_bundle(fused), [check_order(engine.spec, prompt=PROMPT, seed=SEED, steps=STEPS)])[0][0]
    orders = [both, [(first, 1.0)], [], [(second, 0.5)]]
    together = _images(engine, *orders)
    assert _off(together[0], wanted) <= 1
    assert _off(together[0], together[2]) > 5
    for order, pixels in zip(orders, together, strict=True):
        np.testing.assert_array_equal(_images(engine, order)[0], pixels)
    assert len({pixels.tobytes() for pixels in together}) == 4

    picture = tmp_path / "a.png"
    command = ["generate", str(out), PROMPT, "-o", str(picture), "--seed", str(SEED), "--steps", str(STEPS)]
    assert cli.main([*command, f"--with-lora={first}:0.7", f"--with-lora={second}:-0.5"]) == 0
    from PIL import Image

    np.testing.assert_array_equal(np.asarray(Image.open(picture)), together[0])
    (tmp_path / "empty").mkdir()
    for lora, message in (
        (f"{first}:nan", "the scale after ':' must be between -10 and 10"),
        (f"{first}:11", "the scale after ':' must be between -10 and 10"),
        (f"{first}:", "give a .safetensors file or a folder with a LoRA"),
        (str(tmp_path / "empty"), "give a .safetensors file or a folder with a LoRA"),
        (str(tmp_path / "none.safetensors"), "give a .safetensors file or a folder with a LoRA"),
    ):
        assert cli.main([*command, f"--with-lora={lora}"]) == 2
        assert f"--with-lora '{lora}': {message}" in capsys.readouterr().err
    assert cli.main([*command, *[f"--with-lora={first}"] * 3]) == 2
    assert "loras: '3 LoRAs' is not allowed; this model takes 2 at once" in capsys.readouterr().err
    (out / SLOTS).unlink()
    with pytest.raises(BundleError, match=f"is incomplete: {SLOTS} is missing"):
        open_bundle(out)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_other_backends_take_slots_too(tiny_base: Path, tmp_path: Path, flash_lora: Path, backend: str) -> None:
    """On top of a student's LoRA, which is fused."""
    style = _lora(tmp_path / "style.safetensors", tiny_base, 0)
    options = {"backend": backend, "loras": ((str(flash_lora), 1.0),), "lora_slots": 1, "lora_rank": 4, "batch_sizes": (1, 2)}
    build_engine(_options(tiny_base, tmp_path / "slots", **options), print)
    engine = open_bundle(tmp_path / "slots")
    alone, plain = _images(engine, [(style, 0.8)], [])
    assert _off(alone, plain) > 5
    pair = _images(engine, [(style, 0.8)], [(style, -0.8)])
    assert _off(pair[0], alone) <= (1 if backend == "torch" else 0)
