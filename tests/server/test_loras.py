"""LoRAs of requests through every protocol, against a live server whose model is a fake with two slots."""

import io
import os
import resource
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file
from served import MODEL, Running, serving, triton_image

from flashdiff.engines.runtime.fake import GUIDED, FakeComponents
from flashdiff.errors import OverloadedError, RequestError
from flashdiff.generate import generate
from flashdiff.lora_requests import LoraRequest, slotted
from flashdiff.lora_slots import SlotLayer, SlotTable
from flashdiff.orders import Pixels
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server import loras as server_loras
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError
from flashdiff.server.loras import LoraFolder
from flashdiff.server.models import Model, Models
from flashdiff.server.replies import Lora
from flashdiff.tasks import check_order

TABLE = SlotTable(
    base="fake",
    base_hash="0" * 64,
    rank=1,
    layers=(SlotLayer(name="layer", inputs=2, outputs=1),),
    denoiser="unet",
    aliases={"unet": {"layer": "layer"}},
)
RED, BLUE = np.array([1, 0, 0], dtype=np.float32), np.array([0, 0, 1], dtype=np.float32)


class SlottedFake(FakeComponents):
    """A model whose LoRAs make its images lighter or darker, as much as their scale says."""

    def __init__(self) -> None:
        super().__init__(GUIDED)
        self.spec = slotted(self.spec, 2, TABLE.values)

    @property
    def costs(self) -> Any:
        own = [("denoiser_lora", size) for size in self.spec.sizes]
        return {**super().costs, **{key: {self.max_batch: 1.0} for key in own}}

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        if part != "denoiser_lora":
            return super().call(part, inputs)
        plain = super().call("denoiser", {name: inputs[name] for name in self.spec.part("denoiser").inputs})["output"]
        self.calls[-1] = ("denoiser_lora", len(plain))
        weights = np.array([1, 2, -3], dtype=np.float32)
        shift = sum(inputs[f"scale_of_lora_{slot}"] * (inputs[f"lora_{slot}"] @ weights) for slot in (1, 2))
        return {"output": plain + shift[:, None, None, None]}


def _write(file: Path, values: NDArray[np.float32], **metadata: str) -> None:
    tensors = {"unet.layer.lora_A.weight": values[None, :2].copy(), "unet.layer.lora_B.weight": values[None, 2:].copy()}
    save_file(tensors, file, metadata)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    _write(folder / "red.safetensors", RED)
    (folder / "blue").mkdir()
    _write(folder / "blue" / "pytorch_lora_weights.safetensors", BLUE)
    _write(folder / "broken.safetensors", RED * np.float32("nan"))
    _write(folder / "no name.safetensors", RED)
    _write(tmp_path / "outside.safetensors", RED)
    (folder / "notes.txt").write_text("no LoRA")
    return folder


def _models(fake: FakeComponents, folder: Path | None) -> Models:
    model = Model(MODEL, fake, fake.costs, slots=TABLE)
    fake.calls.clear()
    return Models({"fake": model}, loras=LoraFolder(folder) if folder else None)


@pytest.fixture
def running(folder: Path) -> Iterator[Running]:
    fake = SlottedFake()
    with serving(fake, Listen(port=0, http_port=0), _models(fake, folder)) as running:
        yield running


def _expected(*loras: tuple[NDArray[np.float32], float]) -> Pixels:
    fake = SlottedFake()
    given = [LoraRequest(name=str(index), scale=scale, values=values) for index, (values, scale) in enumerate(loras)]
    return generate(fake, [check_order(fake.spec, prompt="x", seed=7, steps=3, loras=given)])[0][0]


def _read(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)))


def test_our_client_sends_loras(running: Running) -> None:
    with Client(running.address) as client:
        given = [Lora(name="red", scale=0.5), Lora(name="blue")]
        result = client.generate("x", seed=7, steps=3, loras=given, timeout_s=10)
        np.testing.assert_array_equal(_read(result.images[0]), _expected((RED, 0.5), (BLUE, 1.0)))
        assert "denoiser_lora" in result.part_timings
        assert "denoiser" not in result.part_timings
        assert client.estimate("x", steps=3, loras=given).expected_ms > 0
        plain = client.generate("x", seed=7, steps=3, timeout_s=10)
        assert "denoiser_lora" not in plain.part_timings
        np.testing.assert_array_equal(_read(plain.images[0]), _expected())
        assert (_read(plain.images[0]) != _read(result.images[0])).any()


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ([{"name": "green"}], "loras.name: 'green' is not allowed; this server has blue, broken, red"),
        ([{"name": "no name"}], "loras.name: 'no name' is not allowed; give up to 100 letters"),
        ([{"name": "../outside"}], "loras.name: '../outside' is not allowed; give up to 100 letters"),
        ([{"name": ".."}], r"loras.name: '\.\.' is not allowed; give up to 100 letters"),
        ([{"name": ""}], "loras.name: '' is not allowed; give up to 100 letters"),
        ([{"name": "red\0"}], "loras.name: 'red.*' is not allowed; give up to 100 letters"),
        ([{"name": "a" * 101}], "loras.name: 'aaa.* is not allowed; give up to 100 letters"),
        ([{}, {}], "loras.name: 'red' is not allowed; it is given twice"),
        ([{}, {"name": "a"}, {"name": "b"}], "loras: '3 LoRAs' is not allowed; this model takes 2 at once"),
        ([{"scale": float("nan")}], "loras.red.scale: nan is not allowed; it must be between -10 and 10"),
        ([{"scale": float("-inf")}], "loras.red.scale: -inf is not allowed; it must be between -10 and 10"),
        ([{"scale": 1e300}], "loras.red.scale: inf is not allowed; it must be between -10 and 10"),
        ([{"scale": 11.0}], "loras.red.scale: 11.0 is not allowed; it must be between -10 and 10"),
        ([{"name": "broken"}], "loras.name: 'broken' is not allowed; 'unet.layer.*': it has values that are not finite"),
    ],
)
def test_a_lora_that_makes_no_sense_is_refused_by_its_field(running: Running, loras: list[Any], message: str) -> None:
    given = [Lora(**{"name": "red", **lora}) for lora in loras]
    with Client(running.address) as client, pytest.raises(ServerError, match=message) as caught:
        client.generate("x", loras=given, timeout_s=10)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "\n" not in str(caught.value)
    assert not [call for call in running.fake.calls if call[0] != "text_encoder"]


def test_a_model_without_slots_and_a_server_without_loras_refuse_them(folder: Path) -> None:
    for models, message in (
        (
            Models({"fake": Model(MODEL, plain := FakeComponents(), plain.costs)}, loras=LoraFolder(folder)),
            "this model takes none",
        ),
        (_models(SlottedFake(), None), "loras.name: 'red' is not allowed; this server was started without --loras"),
    ):
        with serving(FakeComponents(), models=models) as running, Client(running.address) as client:
            with pytest.raises(ServerError, match=message):
                client.generate("x", loras=[Lora(name="red")], timeout_s=10)
            assert client.models() == ["fake"]


def test_listed_models_name_what_is_in_the_folder_now(running: Running, folder: Path) -> None:
    with grpc.insecure_channel(running.address) as channel:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        (model,) = stub.ListModels(image_pb2.ListModelsRequest(), timeout=10).models
        assert (list(model.loras), model.max_loras) == (["blue", "broken", "red"], 2)
        _write(folder / "violet.safetensors", RED + BLUE)
        (model,) = stub.ListModels(image_pb2.ListModelsRequest(), timeout=10).models
    assert list(model.loras) == ["blue", "broken", "red", "violet"]


def test_the_stock_triton_client_finds_and_sends_them(running: Running) -> None:
    client = triton.InferenceServerClient(running.address)
    listed = {tensor.name: tensor.datatype for tensor in client.get_model_metadata("fake").inputs}
    assert {"LORA_1": "BYTES", "LORA_SCALE_1": "FP32", "LORA_2": "BYTES", "LORA_SCALE_2": "FP32"}.items() <= listed.items()

    infer = partial(triton_image, client)
    made = infer(LORA_1=b"red", LORA_SCALE_1=np.float32(-0.5), LORA_2=b"blue")
    np.testing.assert_array_equal(made, _expected((RED, -0.5), (BLUE, 1.0)))
    np.testing.assert_array_equal(infer(LORA_2=b"blue"), _expected((BLUE, 1.0)))
    with pytest.raises(triton.InferenceServerException, match=r"LORA_SCALE_2: 1\.0 is not allowed; it needs a LORA_2"):
        infer(LORA_SCALE_2=np.float32(1))
    with pytest.raises(triton.InferenceServerException, match=r"loras\.name: 'green' is not allowed"):
        infer(LORA_1=b"green")
    client.close()


def test_the_images_api_takes_them(running: Running) -> None:
    def post(**fields: Any) -> httpx.Response:
        return httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "x", "seed": 7, "steps": 3, **fields})

    import base64

    made = _read(base64.b64decode(post(loras=[{"name": "red", "scale": 0.5}]).json()["data"][0]["b64_json"]))
    np.testing.assert_array_equal(made, _expected((RED, 0.5)))
    (model,) = httpx.get(f"{running.url}/v1/models").json()["data"]
    assert (model["flashdiff"]["loras"], model["flashdiff"]["max_loras"]) == (["blue", "broken", "red"], 2)
    for loras, message in (
        ("red", "loras: 'red' is not allowed; it must be a list of objects"),
        (["red"], "loras: ['red'] is not allowed; it must be a list of objects"),
        ([{"scale": 1}], "loras.name: '' is not allowed; give up to 100 letters"),
        ([{"name": "red", "scale": "1"}], "loras.scale: '1' is not allowed; it must be a number"),
        ([{"name": "red", "scale": True}], "loras.scale: True is not allowed; it must be a number"),
        ([{"name": 7}], "loras.name: 7 is not allowed; it must be a string"),
        ([{"name": "red", "weight": 1}], "loras.weight: 1 is not allowed; a LoRA has name, scale"),
    ):
        refused = post(loras=loras)
        assert (refused.status_code, message in refused.json()["error"]["message"]) == (400, True), refused.text


def test_rows_with_different_loras_share_steps_and_plain_ones_stay_alone(running: Running) -> None:
    red, blue, plain = _expected((RED, 1.0)), _expected((BLUE, 0.5)), _expected()
    kinds = [([Lora(name="red")], red), ([Lora(name="blue", scale=0.5)], blue), ([], plain)]
    with Client(running.address) as client, ThreadPoolExecutor(9) as pool:
        asked = [kinds[index % 3] for index in range(9)]
        results = list(pool.map(lambda kind: client.generate("x", seed=7, steps=3, loras=kind[0], timeout_s=30), asked))
    for (_, expected), result in zip(asked, results, strict=True):
        np.testing.assert_array_equal(_read(result.images[0]), expected)
    assert sum(rows for part, rows in running.fake.calls if part == "denoiser") == 2 * 3 * 3
    assert sum(rows for part, rows in running.fake.calls if part == "denoiser_lora") == 2 * 3 * 6


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the LoRAs that are read off the disk."""
    names, read = list[str](), server_loras.read_slot_lora

    def count(file: Path, table: SlotTable, source: str) -> Any:
        names.append(source)
        return read(file, table, source)

    monkeypatch.setattr(server_loras, "read_slot_lora", count)
    return names


def test_a_lora_is_read_once_and_again_when_its_file_changes(folder: Path, reads: list[str]) -> None:
    loras = LoraFolder(folder)
    np.testing.assert_array_equal(loras.read("red", TABLE), RED)
    assert loras.read("red", TABLE) is loras.read("red", TABLE)
    assert reads == ["red"]
    _write(folder / "new.safetensors", BLUE)
    (folder / "new.safetensors").replace(folder / "red.safetensors")
    np.testing.assert_array_equal(loras.read("red", TABLE), BLUE)
    assert reads == ["red", "red"]


def test_those_used_longest_ago_are_dropped_and_equal_files_kept_once(folder: Path, reads: list[str]) -> None:
    _write(folder / "violet.safetensors", RED + BLUE)
    (folder / "again.safetensors").write_bytes((folder / "red.safetensors").read_bytes())
    loras = LoraFolder(folder, max_bytes=2 * RED.nbytes)
    assert loras.read("red", TABLE) is loras.read("again", TABLE)
    assert loras.bytes == RED.nbytes
    loras.read("blue", TABLE)
    loras.read("red", TABLE)
    loras.read("violet", TABLE)  # blue goes
    assert loras.bytes == 2 * RED.nbytes
    loras.read("red", TABLE)
    assert reads == ["red", "again", "blue", "violet"]
    loras.read("blue", TABLE)
    assert reads[-1] == "blue"
    tiny = LoraFolder(folder, max_bytes=1)
    assert tiny.read("red", TABLE) is tiny.read("red", TABLE)


def test_a_lora_that_a_request_still_has_is_not_read_again(folder: Path, reads: list[str]) -> None:
    loras = LoraFolder(folder, max_bytes=1)
    red = loras.read("red", TABLE)
    loras.read("blue", TABLE)
    assert loras.read("red", TABLE) is red
    assert (reads, loras.bytes) == (["red", "blue"], RED.nbytes)


def test_all_loras_together_take_bounded_memory(folder: Path, reads: list[str]) -> None:
    """The limit is eight of these; what no request has makes room."""
    for index in range(10):
        _write(folder / f"{index}.safetensors", index * RED)
    loras = LoraFolder(folder, most_bytes=1)
    held = [loras.read(str(index), TABLE) for index in range(2, 9)]
    assert loras.read("blue", TABLE) is not None
    held.append(loras.read("9", TABLE))  # in the place of blue
    with pytest.raises(OverloadedError, match="the LoRAs of pending requests take 0 MiB, and all may take 0 MiB") as caught:
        loras.read("blue", TABLE)
    assert caught.value.retry_after_s
    assert loras.read("5", TABLE) is held[3]
    del held[0], caught
    np.testing.assert_array_equal(loras.read("blue", TABLE), BLUE)
    assert reads == [*"2345678", "blue", "9", "blue"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("red.safetensors", "this server has "),
        ("pipe", "this server has "),
        ("folder", "this server has "),
        ("loop", "this server has "),
        ("sparse", "cannot be read: larger than 2048 MiB"),
        ("zero", "zero is damaged: it is too short"),
        ("lines", r"lines is damaged: .* is no name of a tensor"),
        ("peft", "adapter_config.json is missing: it holds the scale"),
        ("piped", "adapter_config.json cannot be read: "),
    ],
)
def test_odd_files_are_refused_in_one_line_that_names_no_path(folder: Path, name: str, message: str) -> None:
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    with open(folder / "sparse.safetensors", "wb") as sparse:
        sparse.truncate(5 << 30)
    (folder / "zero.safetensors").touch()
    save_file({"unet.\nx": RED}, folder / "lines.safetensors")
    for kind in ("peft", "piped"):
        (folder / kind).mkdir()
        _write(folder / kind / "adapter_model.safetensors", RED)
    os.mkfifo(folder / "piped" / "adapter_config.json")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match=rf"loras\.name: '{name}' is not allowed; {message}") as caught:
        LoraFolder(folder).read(name, TABLE)
    assert "\n" not in str(caught.value)
    assert str(folder) not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: nothing of a large file is read


def test_a_lora_is_read_for_each_table(folder: Path) -> None:
    wider = SlotTable(**{**TABLE.model_dump(), "rank": 2})
    loras = LoraFolder(folder)
    assert len(loras.read("red", wider)) == wider.values == 2 * TABLE.values
    assert len(loras.read("red", TABLE)) == TABLE.values


def test_values_cannot_be_changed_by_a_request_and_threads_may_read_at_once(folder: Path) -> None:
    loras, together = LoraFolder(folder), threading.Barrier(8)

    def read(_: int) -> NDArray[np.float32]:
        together.wait(600)
        return loras.read("red", TABLE)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(8)))
    assert all(values is found[0] for values in found)
    assert loras.bytes == RED.nbytes
    with pytest.raises(ValueError, match="read-only"):
        found[0][0] = 1


def test_a_folder_that_has_gone_is_an_error_and_no_crash(folder: Path) -> None:
    loras = LoraFolder(folder)
    folder.rename(folder.with_name("away"))
    with pytest.raises(Exception, match="the folder of LoRAs cannot be read: No such file or directory"):
        loras.read("red", TABLE)


def test_a_lora_that_was_removed_is_unknown(folder: Path) -> None:
    loras = LoraFolder(folder)
    loras.read("red", TABLE)
    (folder / "red.safetensors").unlink()
    with pytest.raises(RequestError, match=r"loras\.name: 'red' is not allowed; this server has blue, broken"):
        loras.read("red", TABLE)
