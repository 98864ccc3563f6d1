"""Mixed calls on every protocol at once: each is answered once and rightly, and nothing stays behind."""

import base64
import io
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import httpx2 as httpx
import numpy as np
import tritonclient.grpc as triton
from PIL import Image
from served import Process, until

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.generate import generate
from flashdiff.orders import Pixels
from flashdiff.server.client import Client, ServerError
from flashdiff.server.images import encode_image
from flashdiff.tasks import check_order

SCALE = int(os.environ.get("ATTACK_SCALE", "1"))
CALLS, THREADS, SEEDS = 40, 4, 5
"""Calls of each kind in a round of a thread."""

_JSON = {"content-type": "application/json"}
_SPEC = FakeComponents().spec
_IMAGE: Pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
_MASK: Pixels = np.zeros_like(_IMAGE)
_MASK[:32] = 255
_FILES = {"image": encode_image(_IMAGE, "png"), "mask": encode_image(_MASK, "png")}
_MADE = [generate(FakeComponents(), [check_order(_SPEC, prompt="x", seed=seed, steps=2)])[0][0] for seed in range(SEEDS)]
_EDITED = generate(FakeComponents(), [check_order(_SPEC, prompt="x", seed=1, steps=2, inputs={"image": _IMAGE, "mask": _MASK})])[
    0
][0]


class Caller:
    """One client of each protocol, and the calls that it makes; each says how it ended."""

    def __init__(self, grpc_address: str, http_port: int) -> None:
        self._client = Client(grpc_address, retries=False)
        self._triton = triton.InferenceServerClient(grpc_address)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=60)
        self._http_port = http_port

    def close(self) -> None:
        self._client.close()
        self._triton.close()
        self._http.close()

    def generates(self, seed: int) -> str:
        return _checked(self._client.generate("x", seed=seed, steps=2, timeout_s=60).images[0], _MADE[seed])

    def infers(self, seed: int) -> str:
        inputs = [triton.InferInput("PROMPT", [1], "BYTES"), triton.InferInput("SEED", [1], "UINT64")]
        inputs[0].set_data_from_numpy(np.array([b"x"], dtype=object))
        inputs[1].set_data_from_numpy(np.array([seed], dtype=np.uint64))
        steps = triton.InferInput("STEPS", [1], "INT32")
        steps.set_data_from_numpy(np.array([2], dtype=np.int32))
        answer = self._triton.infer("fake", [*inputs, steps], client_timeout=60)
        return "right" if np.array_equal(answer.as_numpy("IMAGES")[0], _MADE[seed]) else "wrong pixels"

    def posts(self, seed: int) -> str:
        answer = self._http.post("/v1/images/generations", json={"prompt": "x", "seed": seed, "steps": 2})
        return _checked(base64.b64decode(answer.json()["data"][0]["b64_json"]), _MADE[seed])

    def edits(self, seed: int) -> str:
        return _checked(self._client.generate("x", seed=1, steps=2, inputs=_FILES, timeout_s=60).images[0], _EDITED)

    def is_late(self, seed: int) -> str:
        try:
            self._client.generate("x", steps=4, count=16, timeout_s=0.0005)
        except ServerError as error:
            return "refused" if error.code.name == "DEADLINE_EXCEEDED" else error.code.name
        return "right"

    def leaves(self, seed: int) -> str:
        for _ in self._client.stream("x", steps=4, timeout_s=60):
            break  # which cancels the call
        return "right"

    def hangs_up(self, seed: int) -> str:
        body = b'{"prompt": "x", "n": 4}'
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self._http_port)) as connection:
            connection.sendall(head.encode() + body)
        return "right"

    def sends_garbage(self, seed: int) -> str:
        code = self._http.post("/v1/images/generations", content=b"{" * 1000, headers=_JSON).status_code
        return "refused" if code == 400 else str(code)

    def sends_a_broken_image(self, seed: int) -> str:
        try:
            self._client.generate("x", image=_FILES["image"][: 100 + seed], timeout_s=60)
        except ServerError as error:
            return "refused" if error.code.name == "INVALID_ARGUMENT" else error.code.name
        return "read a broken image"

    kinds: ClassVar[tuple[Callable[["Caller", int], str], ...]] = (
        generates, infers, posts, edits, is_late, leaves, hangs_up, sends_garbage, sends_a_broken_image
    )  # fmt: skip


def _checked(file: bytes, expected: Pixels) -> str:
    return "right" if np.array_equal(np.asarray(Image.open(io.BytesIO(file))), expected) else "wrong pixels"


def _round(address: str, http_port: int) -> Counter[tuple[str, str]]:
    """How many calls of each kind ended how."""

    def calls(_: int) -> Counter[tuple[str, str]]:
        caller, ended = Caller(address, http_port), Counter[tuple[str, str]]()
        for number in range(CALLS):
            for kind in Caller.kinds:
                ended[kind.__name__, kind(caller, number % SEEDS)] += 1
        caller.close()
        return ended

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(calls, range(THREADS)), Counter[tuple[str, str]]())


def test_mixed_calls_are_answered_and_leave_nothing_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file, Process("listen = Listen(port=0, http_port=0)", stderr=file) as server:
        until(lambda: "HTTP on" in log.read_text())
        ports = [line.rpartition(":")[2] for line in log.read_text().splitlines() if "serving fake" in line or "HTTP on" in line]
        address, http_port = f"127.0.0.1:{ports[0]}", int(ports[1])
        process = Path("/proc") / str(server.process.pid)

        def resident_mb() -> float:
            return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

        def descriptors() -> int:
            return len(list((process / "fd").iterdir()))

        names = [kind.__name__ for kind in Caller.kinds]
        expected = {(name, "refused" if name.startswith(("sends", "is_late")) else "right"): THREADS * CALLS for name in names}
        assert _round(address, http_port) == expected
        memory, files = resident_mb(), descriptors()
        for _ in range(SCALE):
            assert _round(address, http_port) == expected
        until(lambda: descriptors() <= files)
        assert resident_mb() < memory + 30
        server.signal(signal.SIGTERM)
        assert server.status() == 0
    assert "Traceback" not in log.read_text()
