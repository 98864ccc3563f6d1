"""Reading image files: clients take turns, a deadline ends it, and no exit waits for it."""

import asyncio
import threading

import numpy as np
import pytest
from served import PATIENCE_S

from flashdiff.errors import OverloadedError
from flashdiff.orders import Pixels
from flashdiff.server import image_threads
from flashdiff.server.image_threads import ImageThreads


def test_clients_are_read_in_turn_however_many_one_has_waiting() -> None:
    async def scenario() -> None:
        threads, go, read = ImageThreads(), threading.Event(), list[str]()
        held = asyncio.create_task(threads.read("greedy", go.wait, 60))
        await asyncio.sleep(0)
        greedy = [asyncio.create_task(threads.read("greedy", read.append, "greedy")) for _ in range(11)]
        await asyncio.sleep(0)
        late = [asyncio.create_task(threads.read(client, read.append, client)) for client in ("one", "two")]
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(held, *greedy, *late)
        assert read == ["greedy", "one", "two", *["greedy"] * 10]

    asyncio.run(scenario())


def test_a_reading_given_up_ends_at_once_and_what_the_thread_makes_of_it_is_dropped() -> None:
    async def scenario() -> None:
        threads, go, read = ImageThreads(), threading.Event(), list[str]()
        for function, arguments in ((go.wait, (60,)), (read.append, ("never begun",))):
            with pytest.raises(TimeoutError):  # the thread is held: only giving up can end this
                await asyncio.wait_for(threads.read("a", function, *arguments), 0.01)
        go.set()
        assert await threads.read("b", lambda: "b") == "b"
        assert read == []

    asyncio.run(scenario())


def test_a_reading_given_up_gives_its_place_back() -> None:
    async def scenario() -> None:
        threads, go = ImageThreads(), threading.Event()
        for _ in range(2):
            left = [asyncio.create_task(threads.read("a", go.wait, 60)) for _ in range(12)]
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError):
                await threads.read("a", int)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        go.set()
        assert await threads.read("a", int) == 0

    asyncio.run(scenario())


def test_an_error_of_the_reading_is_the_callers() -> None:
    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError):
            await ImageThreads().read("a", lambda: 1 // 0)

    asyncio.run(scenario())


def test_small_files_are_written_while_large_ones_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (np.zeros((side, side, 3), dtype=np.uint8) for side in (2048, 512))
    go = threading.Event()

    def encode(image: Pixels, *_: object) -> bytes:
        assert image is small or go.wait(PATIENCE_S)
        return b"file"

    async def scenario() -> None:
        threads = ImageThreads()
        waiting = [asyncio.create_task(threads.encode([large], "webp")) for _ in range(3)]
        waiting.append(asyncio.create_task(threads.run(go.wait, PATIENCE_S, size=large.size)))
        await asyncio.sleep(0)
        assert await asyncio.wait_for(threads.encode([small], "webp"), PATIENCE_S) == [b"file"]
        assert not any(task.done() for task in waiting)
        go.set()
        await asyncio.gather(*waiting)

    monkeypatch.setattr(image_threads, "encode_image", encode)
    asyncio.run(scenario())
