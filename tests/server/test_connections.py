"""Connections by address: those of the address with most, silent longest, go first."""

import socket
import time
import urllib.request
from contextlib import ExitStack

from raw_http2 import Connection
from served import FakeComponents, Running, serving, until

from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.connections import close_excess


def _is_open(connection: Connection) -> bool:
    connection.socket.setblocking(False)
    try:
        while connection.socket.recv(100_000):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def test_an_address_loses_what_is_beyond_its_share_and_others_nothing(running: Running) -> None:
    with ExitStack() as stack:
        greedy = [stack.enter_context(Connection(running.address, source="127.0.0.2")) for _ in range(12)]
        modest = [stack.enter_context(Connection(running.address, source=f"127.0.0.{host}")) for host in (3, 3, 4)]
        closed = list[int]()

        def close(most: int, most_of_one: int) -> int:  # connections are accepted and closed in time
            closed.append(close_excess({running.server.port}, most, most_of_one))
            return sum(map(_is_open, greedy))

        until(lambda: close(100, 10) == 10)
        until(lambda: close(11, 10) == 8)  # all together
        assert sum(closed) == 4
        assert all(map(_is_open, modest))
        assert close_excess({running.server.port}, 11, 10) == 0
        with Client(running.address) as client:
            assert client.generate("x", timeout_s=60).images


def test_the_one_that_speaks_is_kept(running: Running) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(Connection(running.address, source="127.0.0.2")) for _ in range(3)]
        time.sleep(0.02)  # the kernel counts milliseconds, and whole ticks
        for connection in silent[1:]:
            connection.socket.sendall(bytes.fromhex("000008060000000000") + bytes(8))  # a ping
        until(lambda: close_excess({running.server.port}, 100, 2) >= 0 and not _is_open(silent[0]))
        assert all(map(_is_open, silent[1:]))


def test_sockets_that_are_none_of_the_ports_stay(running: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_connection(other.getsockname()) as ours:
        theirs, _ = other.accept()
        with theirs, Connection(running.address):
            close_excess({running.server.port}, 1, 1)
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"


def test_the_ports_of_http_and_metrics_count_as_well() -> None:
    listen = Listen(port=0, http_port=0, metrics_port=0)
    with serving(FakeComponents(), listen) as running, ExitStack() as stack:
        server = running.server
        ports = {server.port, server.http_port or 0, server.metrics_port or 0}
        for port in ports:
            for _ in range(6):
                source = ("127.0.0.2", 0)
                stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=source))
        closed = list[int]()

        def close() -> bool:
            closed.append(close_excess(ports, 100, 10))
            return sum(closed) >= 8

        until(close)
        assert sum(closed) == 8
        assert urllib.request.urlopen(f"{running.url}/health/live", timeout=60).status == 200
