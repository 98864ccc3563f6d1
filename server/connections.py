"""The connections to the server's ports, by client address: one address must not take all descriptors of the process.

gRPC has no limit for one peer, so the sockets are found through /proc, those of HTTP and metrics as well; without /proc nothing
is limited.
"""

import contextlib
import os
import resource
import socket
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator

from flashdiff.server.caps import network_of

MOST, MOST_OF_ONE = 4000, 1000
"""Connections at once, and of one address."""

_ENOUGH_FILES = 2 * MOST  # descriptors of the process, if the system lets it have them
_FEW_FILES = 200  # below so many open files nothing is looked at
_ESTABLISHED, _LAST_DATA = 1, 52  # in Linux's tcp_info: the state, and where the milliseconds since data came in stand


def raise_file_limit() -> None:
    """Let the process have as many descriptors as its connections may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def close_excess(ports: Collection[int], most: int = 0, most_of_one: int = 0) -> int:
    """Close connections beyond the limits, the longest silent of the addresses with most; how many were closed.

    The limits are what the process's descriptors allow: half of them for connections, and an eighth for those of one address.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most, most_of_one = most or min(MOST, soft // 2), most_of_one or min(MOST_OF_ONE, soft // 8)
    if len(_open_files()) < min(_FEW_FILES, most_of_one):
        return 0
    closed = 0
    with contextlib.ExitStack() as stack:
        by_address: dict[str, list[socket.socket]] = defaultdict(list)
        for address, connection in _connections(ports):
            by_address[network_of(address)].append(stack.enter_context(connection))
        for of_one in by_address.values():
            of_one.sort(key=_silent_ms)
        count = sum(map(len, by_address.values()))
        while by_address:
            address = max(by_address, key=lambda name: len(by_address[name]))
            if len(by_address[address]) <= most_of_one and count <= most:
                break
            with contextlib.suppress(OSError):
                by_address[address].pop().shutdown(socket.SHUT_RDWR)  # its owner closes it then
            closed, count = closed + 1, count - 1
    return closed


def _open_files() -> list[str]:
    try:
        return os.listdir("/proc/self/fd")
    except OSError:
        return []


def _connections(ports: Collection[int]) -> Iterator[tuple[str, socket.socket]]:
    """The address of each connection that the process accepted at the ports, and a copy of its socket."""
    seen = set()  # a copy may have the number of a descriptor that was listed
    for name in _open_files():
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile
            continue
        peer = _peer(connection, ports)
        if peer and peer not in seen:
            seen.add(peer)
            yield peer[1], connection
        else:
            connection.close()


def _peer(connection: socket.socket, ports: Collection[int]) -> tuple[int, str, int] | None:
    """The port, address and port of the client of a connection to the ports; None for any other socket."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        port = connection.getsockname()[1]
        is_ours = port in ports and _tcp_info(connection)[0] == _ESTABLISHED
        address, client_port = connection.getpeername()[:2]
        return (port, address, client_port) if is_ours else None
    except OSError:
        return None


def _silent_ms(connection: socket.socket) -> int:
    return int.from_bytes(_tcp_info(connection)[_LAST_DATA : _LAST_DATA + 4], sys.byteorder)


def _tcp_info(connection: socket.socket) -> bytes:
    try:
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    except OSError:
        return bytes(104)
