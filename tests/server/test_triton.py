"""The stock Triton client against the server."""

import io
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from orders import from_image
from PIL import Image
from served import SIZE, Gate, Running, serving, set_cost, until
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
from tritonclient.utils import shared_memory as shm

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.generate import generate
from flashdiff.proto.v1 import triton_pb2 as pb
from flashdiff.server.app import Listen
from flashdiff.server.image_threads import ImageThreads
from flashdiff.server.images import decode_image
from flashdiff.tasks import check_order


@pytest.fixture
def stock(running: Running) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(running.address)
    yield client
    client.close()


def tensor(name: str, datatype: str, value: object, shape: tuple[int, ...] = (1,)) -> triton.InferInput:
    made = triton.InferInput(name, list(shape), datatype)
    kinds: dict[str, Any] = {"BYTES": np.object_, "UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32}
    made.set_data_from_numpy(np.full(shape, value, dtype=kinds[datatype]))
    return made


def inputs(**more: int) -> list[triton.InferInput]:
    kinds = {"SEED": "UINT64"}
    return [tensor("PROMPT", "BYTES", b"a red car"), *(tensor(n, kinds.get(n, "INT32"), v) for n, v in more.items())]


def test_it_is_live_ready_and_says_what_it_is(stock: triton.InferenceServerClient) -> None:
    assert stock.is_server_live()
    assert stock.is_server_ready()
    assert stock.is_model_ready("fake")
    assert stock.is_model_ready("fake", "1")
    assert not stock.is_model_ready("fake", "2")
    assert not stock.is_model_ready("other")
    assert "statistics" in stock.get_server_metadata().extensions
    metadata = stock.get_model_metadata("fake", as_json=True)
    assert metadata["versions"] == ["1"]
    assert {i["name"]: i["datatype"] for i in metadata["inputs"]}["PROMPT"] == "BYTES"
    assert metadata["outputs"][0] == {"name": "IMAGES", "datatype": "UINT8", "shape": ["-1", "-1", "-1", "3"]}
    config = stock.get_model_config("fake", as_json=True)["config"]
    assert config["model_transaction_policy"] == {"decoupled": True}
    optional = {i["name"]: i.get("optional", False) for i in config["input"]}
    assert [name for name, is_optional in optional.items() if not is_optional] == ["PROMPT"]
    index = stock.get_model_repository_index().models
    assert [(model.name, model.state) for model in index] == [("fake", "READY")]


def test_the_images_are_those_of_our_own_service(running: Running, stock: triton.InferenceServerClient) -> None:
    result = stock.infer("fake", inputs(SEED=7, STEPS=2, WIDTH=128, HEIGHT=64, COUNT=2), request_id="mine")
    order = check_order(running.fake.spec, prompt="a red car", seed=7, steps=2, size=running.fake.spec.sizes[1], count=2)
    expected = generate(FakeComponents(), [order])[0]
    np.testing.assert_array_equal(result.as_numpy("IMAGES"), expected)
    np.testing.assert_array_equal(result.as_numpy("SEEDS"), [7, 8])
    for data, pixels in zip(result.as_numpy("ENCODED"), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    response = result.get_response()
    assert response.id == "mine"
    assert response.parameters["steps"].int64_param == 2
    assert response.parameters["total_ms"].double_param > 0


def test_an_image_to_start_from_comes_as_a_file(running: Running, stock: triton.InferenceServerClient) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(file, "PNG")
    given = [*inputs(SEED=7, STEPS=4), tensor("IMAGE", "BYTES", file.getvalue()), tensor("STRENGTH", "FP32", 0.25)]
    result = stock.infer("fake", given)
    order = check_order(running.fake.spec, prompt="a red car", seed=7, steps=4)
    expected = generate(FakeComponents(), [from_image(order, decode_image(file.getvalue(), SIZE), 0.25)])[0]
    np.testing.assert_array_equal(result.as_numpy("IMAGES"), expected)
    assert [part for part, _ in running.fake.calls].count("denoiser") == 1


def test_only_the_outputs_asked_for_come(stock: triton.InferenceServerClient) -> None:
    result = stock.infer("fake", inputs(SEED=1), outputs=[triton.InferRequestedOutput("SEEDS")])
    assert [output.name for output in result.get_response().outputs] == ["SEEDS"]
    jpeg = [*inputs(SEED=1), tensor("FORMAT", "BYTES", b"jpeg")]
    result = stock.infer("fake", jpeg, outputs=[triton.InferRequestedOutput("ENCODED")])
    assert Image.open(io.BytesIO(result.as_numpy("ENCODED")[0])).format == "JPEG"


@pytest.mark.parametrize(
    ("model", "version", "given", "outputs", "status", "message"),
    [
        ("other", "", inputs(), None, "NOT_FOUND", "model: 'other'"),
        ("fake", "2", inputs(), None, "NOT_FOUND", "has version 1 only"),
        ("fake", "", inputs(STEPS=9), None, "INVALID_ARGUMENT", "steps: 9 is not allowed"),
        ("fake", "", inputs(COUNT=-1), None, "INVALID_ARGUMENT", "count: -1"),
        ("fake", "", inputs(WIDTH=64), None, "INVALID_ARGUMENT", "size: '64x0'"),
        ("fake", "", [tensor("STEPS", "INT32", 2)], None, "INVALID_ARGUMENT", "expected input 'PROMPT'"),
        ("fake", "", [*inputs(), tensor("NAME", "INT32", 2)], None, "INVALID_ARGUMENT", "unexpected inference input 'NAME'"),
        ("fake", "", [*inputs(), *inputs()], None, "INVALID_ARGUMENT", "'PROMPT' is given twice"),
        ("fake", "", [tensor("PROMPT", "FP32", 1)], None, "INVALID_ARGUMENT", "expects 'BYTES'"),
        ("fake", "", [tensor("PROMPT", "BYTES", b"x", (2,))], None, "INVALID_ARGUMENT", "unexpected shape for input 'PROMPT'"),
        ("fake", "", [tensor("PROMPT", "BYTES", b"\xff\xfe")], None, "INVALID_ARGUMENT", "it must be valid UTF-8"),
        ("fake", "", [*inputs(), tensor("FORMAT", "BYTES", b"gif")], None, "INVALID_ARGUMENT", "must be one of png, jpeg, webp"),
        ("fake", "", [*inputs(), tensor("IMAGE", "BYTES", b"gif")], None, "INVALID_ARGUMENT", "image: '3 bytes' is not allowed"),
        ("fake", "", [*inputs(), tensor("IMAGE", "BYTES", b"")], None, "INVALID_ARGUMENT", "image: '0 bytes' is not allowed"),
        ("fake", "", [*inputs(), tensor("STRENGTH", "FP32", 0.5)], None, "INVALID_ARGUMENT", "it needs an image"),
        ("fake", "", inputs(), ["NONE"], "INVALID_ARGUMENT", "unexpected inference output 'NONE'"),
        ("fake", "", inputs(), ["PREVIEW"], "INVALID_ARGUMENT", "use ModelStreamInfer"),
    ],
)
def test_a_bad_request_has_tritons_status_and_names_what_is_wrong(
    stock: triton.InferenceServerClient,
    model: str,
    version: str,
    given: list[triton.InferInput],
    outputs: list[str] | None,
    status: str,
    message: str,
) -> None:
    wanted = [triton.InferRequestedOutput(name) for name in outputs] if outputs else None
    with pytest.raises(InferenceServerException) as caught:
        stock.infer(model, given, model_version=version, outputs=wanted)
    assert caught.value.status() == f"StatusCode.{status}"
    assert message in caught.value.message()


@pytest.mark.parametrize(
    ("contents", "raw", "message"),
    [
        ([], b"\x05\x00\x00\x00ab", "not one element with its length"),
        ([], b"\x01", "not one element with its length"),
        ([b"a", b"b"], None, "expected 1 element, got 2"),
        ([], None, "expected 1 element, got 0"),
        ([b"a"], b"\x01\x00\x00\x00a", "both contents and raw contents"),
    ],
)
def test_malformed_contents_are_said_and_typed_ones_are_read(
    running: Running, contents: list[bytes], raw: bytes | None, message: str
) -> None:
    with grpc.insecure_channel(running.address) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        request = pb.ModelInferRequest(model_name="fake", raw_input_contents=[raw] if raw is not None else [])
        prompt = request.inputs.add(name="PROMPT", datatype="BYTES", shape=[1])
        if contents:
            prompt.contents.bytes_contents.extend(contents)
        with pytest.raises(grpc.RpcError) as caught:
            infer(request, timeout=10)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert message in caught.value.details()

        fine = pb.ModelInferRequest(model_name="fake")
        fine.inputs.add(name="PROMPT", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a red car")
        fine.inputs.add(name="STEPS", datatype="INT32", shape=[1]).contents.int_contents.append(2)
        assert infer(fine, timeout=10).parameters["steps"].int64_param == 2


def test_a_stream_brings_previews_results_and_errors_and_goes_on(stock: triton.InferenceServerClient) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    stock.start_stream(lambda result, error: answers.put((result, error)))
    wanted = [triton.InferRequestedOutput("PREVIEW"), triton.InferRequestedOutput("IMAGES")]
    stock.async_stream_infer("fake", inputs(SEED=7, STEPS=3), outputs=wanted, request_id="a", enable_empty_final_response=True)
    seen = [answers.get(timeout=600)[0] for _ in range(4)]
    assert [r.get_response().parameters["step"].int64_param for r in seen[:3]] == [1, 2, 3]
    assert [r.get_response().parameters["triton_final_response"].bool_param for r in seen] == [False, False, False, True]
    assert seen[0].as_numpy("PREVIEW").shape == (8, 8, 3)
    image = seen[3].as_numpy("IMAGES")[0]
    assert np.abs(seen[2].as_numpy("PREVIEW").astype(int) - image[::8, ::8]).max() <= 1

    stock.async_stream_infer("other", inputs(), request_id="b")
    result, error = answers.get(timeout=600)
    assert result is None
    assert "model: 'other'" in error.message()
    stock.async_stream_infer("fake", inputs(SEED=7, STEPS=3), outputs=wanted[1:], request_id="c")
    np.testing.assert_array_equal(answers.get(timeout=600)[0].as_numpy("IMAGES")[0], image)
    stock.stop_stream()


def test_a_malformed_message_is_an_error_in_the_stream_which_goes_on(running: Running) -> None:
    fine = pb.ModelInferRequest(model_name="fake", id="fine")
    fine.inputs.add(name="PROMPT", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    with grpc.insecure_channel(running.address) as channel:
        stream = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer", response_deserializer=pb.ModelStreamInferResponse.FromString
        )
        answers = list(stream(iter([b"\xff\xff", fine.SerializeToString()]), timeout=10))
    assert "bytes that are no request" in next(a.error_message for a in answers if a.error_message)
    assert [a.infer_response.id for a in answers if not a.error_message][-1] == "fine"


def test_a_client_that_sends_and_does_not_read_delays_only_itself(running: Running) -> None:
    request = pb.ModelInferRequest(model_name="none", id="x" * 200)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100_000:
            sent += 1
            yield request.SerializeToString() + b"\x32\x00" * 10_000  # unknown outputs: 20 kB of them
        return

    with grpc.insecure_channel(running.address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(endless(), timeout=30)
        before = -1
        while before != sent:  # until nothing moves any more
            before = sent
            time.sleep(0.3)
        call.cancel()
    assert sent < 20_000


def test_a_cancelled_stream_frees_its_rows(running: Running, stock: triton.InferenceServerClient) -> None:
    gate = Gate(running.fake, "denoiser", after=1)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    stock.start_stream(lambda result, error: answers.put((result, error)))
    stock.async_stream_infer("fake", inputs(STEPS=4, COUNT=4))
    answers.get(timeout=600)
    assert gate.entered.wait(600)
    stock.stop_stream(cancel_requests=True)
    until(lambda: bool(running.server.worker.admission._released))
    gate.open()
    until(lambda: running.server.worker.pending_images == 0)
    assert "decoder" not in {part for part, _ in running.fake.calls}


def test_timeouts_priorities_and_cancelling_reach_the_scheduler(running: Running, stock: triton.InferenceServerClient) -> None:
    set_cost(running.server.models.get(), "denoiser", 5000.0)
    with pytest.raises(InferenceServerException, match=r"DEADLINE_EXCEEDED.*the deadline is"):
        stock.infer("fake", inputs(), timeout=100_000)
    with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        stock.infer("fake", inputs(), client_timeout=0.5)
    gate = Gate(running.fake)
    call = stock.async_infer("fake", inputs(STEPS=4), lambda result, error: None, priority=1)
    until(lambda: running.server.worker.pending_images == 1)
    (job,) = running.server.worker.admission._jobs
    assert job.due < job.arrived + 2
    call.cancel()
    gate.open()
    until(lambda: running.server.worker.pending_images == 0)


def test_what_files_take_counts_against_the_timeout_where_they_are_asked_for(
    stock: triton.InferenceServerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageThreads, "expected_s", lambda *_: 100.0)
    with pytest.raises(InferenceServerException, match=r"DEADLINE_EXCEEDED.*the deadline is"):
        stock.infer("fake", inputs(), outputs=[triton.InferRequestedOutput("ENCODED")], timeout=60_000_000)
    assert stock.infer("fake", inputs(), outputs=[triton.InferRequestedOutput("IMAGES")], timeout=60_000_000)


@pytest.fixture
def sharing() -> Iterator[triton.InferenceServerClient]:
    with serving(FakeComponents(), Listen(port=0, shared_memory=True)) as running:
        client = triton.InferenceServerClient(running.address)
        yield client
        client.close()


def test_shared_memory_is_refused_without_its_option(stock: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="started without --shared-memory"):
        stock.register_system_shared_memory("in", "/flashdiff_none", 64)
    assert "system_shared_memory" not in stock.get_server_metadata().extensions


def test_tensors_go_through_shared_memory_both_ways(sharing: triton.InferenceServerClient) -> None:
    stock = sharing
    image_bytes = 64 * 64 * 3
    given = shm.create_shared_memory_region("in", "/flashdiff_test_in", 64)
    taken = shm.create_shared_memory_region("out", "/flashdiff_test_out", image_bytes)
    try:
        prompt = serialize_byte_tensor(np.array([b"a red car"], dtype=object))
        shm.set_shared_memory_region(given, [prompt])
        size = len(prompt.item())
        stock.register_system_shared_memory("in", "/flashdiff_test_in", 64)
        stock.register_system_shared_memory("out", "/flashdiff_test_out", image_bytes)
        assert set(stock.get_system_shared_memory_status().regions) == {"in", "out"}
        shared = triton.InferInput("PROMPT", [1], "BYTES")
        shared.set_shared_memory("in", size)
        images = triton.InferRequestedOutput("IMAGES")
        images.set_shared_memory("out", image_bytes)
        seed = tensor("SEED", "UINT64", 7)
        result = stock.infer("fake", [shared, seed], outputs=[images, triton.InferRequestedOutput("SEEDS")])
        assert result.get_output("IMAGES").parameters["shared_memory_byte_size"].int64_param == image_bytes
        expected = stock.infer("fake", inputs(SEED=7)).as_numpy("IMAGES")
        np.testing.assert_array_equal(shm.get_contents_as_numpy(taken, np.uint8, [1, 64, 64, 3]), expected)

        for wrong, message in ((65, "region 'in' has 64 bytes"), (size - 1, "not one element")):
            shared.set_shared_memory("in", wrong)
            with pytest.raises(InferenceServerException, match=message):
                stock.infer("fake", [shared])
        images.set_shared_memory("out", 100)
        with pytest.raises(InferenceServerException, match=f"the output takes {image_bytes} bytes"):
            stock.infer("fake", inputs(), outputs=[images])
        for name, key, count, message in (
            ("in", "/flashdiff_test_in", 64, "registered already"),
            ("x", "/../etc/passwd", 64, "must be the name of a shared memory object"),
            ("x", "/flashdiff_none", 64, "cannot open the shared memory object"),
            ("x", "/flashdiff_test_in", 65, "does not fit"),
        ):
            with pytest.raises(InferenceServerException, match=message):
                stock.register_system_shared_memory(name, key, count)
        Path("/dev/shm/flashdiff_test_in").write_bytes(b"")  # cut short: an error, not a signal
        shared.set_shared_memory("in", size)
        with pytest.raises(InferenceServerException, match="has become shorter"):
            stock.infer("fake", [shared])
        stock.unregister_system_shared_memory("in")
        with pytest.raises(InferenceServerException, match="register it first"):
            stock.infer("fake", [shared])
    finally:
        shm.destroy_shared_memory_region(given)
        shm.destroy_shared_memory_region(taken)


def test_a_region_for_outputs_that_is_not_there_is_said_before_images_are_made() -> None:
    images = triton.InferRequestedOutput("IMAGES")
    images.set_shared_memory("none", 100)
    with (
        serving(FakeComponents(), Listen(port=0, shared_memory=True)) as running,
        triton.InferenceServerClient(running.address) as stock,
    ):
        with pytest.raises(InferenceServerException, match="register it first"):
            stock.infer("fake", inputs(), outputs=[images])
        assert not running.fake.calls


def test_a_status_that_quotes_the_request_fits_its_trailers(stock: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="unexpected inference input '€€€") as caught:
        stock.infer("fake", [tensor("€" * 20_000, "UINT64", 7)])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_server_that_drains_is_live_and_not_ready(running: Running, stock: triton.InferenceServerClient) -> None:
    running.server.worker.drain()
    assert stock.is_server_live()
    assert not stock.is_server_ready()
    assert not stock.is_model_ready("fake")


def test_statistics_count_what_was_done(stock: triton.InferenceServerClient) -> None:
    stock.infer("fake", inputs(COUNT=3))
    with pytest.raises(InferenceServerException):
        stock.infer("fake", inputs(COUNT=99))
    (stats,) = stock.get_inference_statistics("fake").model_stats
    assert (stats.inference_count, stats.execution_count) == (3, 1)
    assert stats.inference_stats.success.count == 1
    assert stats.inference_stats.success.ns >= stats.inference_stats.compute_infer.ns > 0
    for name, version in (("none", ""), ("fake", "7")):
        with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):  # of all statuses, as Triton has it
            stock.get_inference_statistics(name, version)


def test_a_long_prompt_is_cut_where_a_parameter_says_so(running: Running, stock: triton.InferenceServerClient) -> None:
    long = [tensor("PROMPT", "BYTES", b"w " * 1000), tensor("SEED", "UINT64", 1)]
    with pytest.raises(InferenceServerException, match="at most 32 words fit"):
        stock.infer("fake", long)
    cut = stock.infer("fake", long, parameters={"truncate_prompt": True}).as_numpy("IMAGES")
    order = check_order(running.fake.spec, prompt=" ".join(["w"] * 32), seed=1)
    np.testing.assert_array_equal(cut[0], generate(FakeComponents(), [order])[0][0])
    with pytest.raises(InferenceServerException, match="truncate_prompt: 1 is not allowed; it must be true or false"):
        stock.infer("fake", long, parameters={"truncate_prompt": 1})
