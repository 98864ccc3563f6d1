"""LoRA slots: files as the values of a slot, and networks that take them, against the same LoRAs fused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from numpy.typing import NDArray
from tiny import FAMILIES, make_tiny_upscaler
from torch import Tensor, nn

from flashdiff.controls import ControlRequest
from flashdiff.engines.parts import parts_of, random_inputs, run_torch
from flashdiff.errors import LoraError, RequestError
from flashdiff.families import load_base
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.control import with_controls
from flashdiff.families.slots import layers_of_base, table_of, with_slots
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import fuse
from flashdiff.lora_requests import LoraRequest, slots_of, unslotted
from flashdiff.lora_slots import SlotLayer, SlotTable, find_weights, read_slot_lora, slot_layers
from flashdiff.tasks import check_order
from flashdiff.tensor_file import parse_tensors

TABLE = SlotTable(
    base="a base",
    base_hash="0" * 64,
    rank=4,
    layers=tuple(SlotLayer(name=name, inputs=6, outputs=outputs) for name, outputs in (("k", 2), ("proj", 5), ("q", 3))),
    denoiser="unet",
    aliases={
        "unet": {"q": "q", "k": "k", "proj": "proj", "qk": "q+k", "norm": "norm", "conv": "conv"},
        "text_encoder": {},
    },
)
_random = np.random.default_rng(0)


def _values(*shape: int) -> NDArray[np.float32]:
    return _random.standard_normal(shape, dtype=np.float32)


def _pair(layer: str, outputs: int, rank: int = 2, inputs: int = 6) -> dict[str, NDArray[np.float32]]:
    return {f"unet.{layer}.lora_A.weight": _values(rank, inputs), f"unet.{layer}.lora_B.weight": _values(outputs, rank)}


def _save(folder: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None, name: str = "a.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name, metadata)
    return folder / name


def _change(values: NDArray[np.float32], layer: str) -> NDArray[np.float32]:
    """What a slot adds to a layer's weight [outputs, inputs]."""
    own, down, up = TABLE.places[layer]
    a = values[down : down + TABLE.rank * own.inputs].reshape(TABLE.rank, own.inputs)
    b = values[up : up + TABLE.rank * own.outputs].reshape(TABLE.rank, own.outputs)
    return b.T @ a


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_becomes_matrices_padded_to_the_rank(tmp_path: Path) -> None:
    tensors = {**_pair("q", 3), **_pair("proj", 5, rank=4), "unet.q.alpha": np.array(4, dtype=np.float32)}
    lora = read_slot_lora(_save(tmp_path, tensors), TABLE, "a")
    down, up = (tensors[f"unet.q.lora_{side}.weight"] for side in "AB")
    np.testing.assert_allclose(_change(lora.values, "q"), 2 * up @ down, rtol=1e-5)
    down, up = (tensors[f"unet.proj.lora_{side}.weight"] for side in "AB")
    np.testing.assert_allclose(_change(lora.values, "proj"), up @ down, rtol=1e-5)
    assert not _change(lora.values, "k").any()
    assert (lora.rank, lora.layers, len(lora.values)) == (4, 2, 4 * (3 * 6 + 10))


@pytest.mark.parametrize("alpha", [np.array(4, dtype=np.int64), np.array([4], dtype=np.int32)])
def test_an_alpha_may_be_a_whole_number(tmp_path: Path, alpha: NDArray[np.integer]) -> None:
    tensors = {**_pair("q", 3), "unet.q.alpha": alpha}
    found = read_slot_lora(_save(tmp_path, tensors), TABLE, "a")
    down, up = (tensors[f"unet.q.lora_{side}.weight"] for side in "AB")
    np.testing.assert_allclose(_change(found.values, "q"), 2 * up @ down, rtol=1e-5)


def test_settings_of_a_files_metadata_that_changed_the_base_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pissa.safetensors"
    safetensors.numpy.save_file(
        _pair("q", 3), file, metadata={"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": "pissa"})}
    )
    with pytest.raises(LoraError, match=r"^a: pissa\.safetensors: init_lora_weights is 'pissa'"):
        read_slot_lora(file, TABLE, "a")


def test_kohyas_names_convolutions_of_1x1_and_joined_matrices(tmp_path: Path) -> None:
    down, up, joined = _values(2, 6), _values(5, 2), _values(3 + 2, 2)
    tensors = {
        "lora_unet_proj.lora_down.weight": down[:, :, None, None],
        "lora_unet_proj.lora_up.weight": up[:, :, None, None],
        "lora_unet_qk.lora_down.weight": down,
        "lora_unet_qk.lora_up.weight": joined,
    }
    values = read_slot_lora(_save(tmp_path, tensors), TABLE, "a").values
    np.testing.assert_allclose(_change(values, "proj"), up @ down, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([_change(values, "q"), _change(values, "k")]), joined @ down, rtol=1e-5)


def test_pefts_own_folder_says_the_scale(tmp_path: Path) -> None:
    pair = _pair("q", 3)
    _save(
        tmp_path,
        {key.replace("unet.", "base_model.model."): value for key, value in pair.items()},
        name="adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = find_weights(tmp_path)
    assert found
    first = read_slot_lora(found, TABLE, "a")
    product = pair["unet.q.lora_B.weight"] @ pair["unet.q.lora_A.weight"]
    np.testing.assert_allclose(_change(first.values, "q"), 8 / 2**0.5 * product, rtol=1e-5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 4}))
    assert read_slot_lora(found, TABLE, "a").weights_hash != first.weights_hash


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read_as_the_library_reads_them(kind: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 2).to(kind), "b": torch.randn(4).to(kind), "c": torch.zeros(0, 2).to(kind)}
    content = safetensors.torch.save(tensors, {"note": "x"})
    found, metadata = parse_tensors(content)
    assert metadata == {"note": "x"}
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values.float().numpy())


def _header(entry: object, data: bytes = b"\0" * 8, name: str = "a") -> bytes:
    text = json.dumps({name: entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"\xff" * 16, "its header has"),
        ((4).to_bytes(8, "little") + b"null", "no object"),
        ((2).to_bytes(8, "little") + b"{x", "Expecting property name"),
        (_header(7), "lacks its type"),
        (_header({"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}, b"\0" * 16), "has the type I64, which no LoRA has"),
        (_header({"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}), "has the type BOOL, which no LoRA has"),
        (
            _header({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}),
            "has the type F8_E4M3, which slots do not",
        ),
        (_header({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}), "does not fit its bytes"),
        (_header({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}), "does not fit its bytes"),
        (_header({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}), "no whole number"),
        (_header({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}), "no whole number"),
        (_header({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}), "does not fit its bytes"),
        (_header({"a": 1}, name="__metadata__"), "not texts"),
    ],
)
def test_a_damaged_file_is_a_value_error(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tensors(content)


FUSE = "fuse it into a bundle with build-engine --lora"
OTHER = json.dumps({"base": "other", "base_hash": "f" * 64})


def _of_3x3(layer: str) -> dict[str, NDArray[np.float32]]:
    return {f"unet.{layer}.lora_A.weight": _values(2, 6, 3, 3), f"unet.{layer}.lora_B.weight": _values(3, 2, 1, 1)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "a holds no layer"),
        (
            _pair("q", 3, rank=5),
            f"it has rank 5, and this model's slots take up to 4: build with --lora-rank 5, or {FUSE}",
        ),
        (_pair("q", 4), r"the layer 3 outputs of 6 inputs: it is another base's"),
        (
            _pair("q", 3, inputs=7),
            r"it has matrices of \[2, 7\] and \[3, 2\], the layer 3 outputs of 6 inputs: it is another base's",
        ),
        (_pair("q", 3, rank=0), r"it is another base's"),
        (_pair("made_up", 3), "'unet.made_up.lora_A.weight': the unet of this base has no layer 'made_up'"),
        (_pair("norm", 3), f"slots do not reach the layer norm: {FUSE}"),
        ({**_pair("q", 3), **_pair("qk", 5)}, "another tensor is for the layer q as well"),
        ({**_pair("q", 3), "lora_unet_q.lora_down.weight": _values(2, 6)}, "and another tensor are for the same place"),
        ({"unet.q.lora_A.weight": _values(2, 6)}, "its up is missing"),
        (
            {"unet.conv.lora_A.weight": _values(2, 6, 3, 3), "unet.conv.lora_B.weight": _values(3, 2, 1, 1)},
            "slots do not reach the layer conv",
        ),
        (
            {"unet.q.lora_A.weight": _values(2, 6, 3, 3), "unet.q.lora_B.weight": _values(3, 2, 1, 1)},
            f"slots take linear layers and convolutions of 1x1: {FUSE}",
        ),
        (
            {"text_encoder.q.lora_A.weight": _values(2, 6)},
            f"changes a text encoder, which slots do not reach: {FUSE}",
        ),
        ({"lora_te_q.lora_down.weight": _values(2, 6)}, "changes a text encoder"),
        (
            {**_pair("q", 3), "unet.q.dora_scale": _values(3, 1)},
            f"'unet.q.dora_scale' is DoRA; slots take plain LoRA layers: {FUSE}",
        ),
        ({"unet.q.hada_w1_a": _values(3, 2)}, "is LoHa; slots take plain LoRA layers"),
        ({"unet.q.lokr_w1": _values(3, 2)}, "is LoKr; slots take plain LoRA layers"),
        ({"unet.q.diff": _values(3, 6)}, "is a full difference; slots take plain LoRA layers"),
        ({"unet.q.diff_b": _values(3)}, "is a full difference; slots take plain LoRA layers"),
        ({**_pair("q", 3), "unet.q.lora_mid.weight": _values(2, 2)}, r"is a LoRA with a core \(Tucker form\)"),
        ({**_pair("q", 3), "unet.q.lora_B.bias": _values(3)}, "is a LoRA with a bias"),
        ({"unet.q.made_up": _values(3)}, "'unet.q.made_up' is of no kind that can be fused"),
        ({"q": _values(3)}, "'q' is of no kind that can be fused"),
        ({**_pair("q", 3), "unet.q.alpha": np.array(np.inf, dtype=np.float32)}, "it has values that are not finite"),
        ({**_pair("q", 3), "unet.q.alpha": _values(2)}, "can only convert an array of size 1"),
        ({"unet.q.lora_A.weight": np.full((2, 6), np.nan, np.float32), "unet.q.lora_B.weight": _values(3, 2)}, "not finite"),
        ({"unet.q.lora_A.weight": np.full((2, 6), 1e300), "unet.q.lora_B.weight": _values(3, 2)}, "not finite"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_in_a_line(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraError, match=message) as caught:
        read_slot_lora(_save(tmp_path, tensors), TABLE, "a")
    assert str(caught.value).startswith("a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 4}'}, "the metadata says rank 3, the tensors have 2"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": "much"}'}, "could not convert string to float"),
        ({"lora_adapter_metadata": "[1]"}, "a is damaged"),
        ({"lora_adapter_metadata": "{"}, "a is damaged"),
        (
            {"flashdiff": json.dumps({"base": "other", "base_hash": "f" * 64})},
            "a: it was trained on 'other' with hash ffffffffffff, and this model's base a base has 000",
        ),
        ({"flashdiff": json.dumps({"base_hash": 7})}, "a: it was trained on 'None' with hash 7, and this model's"),
        ({"flashdiff": json.dumps({"base_hash": "0" * 64})}, "a: it is a flash student, which decides how a model is sampled"),
        ({"flashdiff": "7"}, "a is damaged"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        read_slot_lora(_save(tmp_path, _pair("q", 3), metadata), TABLE, "a")


def test_flash_json_next_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "flash.json").write_text(json.dumps({"base": "other", "base_hash": "f" * 64}))
    _save(tmp_path, _pair("q", 3), name="pytorch_lora_weights.safetensors")
    found = find_weights(tmp_path)
    assert found
    with pytest.raises(LoraError, match="a: it was trained on 'other' with hash ffffffffffff"):
        read_slot_lora(found, TABLE, "a")


def test_slots_reach_targets_and_all_of_a_block() -> None:
    shapes = {
        "x.attentions.0.to_q": (4, 3),
        "x.attentions.0.proj_in": (4, 3, 1, 1),
        "x.attentions.0.norm": (4,),
        "x.resnets.0.conv1": (4, 3, 3, 3),
        "x.resnets.0.conv_shortcut": (4, 3, 1, 1),
        "y.to_q": (4, 3),
        "y.not_to_q": (4, 3),
    }
    layers = slot_layers(shapes, ("to_q",), ("attentions",))
    assert [layer.name for layer in layers] == ["x.attentions.0.proj_in", "x.attentions.0.to_q", "y.to_q"]
    assert {(layer.inputs, layer.outputs) for layer in layers} == {(3, 4)}


# --- networks ---------------------------------------------------------------------------------------------------------

LONG = pytest.mark.long
BASES = {**FAMILIES, "sd-upscaler": make_tiny_upscaler}
TRIED = [name if name in ("sd15", "sdxl", "flux", "sd-upscaler") else pytest.param(name, marks=LONG) for name in BASES]


def _lora(file: Path, model: TorchModel, family: ModelFamily, layers: tuple[SlotLayer, ...], seed: int) -> Path:
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        sides, prefix = [1] * (model.network.get_submodule(layer.name).weight.ndim - 2), f"{family.lora_prefix}.{layer.name}"
        tensors[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(3, layer.inputs, *sides)
        tensors[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(layer.outputs, 3, *sides)
        tensors[f"{prefix}.alpha"] = torch.tensor(2.0)
    safetensors.torch.save_file(tensors, file)
    return file


@pytest.mark.parametrize("name", TRIED)
def test_rows_with_loras_of_their_own_equal_networks_that_have_them_fused(tmp_path: Path, name: str) -> None:
    """Two slots in two rows, each with other scales, in one batch."""
    base = BASES[name](tmp_path / name)
    family, model = load_base(str(base))
    layers = layers_of_base(model.folder, family)
    model = with_slots(model, family, 2, 4)
    table = table_of(model, family, 4)
    assert (table.layers, {slot.values for slot in slots_of(model.spec)}) == (layers, {table.values})
    files = [_lora(tmp_path / f"{k}.safetensors", model, family, layers[k::2], k) for k in (0, 1)]
    part, plain = (
        next(part for part in parts_of(family, model) if part.name == wanted) for wanted in ("denoiser_lora", "denoiser")
    )
    inputs = random_inputs(model, plain, 2, model.spec.sizes[0], torch.Generator().manual_seed(1))
    scales = [torch.tensor([0.7, 0.0]), torch.tensor([-0.5, 1.2])]
    slots: list[Tensor] = []
    for file, scale in zip(files, scales, strict=True):
        slots += [torch.from_numpy(read_slot_lora(file, table, "a").values)[None].repeat(2, 1), scale]
    ours, without = run_torch(part, (*inputs, *slots))["output"], run_torch(plain, inputs)["output"]
    for row in range(2):
        _, fused = load_base(str(base))
        fuse(fused, family, [(file, float(scale[row])) for file, scale in zip(files, scales, strict=True)])
        wanted = run_torch(
            next(p for p in parts_of(family, fused) if p.name == "denoiser"), tuple(x[row : row + 1] for x in inputs)
        )
        torch.testing.assert_close(ours[row], wanted["output"][0], atol=1e-5, rtol=0)
        assert (without[row] - wanted["output"][0]).abs().max() > 0.05


@pytest.fixture(scope="module")
def slotted_model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchModel, list[NDArray[np.float32]]]:
    """A model with two slots, and the values of two LoRAs."""
    folder = tmp_path_factory.mktemp("loras")
    family, model = load_base(str(tiny_base))
    model = with_slots(model, family, 2, 4)
    table = table_of(model, family, 4)
    files = [_lora(folder / f"{seed}.safetensors", model, family, table.layers, seed) for seed in (0, 1)]
    return model, [read_slot_lora(file, table, "a").values for file in files]


def test_rows_with_and_without_loras_share_no_step_and_have_the_pixels_that_they_have_alone(
    slotted_model: tuple[TorchModel, list[NDArray[np.float32]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (first, second) = slotted_model

    def order(*loras: tuple[NDArray[np.float32], float]) -> Any:
        given = [LoraRequest(name=str(index), scale=scale, values=values) for index, (values, scale) in enumerate(loras)]
        return check_order(model.spec, prompt="a red dog", seed=3, steps=2, loras=given)

    orders = [order(), order((first, 1.0)), order((second, 0.5)), order((first, 0.5), (second, -1.0)), order((first, 0.0))]
    calls: list[tuple[str, int]] = []
    call = model.call

    def count(part: str, inputs: Any) -> Any:
        calls.append((part, len(next(iter(inputs.values())))))
        return call(part, inputs)

    monkeypatch.setattr(model, "call", count)
    together = [pixels for (pixels,) in generate(model, orders)]
    assert calls.count(("denoiser", 2)) == 2  # guided: two evaluations a row
    assert calls.count(("denoiser_lora", 8)) == 2
    for each, pixels in zip(orders, together, strict=True):
        np.testing.assert_allclose(pixels.astype(float), generate(model, [each])[0][0].astype(float), atol=1)
    np.testing.assert_allclose(together[4].astype(float), together[0].astype(float), atol=1)
    assert len({pixels.tobytes() for pixels in together[:4]}) == 4


def test_controls_and_loras_go_together(tiny_base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16, 32))
    for parameter in network.parameters():  # none of its outputs is 0
        nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(tmp_path / "edges")
    family, model = load_base(str(tiny_base))
    model = with_slots(with_controls(family, model, {"edges": tmp_path / "edges"}), family, 1, 4)
    assert [part.name for part in model.spec.denoisers] == [
        "denoiser",
        "denoiser_control",
        "denoiser_lora",
        "denoiser_control_lora",
    ]
    table = table_of(model, family, 4)
    file = _lora(tmp_path / "a.safetensors", model, family, table.layers, 0)
    values = read_slot_lora(file, table, "a").values
    _, fused = load_base(str(tiny_base))
    fuse(fused, family, [(file, 0.7)])
    fused = with_controls(family, fused, {"edges": tmp_path / "edges"})

    def latents(of: TorchModel, *loras: LoraRequest) -> NDArray[np.float32]:
        control = ControlRequest(name="edges", image=np.full((32, 32, 3), 200, dtype=np.uint8), scale=0.5)
        order = check_order(of.spec, prompt="a red dog", seed=3, steps=2, controls=[control], loras=loras)
        return generate_rows(of, [order])[0][0][0].latents

    ours, wanted = latents(model, LoraRequest(name="a", scale=0.7, values=values)), latents(fused)
    scale = float(np.abs(wanted).max())
    np.testing.assert_allclose(ours / scale, wanted / scale, atol=1e-5)
    assert np.abs(ours - latents(model)).max() > 0.01 * scale


def test_a_model_without_its_slots_is_the_model_before(tiny_base: Path) -> None:
    family, model = load_base(str(tiny_base))
    assert unslotted(with_slots(model, family, 2, 4).spec) == model.spec
    assert with_slots(model, family, 0, 0) is model


def test_networks_are_as_they_were_after_a_failure(slotted_model: tuple[TorchModel, list[NDArray[np.float32]]]) -> None:
    model, (first, _) = slotted_model
    denoiser: nn.Module = model.module("denoiser_lora")
    latents, times, states = torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 16, 32)
    slots = (torch.from_numpy(first)[None], torch.ones(1)) * 2
    with torch.no_grad():
        before = model.denoiser(latents, times, states)
        with pytest.raises(RuntimeError):
            denoiser(latents[:, :3], times, states, *slots)
        torch.testing.assert_close(model.denoiser(latents, times, states), before, atol=0, rtol=0)


def test_orders_hold_what_their_model_takes(slotted_model: tuple[TorchModel, list[NDArray[np.float32]]]) -> None:
    model, (first, _) = slotted_model
    for given, message in (
        ([LoraRequest(name="../x", values=first)], "loras.name: '../x' is not allowed"),
        (
            [LoraRequest(name="a", scale=10**400, values=first)],
            "loras.a.scale: inf is not allowed; it must be between -10 and 10",
        ),
        ([LoraRequest(name=name, values=first) for name in "abc"], "loras: '3 LoRAs' is not allowed; this model takes 2 at once"),
    ):
        with pytest.raises(RequestError, match=message):
            check_order(model.spec, prompt="x", loras=given)
    with pytest.raises(
        RequestError, match="loras: 'a' is not allowed; this model takes none: build it with build-engine --lora-slots"
    ):
        check_order(unslotted(model.spec), prompt="x", loras=[LoraRequest(name="a", values=first)])
