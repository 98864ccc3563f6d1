"""How many calls there may be at once, and how many of one client, so that no client shuts out another."""

import asyncio
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import unquote

from flashdiff.errors import OverloadedError


class Place:
    """A call that has a place."""

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self.is_waiting = True
        """For a message of its client: such a call may lose its place to another client's."""
        self.is_lost = False

    def lose(self) -> None:
        """Cancel the call, so that another client's call gets its place."""
        self.is_lost = True
        if self._task:
            self._task.cancel()


class Caps:
    """The calls under way, by client; an event loop calls the methods."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._places: dict[str, list[Place]] = {}
        self._count = 0

    @contextmanager
    def entered(self, client: str) -> Iterator[Place]:
        """A place for the call of the current task, within the block; OverloadedError when there is none.

        When all are taken, the client with most of them loses one where the server waits for a message, if it has more than
        the newcomer. A call that loses its place is cancelled, and ends with an OverloadedError here.
        """
        client = network_of(client)
        self._make_room(client)
        place = Place()
        self._places.setdefault(client, []).append(place)
        self._count += 1
        try:
            yield place
        except asyncio.CancelledError:
            if not place.is_lost:
                raise
            raise OverloadedError("another client's call took the place of this one, which had sent no message") from None
        finally:
            self._leave(client, place)

    def _make_room(self, client: str) -> None:
        own = len(self._places.get(client, ()))
        if own >= self._most_of_one:
            raise OverloadedError(f"{own} calls of yours are under way already, at most {self._most_of_one} may be")
        if self._count < self._most:
            return
        greediest = max(self._places, key=lambda name: len(self._places[name]))
        of_greediest = self._places[greediest]
        lost = next((place for place in of_greediest if place.is_waiting), None)
        if lost is None or len(of_greediest) <= own + 1:
            raise OverloadedError(f"{self._count} calls are under way already, at most {self._most} may be")
        self._leave(greediest, lost)
        lost.lose()

    def _leave(self, client: str, place: Place) -> None:
        places = self._places.get(client, [])
        if place in places:
            places.remove(place)
            self._count -= 1
        if not places:
            self._places.pop(client, None)


@lru_cache(1000)
def network_of(client: str) -> str:
    """The same for an address over every protocol, and for all of one IPv6 network: a client has as many of these as it likes."""
    text = unquote(client.removeprefix("ipv4:").removeprefix("ipv6:")).strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return client  # the name of a token
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
