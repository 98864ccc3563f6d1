"""How a server process starts, takes signals and ends: real processes, with the fake model."""

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from served import Process

from flashdiff.errors import ConfigError
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError
from flashdiff.server.replies import Result

HELD = """
opener = lambda: served_by(model_of(fake))
def served_by(model):
    hold()
    return Models({"fake": model})
def hold():
    def held(name, rows):
        print("the device is held", file=sys.stderr, flush=True)
        threading.Event().wait()
    fake._called = held
"""
"""No device call comes back, once the model is opened."""


def _asking(address: str, pool: ThreadPoolExecutor) -> "Future[Result]":
    def ask() -> Result:
        with Client(address, retries=False) as client:
            return client.generate("x", timeout_s=600)

    return pool.submit(ask)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_status_is_0(number: signal.Signals) -> None:
    with Process() as server, Client(server.address()) as client:
        client.wait_until_ready(600)
        assert client.generate("x", timeout_s=60).images
        server.signal(number)
        assert server.status() == 0
        assert "stopped" in "".join(server.lines)


def test_a_drain_that_runs_out_of_time_ends_with_0_though_the_device_and_a_thread_never_come_back() -> None:
    stuck_thread = 'threading.Thread(target=threading.Event().wait, name="never joined").start()\n'
    drain = "listen = Listen(port=0, drain_s=0.1)\n"
    with ThreadPoolExecutor() as pool, Process(HELD + drain + stuck_thread) as server:
        answer = _asking(server.address(), pool)
        server.read_until("the device is held")
        server.signal(signal.SIGTERM)
        assert server.status() == 0
        with pytest.raises(ServerError):
            answer.result(600)


def test_a_second_signal_shortens_the_drain() -> None:
    with ThreadPoolExecutor() as pool, Process(HELD + "listen = Listen(port=0, drain_s=3600.0)") as server:
        answer = _asking(server.address(), pool)
        server.read_until("the device is held")
        server.signal(signal.SIGTERM)
        server.read_until("draining")
        server.signal(signal.SIGTERM)
        assert server.status() == 0
        with pytest.raises(ServerError):
            answer.result(600)


def test_a_device_that_fails_ends_the_process_with_1_and_one_line() -> None:
    setup = HELD.replace("threading.Event().wait()", 'raise SystemError("the engine is gone")')
    with ThreadPoolExecutor() as pool, Process(setup) as server:
        answer = _asking(server.address(), pool)
        assert server.status() == 1
        assert server.lines[-1] == "flashdiff: error: the device thread has stopped: the engine is gone\n"
        with pytest.raises(ServerError, match="INTERNAL: the device thread has stopped"):
            answer.result(600)


OPENING = """
def opener():
    print("opening", file=sys.stderr, flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_a_model_opens_ends_the_process_at_once(number: signal.Signals, status: int) -> None:
    with Process(OPENING) as server:
        server.read_until("opening")
        server.signal(signal.SIGHUP)  # and this one ends nothing
        server.signal(number)
        assert server.status() == status


def test_a_hangup_reads_the_tokens_again_and_kills_nothing(tmp_path: Path) -> None:
    old, new = "alice-secret-0123456", "bob-secret-012345678"
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {old}\n")
    stamp = tokens.stat()
    with Process(f"listen = Listen(port=0, tokens=Path({str(tokens)!r}))") as server:
        address = server.address()
        with Client(address, token=old) as client:
            client.wait_until_ready(600)
            assert client.generate("x", timeout_s=60).images
        tokens.write_text(f"bob {new}\n")
        os.utime(tokens, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        server.signal(signal.SIGHUP)
        server.read_until("1 tokens read")
        with Client(address, token=new) as client:
            assert client.generate("x", timeout_s=60).images
        server.signal(signal.SIGTERM)
        assert server.status() == 0


def test_a_hangup_without_tokens_is_no_reason_to_end() -> None:
    with Process() as server, Client(server.address()) as client:
        server.signal(signal.SIGHUP)
        client.wait_until_ready(600)
        assert client.generate("x", timeout_s=60).images
        server.signal(signal.SIGTERM)
        assert server.status() == 0


def test_a_log_that_nothing_reads_holds_up_no_call_and_no_exit() -> None:
    with Process() as server:
        with Client(server.address()) as client:
            for _ in range(1000):  # lines of 150 bytes each, into a pipe of 64 KiB
                client.models(timeout_s=60)
        server.signal(signal.SIGTERM)
        assert server.process.wait(600) == 0


def test_a_server_that_leaves_still_answers_until_its_delay_is_over_and_a_second_signal_cuts_it_short() -> None:
    with Process("listen = Listen(port=0, drain_delay_s=3600.0)") as server, Client(server.address(), retries=False) as client:
        client.wait_until_ready(600)
        server.signal(signal.SIGTERM)
        server.read_until("leaving")
        assert client.generate("x", timeout_s=60).images
        server.signal(signal.SIGTERM)
        assert server.status() == 0
        assert "draining" in "".join(server.lines)


def test_a_draining_server_sends_its_clients_elsewhere_and_answers_what_it_accepted() -> None:
    """Its connections take no new calls, so that a client with two addresses uses the other one."""
    held_a_while = HELD.replace("threading.Event().wait()", 'print("held", file=sys.stderr, flush=True); sys.stdin.readline()')
    patient = "import flashdiff.server.loop as loop\nloop.HANG_S = 3600.0\nlisten = Listen(port=0, drain_s=3600.0)\n"
    with ThreadPoolExecutor() as pool, Process(held_a_while + patient, stdin=subprocess.PIPE) as first, Process() as second:
        addresses = f"ipv4:{first.address()},{second.address()}"
        answer = _asking(addresses, pool)  # to the first: without a policy, gRPC takes the first address that answers
        first.read_until("held")
        with Client(addresses) as client:  # whose retries, over in some seconds, a connection that stayed would outlast
            client.wait_until_ready(600)
            first.signal(signal.SIGTERM)
            first.read_until("draining")
            assert client.generate("y", timeout_s=600).images
        assert first.process.stdin
        for _ in range(100):  # device calls
            first.process.stdin.write("\n")
        first.process.stdin.flush()
        assert answer.result(600).images
        assert first.status() == 0


def test_drain_and_age_are_seconds() -> None:
    for option in ({"drain_s": -1.0}, {"drain_delay_s": float("nan")}, {"max_connection_age_s": 0.5}, {"drain_s": float("inf")}):
        with pytest.raises(ConfigError, match="give seconds from"):
            Listen(**option)  # type: ignore[arg-type]


def test_no_exit_waits_for_a_file_that_is_being_read() -> None:
    code = """
import asyncio, contextlib, threading
from flashdiff.server.image_threads import ImageThreads
async def scenario():
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ImageThreads().read("a", threading.Event().wait), 0.01)
asyncio.run(scenario())
print("out")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "out\n"


def test_a_server_without_a_device_left_ends_with_status_1() -> None:
    setup = """
from flashdiff.engines.runtime.device import Device
from flashdiff.server.models import Model
from served import MODEL, intercept
devices = [Device(name="fake:0"), Device(name="fake:1")]
other = FakeComponents()
def opener():
    model = Model(MODEL, fake, fake.costs, devices[0], [Model(MODEL, other, other.costs, devices[1])])
    for each in (fake, other):
        intercept(each, "denoiser", lambda call, inputs: 1 / 0)
    return Models({"fake": model}, devices=devices)
"""
    with Process(setup) as process:
        with Client(process.address()) as client, pytest.raises(ServerError, match="the device thread has stopped"):
            client.generate("x", timeout_s=60)
        assert process.status() == 1
        assert sum("is out: division by zero" in line for line in process.lines) == 2
        assert any(line.startswith("flashdiff: error: the device thread has stopped") for line in process.lines)
