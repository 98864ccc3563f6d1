"""Calls at once, by client: none is shut out, and those that send nothing make room first."""

import asyncio
from contextlib import ExitStack, suppress

import pytest

from flashdiff.errors import OverloadedError
from flashdiff.server.caps import Caps


class Clients:
    """Calls as tasks, each in its place until the test lets it leave."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self.caps, self.leave = Caps(most, most_of_one), asyncio.Event()
        self.tasks: list[asyncio.Task[str]] = []

    async def call(self, client: str, *, is_waiting: bool = True) -> "asyncio.Task[str]":
        async def hold() -> str:
            try:
                with self.caps.entered(client) as place:
                    place.is_waiting = is_waiting
                    await self.leave.wait()
                    return "answered"
            except OverloadedError as error:
                return str(error)

        task = asyncio.create_task(hold())
        self.tasks.append(task)
        for _ in range(5):
            await asyncio.sleep(0)
        return task


def test_a_newcomer_takes_the_place_of_a_waiting_call_of_the_client_with_most() -> None:
    async def scenario() -> None:
        clients = Clients(4, 4)
        working = [await clients.call("greedy", is_waiting=False), await clients.call("greedy", is_waiting=False)]
        waiting = [await clients.call("greedy"), await clients.call("greedy")]
        newcomer = await clients.call("modest")
        assert "took the place" in await waiting[0]
        assert not newcomer.done()
        refused = await clients.call("greedy")
        assert "4 calls are under way already" in await refused
        clients.leave.set()
        assert [await task for task in (*working, waiting[1], newcomer)] == 4 * ["answered"]

    asyncio.run(scenario())


def test_calls_at_work_are_never_ended_for_others_and_equals_do_not_displace_each_other() -> None:
    async def scenario() -> None:
        clients = Clients(2, 2)
        for client in ("a", "b"):
            await clients.call(client, is_waiting=client == "a")
        assert "2 calls are under way" in await (await clients.call("c"))
        clients = Clients(2, 2)
        for _ in range(2):
            await clients.call("a", is_waiting=False)
        assert "2 calls are under way" in await (await clients.call("b"))

    asyncio.run(scenario())


def test_one_client_never_has_all_and_gets_its_places_back() -> None:
    async def scenario() -> None:
        clients = Clients(4, 3)
        for _ in range(3):
            await clients.call("greedy", is_waiting=False)
        assert "3 calls of yours are under way already, at most 3 may be" in await (await clients.call("greedy"))
        assert not (await clients.call("modest")).done()
        clients.leave.set()
        await asyncio.gather(*clients.tasks)
        with ExitStack() as calls:
            for _ in range(3):
                calls.enter_context(clients.caps.entered("greedy"))

    asyncio.run(scenario())


def test_the_addresses_of_an_ipv6_network_are_one_client() -> None:
    async def scenario() -> None:
        caps = Caps(9, 1)
        with caps.entered("ipv6:[2001:db8::1]"), caps.entered("ipv6:%5B2001:db8:0:1::1%5D"):
            with pytest.raises(OverloadedError), caps.entered("ipv6:%5B2001:db8::2%5D"):
                pass
            with suppress(OverloadedError), caps.entered("ipv6:nonsense"):
                pass

    asyncio.run(scenario())


def test_a_call_that_its_own_client_cancels_is_cancelled() -> None:
    async def scenario() -> None:
        clients = Clients(1, 1)
        task = await clients.call("a")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
