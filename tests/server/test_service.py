"""The real server and the real client over a real port, with the fake backend."""

import asyncio
import gc
import io
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from orders import from_image
from PIL import Image
from ports import reserved_ports
from served import METHODS, MODEL, SIZE, Gate, Running, Tensors, intercept, message, model_of, set_cost, until

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import BackendError, ConfigError, OverloadedError, RequestError
from flashdiff.generate import generate
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server import image_threads
from flashdiff.server import loop as loop_module
from flashdiff.server import requests as requests_module
from flashdiff.server.app import Listen, serve, start
from flashdiff.server.client import AsyncClient, Client, ServerError
from flashdiff.server.images import decode_image, encode_image
from flashdiff.server.jobs import Job, Step
from flashdiff.server.models import Models
from flashdiff.server.names import ImageFormat
from flashdiff.server.replies import Preview, Result
from flashdiff.tasks import check_order


def test_a_reply_carries_images_seeds_timings_and_the_model(running: Running, client: Client) -> None:
    result = client.generate("a red car", seed=7, steps=2, size=Size(128, 64), count=3)
    order = check_order(running.fake.spec, prompt="a red car", seed=7, steps=2, size=Size(128, 64), count=3)
    expected = generate(FakeComponents(), [order])[0]
    for data, pixels in zip(result.images, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert (result.seeds, result.steps, result.size, result.model) == ((7, 8, 9), 2, (128, 64), MODEL)
    stages = ("queue", "text", "denoise", "decode", "image_encoding")
    assert result.timings["total"] == pytest.approx(sum(result.timings[stage] for stage in stages), rel=0.01, abs=0.01)


def test_defaults_are_the_models_and_the_drawn_seed_makes_the_image_again(client: Client) -> None:
    first = client.generate("x")
    assert (first.steps, first.size, len(first.images), first.format) == (4, (64, 64), 1, "png")
    assert client.generate("x", seed=first.seeds[0]).images == first.images
    assert client.generate("x").seeds != first.seeds


@pytest.mark.parametrize(("image_format", "loss"), [("png", 0), ("webp", 0), ("raw", 0), ("jpeg", 8)])
def test_every_format_decodes_to_the_pixels(client: Client, image_format: ImageFormat, loss: int) -> None:
    exact = np.asarray(Image.open(io.BytesIO(client.generate("x", seed=1).images[0]))).astype(int)
    data = client.generate("x", seed=1, image_format=image_format).images[0]
    raw = image_format == "raw"
    pixels = np.frombuffer(data, np.uint8).reshape(64, 64, 3) if raw else np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(pixels.astype(int) - exact).max() <= loss


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt: '' is not allowed; it must not be empty"),
        ({"prompt": "w " * 1000}, "at most 32 words fit"),
        ({"prompt": "w" * 500_000}, "500000 characters are more than 32 tokens can be"),
        ({"steps": 5}, "steps: 5 is not allowed; this model takes 1 to 4"),
        ({"width": 100, "height": 64}, "size: '100x64' is not allowed; this model was built for 64x64, 128x64"),
        ({"width": 64}, "size: '64x0' is not allowed"),
        ({"count": 1000000}, "count: 1000000 is not allowed; it must be between 1 and 16"),
        ({"model": "other"}, "model: 'other' is not allowed; this server has fake"),
        ({"negative_prompt": "dull"}, "negative_prompt: 'dull' is not allowed; this model runs without guidance"),
        ({"quality": 50}, "quality: 50 is not allowed; it must be 1 to 100, for JPEG or WebP, or 0"),
        ({"priority": 9}, "priority: 9 is not allowed; it must be one of PRIORITY_NORMAL"),
        ({"format": 77}, "format: 77 is not allowed; it must be one of IMAGE_FORMAT_UNSPECIFIED, IMAGE_FORMAT_PNG"),
    ],
)
def test_a_bad_field_is_invalid_argument_with_field_value_and_what_is_allowed(
    running: Running, fields: dict[str, object], message: str
) -> None:
    with grpc.insecure_channel(running.address) as channel:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(image_pb2.GenerateRequest(**{"prompt": "x", **fields}), timeout=10)
    expected = grpc.StatusCode.NOT_FOUND if "model" in fields else grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.code() == expected
    assert message in caught.value.details()
    assert len(caught.value.details()) < 400


def test_a_long_prompt_is_cut_where_the_request_says_so(running: Running, client: Client) -> None:
    words = "w " * 1000
    images = client.generate(words, seed=1, truncate_prompt=True).images
    assert images == client.generate(" ".join(["w"] * running.fake.spec.prompt_tokens), seed=1).images
    with pytest.raises(ServerError, match="at most 32 words fit"):
        client.generate(words, seed=1)  # whatever the text cache holds


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"steps": 0},
        {"steps": -1},
        {"count": 0},
        {"image_format": "gif"},
        {"strength": 0},
        {"noise_level": "20"},
        {"noise_level": 10**400},
        {"quality": 0},
        {"size": (0, 0)},
        {"size": (0, 64)},
        {"size": (64, -1)},
    ],
)
def test_a_value_that_no_request_can_carry_is_named_by_the_client(client: Client, changes: dict[str, object]) -> None:
    field = next(iter(changes)).removeprefix("image_")
    with pytest.raises(RequestError, match=rf"^{field}: .* is not allowed; it must be"):
        client.generate("x", **changes)  # type: ignore[arg-type]


def _file(name: str, width: int, height: int) -> bytes:
    """A picture of one colour to start from."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 90)).save(file, name)
    return file.getvalue()


@pytest.mark.parametrize("name", ["PNG", "WEBP", "JPEG"])
def test_a_request_may_bring_an_image_to_start_from(running: Running, client: Client, name: str) -> None:
    file = _file(name, 128, 80)
    result = client.generate("x", seed=3, steps=4, image=file, strength=0.5)
    assert [part for part, _ in running.fake.calls] == ["encoder", "text_encoder", "denoiser", "denoiser", "decoder"] or (
        [part for part, _ in running.fake.calls] == ["text_encoder", "encoder", "denoiser", "denoiser", "decoder"]
    )
    order = from_image(check_order(running.fake.spec, prompt="x", seed=3, steps=4), decode_image(file, SIZE), 0.5)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(result.images[0]))), generate(FakeComponents(), [order])[0][0])
    stages = ("queue", "text", "input_image", "denoise", "decode", "image_encoding")
    assert result.timings["total"] == pytest.approx(sum(result.timings[stage] for stage in stages), rel=0.01, abs=0.01)
    assert result.timings["input_image"] > 0
    assert result.images != client.generate("x", seed=3, steps=4).images


@pytest.mark.parametrize(
    ("image", "strength", "message"),
    [
        (b"GIF89a", 0.5, "image: '6 bytes' is not allowed; they must be a whole PNG, JPEG or WebP file"),
        (_file("PNG", 64, 64)[:80], 0.5, "they must be a whole PNG, JPEG or WebP file"),
        (_file("BMP", 64, 64), 0.5, "they must be a whole PNG, JPEG or WebP file"),
        (_file("PNG", 5000, 5000), 0.5, "image: '5000x5000' is not allowed; at most 16777216 pixels are read"),
        (_file("PNG", 64, 64), 1.5, "strength: 1.5 is not allowed; it must be above 0 and at most 1"),
        (b"", 0.5, "strength: 0.5 is not allowed; it needs an image"),
    ],
)
def test_a_bad_image_names_what_is_wrong(running: Running, image: bytes, strength: float, message: str) -> None:
    request = image_pb2.GenerateRequest(prompt="x", image=image, strength=strength)
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        image_pb2_grpc.ImageServiceStub(channel).Generate(request, timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()


def test_images_that_unpack_to_hours_of_work_or_gigabytes_are_refused() -> None:
    scans = io.BytesIO()
    Image.new("RGB", (64, 64)).save(scans, "JPEG", progressive=True)
    head, scan, tail = scans.getvalue().rpartition(b"\xff\xda")
    with pytest.raises(RequestError, match="a JPEG may have 100 scans"):
        decode_image(head + 200 * (scan + tail[:-2]) + tail[-2:], SIZE)
    header = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(header, "PNG")
    with pytest.raises(RequestError, match="at most 16777216 pixels are read"):
        decode_image(header.getvalue(), SIZE)


@pytest.mark.parametrize(("limit", "whose"), [("_MAX_READING", ""), ("_MAX_READING_OF_ONE", " of yours")])
def test_images_beyond_those_that_can_be_read_at_once_are_refused(
    limit: str, whose: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_threads, limit, 0)
    with Client(running.address, retries=False) as client:
        with pytest.raises(ServerError, match=f"RESOURCE_EXHAUSTED: 0 images{whose} are being read already"):
            client.generate("x", image=_file("PNG", 64, 64), timeout_s=10)
        assert client.generate("x", timeout_s=10).images


async def _reading(encoders: image_threads.ImageThreads, client: str) -> None:
    await encoders.read(client, lambda: None)


def test_one_client_leaves_room_for_the_images_of_another_and_gets_its_own_back() -> None:
    async def read() -> None:
        encoders, go = image_threads.ImageThreads(), threading.Event()
        of_one = [asyncio.create_task(encoders.read("one", go.wait, 10)) for _ in range(12)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="12 images of yours are being read already"):
            await _reading(encoders, "one")
        of_others = [asyncio.create_task(_reading(encoders, f"other {number % 2}")) for number in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="16 images are being read already"):
            await _reading(encoders, "another")
        go.set()
        await asyncio.gather(*of_one, *of_others)
        for _ in range(12):
            await _reading(encoders, "one")

    asyncio.run(read())


def test_a_refused_image_of_a_megabyte_is_sent_again(running: Running, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    file = encode_image(noise, "png")
    assert len(file) > 1_000_000
    read, tries = image_threads.ImageThreads.read, list[int]()

    async def refuse_twice(self: image_threads.ImageThreads, *arguments: Any) -> Any:
        tries.append(len(tries))
        if len(tries) < 3:
            raise OverloadedError("no room", retry_after_s=0.01)
        return await read(self, *arguments)

    monkeypatch.setattr(image_threads.ImageThreads, "read", refuse_twice)
    assert client.generate("x", image=file, timeout_s=60).images
    assert len(tries) == 3


def test_a_photo_is_turned_upright_and_fills_the_size() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was held upright
    picture = Image.new("RGB", (300, 200), "blue")
    picture.paste("red", (0, 0, 150, 200))  # left in the file, the upper half when upright
    picture.save(file, "JPEG", exif=exif, quality=95)
    seen = decode_image(file.getvalue(), Size(64, 64)).astype(int)
    assert seen.shape == (64, 64, 3)
    assert np.abs(seen[:28] - (255, 0, 0)).max() < 20
    assert np.abs(seen[36:] - (0, 0, 255)).max() < 20


def test_a_stream_shows_every_step_and_ends_with_the_result_of_the_plain_call(client: Client) -> None:
    updates = list(client.stream("a red car", seed=3, steps=3, count=2))
    *previews, result = updates
    assert all(isinstance(preview, Preview) for preview in previews)
    assert [(p.image, p.step, p.steps) for p in previews if isinstance(p, Preview)] == [
        (i, s, 3) for s in (1, 2, 3) for i in (0, 1)
    ]
    assert isinstance(result, Result)
    assert result.images == client.generate("a red car", seed=3, steps=3, count=2).images
    last = previews[-1]
    assert isinstance(last, Preview)
    picture = np.asarray(Image.open(io.BytesIO(last.png))).astype(int)
    image = np.asarray(Image.open(io.BytesIO(result.images[1]))).astype(int)
    assert picture.shape == (8, 8, 3)
    assert np.abs(picture - image[::8, ::8]).max() <= 1


def test_a_stream_left_half_way_frees_its_rows(running: Running, client: Client) -> None:
    gate = Gate(running.fake, "denoiser", after=1)
    for update in client.stream("x", steps=4):
        assert isinstance(update, Preview)
        assert gate.entered.wait(600)
        break
    until(lambda: bool(running.server.worker.admission._released))
    gate.open()
    until(lambda: running.server.worker.pending_images == 0)
    assert "decoder" not in {part for part, _ in running.fake.calls}


def test_a_stream_that_is_not_read_keeps_room_for_a_while_only(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "_SENDING_S", 0.1)
    worker, model = running.server.worker, running.server.models.get()

    async def read_one_step() -> None:
        requests = requests_module.Requests(worker, running.server.models)
        updates = requests.serve(model, requests_module.ImageRequest(prompt="x", wants_steps=True), "")
        assert isinstance(await anext(updates), Step)
        while worker.pending_images or worker.has_unsent:
            await asyncio.sleep(0.01)
        assert isinstance([update async for update in updates][-1], requests_module.Reply)  # for a client that reads on

    asyncio.run_coroutine_threadsafe(read_one_step(), running.loop).result(600)


def test_a_client_gives_up_on_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, Client(f"127.0.0.1:{silent.getsockname()[1]}") as client:
        for ask in (lambda: client.models(timeout_s=0.2), lambda: client.estimate("x", timeout_s=0.2)):
            with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
                ask()


def test_a_refused_stream_has_the_status_of_the_plain_call(client: Client) -> None:
    with pytest.raises(ServerError, match="INVALID_ARGUMENT: steps: 9"):
        list(client.stream("x", steps=9))


def test_models_are_listed_and_an_estimate_is_what_admission_would_say(running: Running, client: Client) -> None:
    assert client.models() == ["fake"]
    set_cost(running.server.models.get(), "denoiser", 100.0)
    assert client.estimate("x", steps=4).expected_ms == pytest.approx(400, abs=20)
    with pytest.raises(ServerError, match="INVALID_ARGUMENT: steps: 9"):
        client.estimate("x", steps=9)


def test_the_asyncio_client_does_the_same(running: Running, client: Client) -> None:
    async def scenario() -> None:
        async with AsyncClient(running.address) as other:
            await other.wait_until_ready(600)
            assert await other.models() == client.models()
            result = await other.generate("x", seed=5)
            assert result.images == client.generate("x", seed=5).images
            updates = [update async for update in other.stream("x", seed=5, steps=2)]
            assert len(updates) == 3
            with pytest.raises(ServerError, match="NOT_FOUND"):
                await other.generate("x", model="none")

    asyncio.run(scenario())


def test_waiting_for_a_server_that_is_not_there_ends() -> None:
    async def scenario() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            await client.wait_until_ready(0.05)

    with pytest.raises(ServerError, match=r"UNAVAILABLE: no server answered within 0\.05 s"):
        asyncio.run(scenario())
    with Client("127.0.0.1:1") as blocking, pytest.raises(ServerError, match="UNAVAILABLE: no server answered"):
        blocking.wait_until_ready(0.05)


def test_quality_makes_files_smaller(running: Running, client: Client) -> None:
    noise = np.random.default_rng(0).standard_normal((3, 64, 64), dtype=np.float32)
    intercept(running.fake, "decoder", lambda call, inputs: {"images": call(inputs)["images"] + noise})
    for image_format in ("jpeg", "webp"):
        small, large = (len(client.generate("x", image_format=image_format, quality=q).images[0]) for q in (20, None))  # type: ignore[arg-type]
        assert small < large / 2


def test_deadlines_failures_and_overload_have_their_own_status(running: Running, client: Client) -> None:
    set_cost(running.server.models.get(), "denoiser", 5000.0)
    with pytest.raises(ServerError, match="DEADLINE_EXCEEDED: this can be promised in about") as caught:
        client.generate("x", timeout_s=5)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    running.fake.fail_on = "decoder"
    with pytest.raises(ServerError, match="INTERNAL: the fake decoder failed"):
        client.generate("x")
    running.server.worker.admission._max_pending_images = 0
    with pytest.raises(ServerError, match="RESOURCE_EXHAUSTED: the queue is full"):
        client.generate("x")


def test_a_cancelled_call_frees_its_rows(running: Running) -> None:
    gate = Gate(running.fake)
    with grpc.insecure_channel(running.address) as channel:
        call = image_pb2_grpc.ImageServiceStub(channel).Generate.future(image_pb2.GenerateRequest(prompt="x", steps=4, count=4))
        assert gate.entered.wait(600)
        call.cancel()
        until(lambda: bool(running.server.worker.admission._released))
        gate.open()
        until(lambda: running.server.worker.pending_images == 0)
    assert "decoder" not in {part for part, _ in running.fake.calls}


def test_stopping_answers_what_was_accepted_and_refuses_the_rest(running: Running, client: Client) -> None:
    gate = Gate(running.fake)
    with ThreadPoolExecutor(2) as threads:
        accepted = threads.submit(client.generate, "x", steps=4)
        assert gate.entered.wait(600)
        stopping = threads.submit(running.stop)
        until(lambda: not running.server.worker.is_ready)
        gate.open()
        assert len(accepted.result(600).images) == 1
        stopping.result(600)
    with pytest.raises(ServerError, match="UNAVAILABLE"):
        client.generate("x", timeout_s=5)


def test_an_answered_request_leaves_nothing_behind(running: Running, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels above all: a server that keeps each for half a minute grows with its load."""
    worker, jobs = running.server.worker, weakref.WeakSet[Job]()
    submit = worker.submit

    def noted(*arguments: Any, **options: Any) -> Job:
        job = submit(*arguments, **options)
        jobs.add(job)
        return job

    monkeypatch.setattr(worker, "submit", noted)
    client.generate("x", timeout_s=10)
    assert len(list(client.stream("y", steps=2, timeout_s=10))) == 3

    def is_clean() -> bool:
        gc.collect()
        return not jobs and not worker.has_unsent

    until(is_clean)


def test_stopping_does_not_wait_for_clients_that_only_watch(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        running.stop(grace_s=1e6)  # which would time out here, were the watcher waited for
        assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_health_and_reflection_name_the_service(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "flashdiff.v1.ImageService", "inference.GRPCInferenceService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"flashdiff.v1.ImageService", "inference.GRPCInferenceService"} <= set(database.get_services())
        reflected = DescriptorPool(database)
        generate = reflected.FindServiceByName("flashdiff.v1.ImageService").methods_by_name["Generate"]
        assert generate.input_type.fields_by_name["prompt"].number == 1
        infer = reflected.FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelInfer"]
        assert infer.output_type.full_name == "inference.ModelInferResponse"


def test_a_port_in_use_is_said(running: Running) -> None:
    starting = start(Models({"fake": model_of(running.fake)}), Listen(port=running.server.port))
    with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{running.server.port}: the port is in use"):
        asyncio.run_coroutine_threadsafe(starting, running.loop).result(600)


@pytest.mark.parametrize(
    ("host", "problem"), [("192.0.2.1", "this machine has no such address"), ("no.such.host.invalid", "choose another --host")]
)
def test_an_address_that_is_not_this_machines_is_said(running: Running, host: str, problem: str) -> None:
    starting = start(Models({"fake": model_of(running.fake)}), Listen(host=host, port=0, no_auth=True))
    with pytest.raises(ConfigError, match=rf"cannot listen on {host}:0: .*{problem}"):
        asyncio.run_coroutine_threadsafe(starting, running.loop).result(600)


@pytest.mark.parametrize("name", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_a_proxy_is_not_asked_for_a_server_of_this_machine(running: Running, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with Client(running.address, retries=False) as client:
        assert client.generate("a red car", steps=1, timeout_s=20).images


@pytest.mark.slow
def test_a_client_that_pings_every_five_seconds_keeps_its_stream(running: Running) -> None:
    """Clients behind proxies do; gRPC ends the connection of a client that pings more often than its server allows."""
    gate = Gate(running.fake)
    options = [("grpc.keepalive_time_ms", 5000), ("grpc.http2.max_pings_without_data", 0)]
    with grpc.insecure_channel(running.address, options) as channel:
        call = image_pb2_grpc.ImageServiceStub(channel).GenerateStream(image_pb2.GenerateRequest(prompt="a red car", steps=1))
        assert gate.entered.wait(600)
        time.sleep(26)  # five pings; the third too many would be the last
        gate.open()
        assert [update.WhichOneof("update") for update in call][-1] == "result"


@pytest.mark.parametrize(("hangs", "why"), [(False, "division by zero"), (True, "has not come back")])
def test_a_device_thread_that_is_lost_ends_the_server_and_every_call_in_flight(
    monkeypatch: pytest.MonkeyPatch, hangs: bool, why: str
) -> None:
    fake, all_are_here, over = FakeComponents(), threading.Event(), threading.Event()
    models = Models({"fake": model_of(fake)})

    def encode_later(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        assert all_are_here.wait(600)
        return call(inputs)

    def denoise(*_: object) -> float:
        if hangs:
            over.wait(600)
        return 1 / 0

    intercept(fake, "text_encoder", encode_later)
    intercept(fake, "denoiser", denoise)

    async def scenario(port: int) -> None:
        serving = asyncio.create_task(serve(models, Listen(port=port)))
        async with AsyncClient(f"127.0.0.1:{port}") as client, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
            calls = [channel.stream_stream(f"/{method}")(iter([message(method)])) for method in METHODS[:3]]
            while (await client.estimate("x")).pending_images < len(calls):
                await asyncio.sleep(0.01)
            if hangs:
                monkeypatch.setattr(loop_module, "HANG_S", 0.1)
            all_are_here.set()
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            for call in calls:
                assert await call.code() == grpc.StatusCode.INTERNAL
                assert why in await call.details()
        await serving

    with reserved_ports(1) as (port,), pytest.raises(BackendError, match=f"the device thread has stopped: .*{why}"):
        asyncio.run(asyncio.wait_for(scenario(port), 90))
    over.set()
