"""Port numbers for servers in other processes, which must know theirs before they start, or keep it when they start again."""

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_PORTS = range(20000, 32000)
"""Below those that the systems give to sockets that ask for any port: from 32768 on Linux, from 49152 elsewhere."""


@contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Free TCP ports that no other test takes while this lasts, in this process or another.

    The reservation is the UDP port of the same number, which nothing else here uses, and which the system frees when
    the process ends in whatever way.
    """
    with ExitStack() as stack:
        ports = list[int]()
        for port in random.sample(_PORTS, len(_PORTS)):
            reservation = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            if _binds(reservation, port) and _is_free(port):
                stack.enter_context(reservation)
                ports.append(port)
                if len(ports) == count:
                    break
            else:
                reservation.close()
        assert len(ports) == count, f"no {count} ports are free from {_PORTS[0]} to {_PORTS[-1]}"
        yield ports


def _is_free(port: int) -> bool:
    """Whether a server could listen there; one that has just ended does not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _binds(probe, port)


def _binds(unbound: socket.socket, port: int) -> bool:
    try:
        unbound.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True
