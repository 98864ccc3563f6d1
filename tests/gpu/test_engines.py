"""What needs an NVIDIA GPU: captured CUDA graphs, TensorRT and ONNX Runtime's CUDA provider. Run with -m gpu."""

import threading
from pathlib import Path

import numpy as np
import pytest
from tiny import FAMILIES

from flashdiff.components import Size
from flashdiff.engines.backends import BACKENDS, find_backend
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import BackendName
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.device import parse_devices
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.engines.runtime.machine import count_gpus
from flashdiff.errors import BackendError
from flashdiff.generate import generate
from flashdiff.orders import Order
from flashdiff.server.fleet import Fleet
from flashdiff.server.opening import open_model
from flashdiff.tasks import check_order

pytestmark = pytest.mark.gpu


def _needs(name: BackendName) -> None:
    backend = find_backend(name)
    try:
        backend.import_modules()
        backend.check_runs()
    except BackendError as error:
        pytest.skip(str(error))
    if not backend.uses_gpu():
        pytest.skip(f"{name} as installed does not run on a GPU")


def _orders(engine: Engine, count: int = 2) -> list[Order]:
    return [check_order(engine.spec, prompt=f"prompt {index}", seed=index, steps=2) for index in range(count)]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8", "bf16 compiled"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_family_passes_the_gate_on_the_gpu_and_repeats_itself(
    family: str, tmp_path: Path, backend: BackendName, precision: str
) -> None:
    _needs(backend)
    base, sizes = FAMILIES[family](tmp_path / family), (Size(32, 32), Size(48, 32))
    precision, is_compiled = precision.removesuffix(" compiled"), precision.endswith(" compiled")
    is_quantized, prompts = precision in ("int8", "fp8"), tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    options = BuildOptions(
        base=str(base),
        out=tmp_path / "b",
        backend=backend,
        precision=precision,
        compile=is_compiled,
        batch_sizes=(2, 4),
        sizes=sizes[: 1 if is_quantized else 2],
        calibration_prompts=prompts if is_quantized else None,
    )
    try:
        plan_build(options)
    except BackendError as error:
        pytest.skip(str(error))  # it does not have this precision, or compiles nothing
    manifest = build_engine(options, print)  # verified against torch, graphs captured and replayed
    assert manifest.machine.device == "cuda"
    engine = open_bundle(tmp_path / "b")
    for first, second in zip(generate(engine, _orders(engine)), generate(engine, _orders(engine)), strict=True):
        np.testing.assert_array_equal(first[0], second[0])


@pytest.fixture
def torch_engine(tiny_base: Path, tmp_path: Path) -> Engine:
    build_engine(BuildOptions(base=str(tiny_base), out=tmp_path / "b", backend="torch", batch_sizes=(1, 2, 4)), print)
    return open_bundle(tmp_path / "b")


def test_outputs_of_a_replayed_graph_belong_to_the_caller(torch_engine: Engine) -> None:
    shape = torch_engine.spec.latent_shape(torch_engine.spec.sizes[0])
    latents = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    first = torch_engine.call("decoder", {"latents": latents})["images"]
    kept = first.copy()
    torch_engine.call("decoder", {"latents": -latents})
    np.testing.assert_array_equal(first, kept)


def test_a_row_at_one_batch_size_is_the_same_in_any_place_and_company(torch_engine: Engine) -> None:
    orders = _orders(torch_engine, 4)
    together = generate(torch_engine, orders)
    turned = generate(torch_engine, [orders[0], *orders[:0:-1]])  # the first stays, the others change places
    for index, order in enumerate((orders[0], *orders[:0:-1])):
        np.testing.assert_array_equal(turned[index][0], together[orders.index(order)][0])


def test_decoding_in_another_thread_changes_nothing_on_either_side(torch_engine: Engine) -> None:
    assert torch_engine.parallel_decode
    shape = torch_engine.spec.latent_shape(torch_engine.spec.sizes[0])
    latents, times = np.random.default_rng(0).standard_normal((4, *shape), dtype=np.float32), np.array([999, 749, 499, 249])
    conditioning = torch_engine.call("text_encoder", torch_engine.tokenize(["a", "b", "c", "d"]))
    given = {"latents": latents, "times": times, **conditioning}
    images = torch_engine.call("decoder", {"latents": latents})["images"]
    output = torch_engine.call("denoiser", given)["output"]
    differing: list[int] = []

    def decode_again_and_again() -> None:
        for turn in range(200):
            if not np.array_equal(torch_engine.call("decoder", {"latents": latents})["images"], images):
                differing.append(turn)

    decoding = threading.Thread(target=decode_again_and_again)
    decoding.start()
    while decoding.is_alive():
        np.testing.assert_array_equal(torch_engine.call("denoiser", given)["output"], output)
    decoding.join()
    assert not differing


def test_a_model_is_opened_while_another_runs(torch_engine: Engine, tmp_path: Path) -> None:
    expected, ended, failed = generate(torch_engine, _orders(torch_engine)), threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not ended.is_set():
                for made, wanted in zip(generate(torch_engine, _orders(torch_engine)), expected, strict=True):
                    np.testing.assert_array_equal(made[0], wanted[0])
        except BaseException as error:
            failed.append(error)

    running = threading.Thread(target=run)
    running.start()
    try:
        open_bundle(tmp_path / "b").measure_buckets()
    finally:
        ended.set()
        running.join()
    assert not failed


@pytest.mark.skipif(count_gpus() < 2, reason="two devices need two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gpus_of_one_process_make_the_same_pixels_side_by_side(tiny_base: Path, tmp_path: Path, backend: BackendName) -> None:
    _needs(backend)
    build_engine(BuildOptions(base=str(tiny_base), out=tmp_path / "b", backend=backend, batch_sizes=(1, 2)), print)
    devices = parse_devices("0,1")
    model, fleet = open_model(tmp_path / "b", devices), Fleet(devices)
    orders = [check_order(model.components.spec, prompt=f"prompt {seed}", seed=seed, steps=2) for seed in range(16)]
    jobs = [fleet.submit(model, order) for order in (*orders, *orders)]
    answers = [job.answer.result(300) for job in jobs]
    for job in jobs:
        fleet.release(job)
    fleet.drain()
    assert fleet.join(600)
    assert {answer.device for answer in answers} == {"cuda:0", "cuda:1"}
    for first, second in zip(answers[:16], answers[16:], strict=True):
        np.testing.assert_allclose(np.asarray(first.images, int), np.asarray(second.images, int), atol=2)  # by other batches
