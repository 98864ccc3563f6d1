"""Ports that tests reserve."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ports import reserved_ports


def test_reservations_of_all_processes_share_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import ports
ports._PORTS = range(27100, 27140)
with ports.reserved_ports(20) as reserved:
    print(*reserved, flush=True)
    sys.stdin.read()
"""
    monkeypatch.setattr("ports._PORTS", range(27100, 27140))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        theirs = {int(port) for port in other.stdout.readline().split()}
        assert len(theirs) == 20
        with reserved_ports(10) as some, reserved_ports(5) as more:
            assert not theirs & {*some, *more}
            assert len({*some, *more}) == 15
        with pytest.raises(AssertionError, match="no 21 ports are free"), reserved_ports(21):
            pass
        other.communicate()
    with reserved_ports(21):  # freed, by its end
        pass


def test_a_port_that_a_server_has_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserved_ports(2) as (taken, free):
        pass
    monkeypatch.setattr("ports._PORTS", (taken, free))
    with socket.create_server(("127.0.0.1", taken)), reserved_ports(1) as ports:
        assert ports == [free]
