"""Where a server listens: unix sockets, and which of host, port, folder and permission is wrong."""

import errno
import os
import socket
from pathlib import Path

import pytest
from served import FakeComponents, serving

from flashdiff.errors import ConfigError
from flashdiff.server import addresses
from flashdiff.server.addresses import check_free, shown
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError


@pytest.mark.parametrize("slashes", ["", "//"])
def test_a_unix_socket_serves_and_is_gone_afterwards(tmp_path: Path, slashes: str) -> None:
    path = tmp_path / "a.sock"
    address = f"unix:{slashes}{path}"
    with serving(FakeComponents(), Listen(host=address, shared_memory=True)), Client(address) as client:
        assert path.is_socket()
        images = client.generate("x", seed=1, timeout_s=10).images
    with serving(FakeComponents()) as running, Client(running.address) as client:
        assert client.generate("x", seed=1, timeout_s=10).images == images
    assert not path.exists()
    with Client(address) as client, pytest.raises(ServerError, match=r"UNAVAILABLE|DEADLINE"):
        client.generate("x", timeout_s=1)


def test_the_socket_of_a_killed_server_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving(FakeComponents(), Listen(host=f"unix:{path}")), Client(f"unix:{path}") as client:
        assert client.generate("x", timeout_s=10).images


def test_a_socket_in_use_is_said_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on unix:.*a\.sock: another server listens there"):
            check_free(f"unix:{path}", 0, "--port")
    assert path.is_socket()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("file", "a file that is no socket is there"),
        ("none/a.sock", "there is no folder .*/none; make it"),
        ("file/a.sock", "Not a directory"),
        ("x" * 100 + "/" + "y" * 100, "a socket's path has at most 107 bytes"),
    ],
)
def test_a_path_that_can_be_no_socket_is_said(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(ConfigError, match=why) as error:
        check_free(f"unix:{tmp_path}/{path}", 0, "--port")
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "keep me"


@pytest.mark.parametrize("host", ["unix:", "unix://host/a.sock"])
def test_an_address_without_a_path_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"give the path of a socket, as unix:/run/flashdiff\.sock"):
        check_free(host, 0, "--port")


@pytest.mark.parametrize(
    ("ports", "why"),
    [
        ({"port": 7, "http_port": 7}, "--port 7 and --http-port 7: give each a port of its own"),
        ({"port": 7, "metrics_port": 7}, "--port 7 and --metrics-port 7"),
        ({"port": 0, "http_port": 7, "metrics_port": 7}, "--http-port 7 and --metrics-port 7"),
    ],
)
def test_a_port_for_two_is_refused(ports: dict[str, int], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Listen(**ports)  # type: ignore[arg-type]
    Listen(port=0, http_port=0, metrics_port=0)
    Listen(port=7, metrics_host="::1", metrics_port=7)


def test_http_needs_a_port(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HTTP is served on a host and port alone; leave --http-port out"):
        Listen(host=f"unix:{tmp_path}/a.sock", http_port=0)


@pytest.mark.parametrize(
    ("host", "number", "why"),
    [
        ("127.0.0.1", errno.EACCES, "cannot listen on 127.0.0.1:80: this user may not take the port; choose one from 1024 on"),
        ("127.0.0.1", errno.EADDRINUSE, "the port is in use; choose another with --http-port"),
        ("127.0.0.1", errno.EADDRNOTAVAIL, "this machine has no such address; choose another with --host"),
        ("unix:a.sock", errno.EACCES, "this user may not write to .*; choose another --host"),
        ("unix:a.sock", errno.EROFS, "is read-only; choose another --host"),
    ],
)
def test_what_the_system_refuses_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, number: int, why: str
) -> None:
    class Refusing(socket.socket):
        def bind(self, _: object) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", Refusing)
    assert addresses.socket is socket
    with pytest.raises(ConfigError, match=why):
        check_free(host, 80, "--http-port")


def test_addresses_are_shown_as_clients_take_them() -> None:
    assert shown("::1", 5) == "[::1]:5"
    assert shown("localhost", 5) == "localhost:5"
    assert shown("unix:/a", 5) == "unix:/a"
