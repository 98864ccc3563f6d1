"""TLS: certificates that are replaced while the server runs, and clients that bring one."""

import logging
import os
import shutil
import socket
import ssl
from pathlib import Path

import pytest
from served import serving, until
from tls import certificate

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import ConfigError
from flashdiff.server.app import Listen
from flashdiff.server.certificates import Certificates
from flashdiff.server.client import Client, ServerError, Tls


def _serial(port: int, ca: Path) -> int:
    """Of the certificate that a new connection gets."""
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        return int(str((tls.getpeercert() or {})["serialNumber"]), 16)


def test_a_replaced_certificate_is_taken_for_new_connections_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    authority = certificate(tmp_path, "ca")
    old, _ = certificate(tmp_path, "server", authority)
    tls = {"tls_cert": tmp_path / "server.pem", "tls_key": tmp_path / "server.key"}
    with serving(FakeComponents(), Listen(port=0, http_port=0, **tls)) as running:
        ports = [running.server.port, running.server.http_port or 0]
        assert {_serial(port, tmp_path / "ca.pem") for port in ports} == {old.serial_number}
        with Client(running.address, tls_ca=tmp_path / "ca.pem") as client:
            assert client.generate("x", timeout_s=30).images
            (tmp_path / "server.pem").write_text("half a certificate")
            until(lambda: "the certificates stay as they were" in caplog.text)
            assert {_serial(port, tmp_path / "ca.pem") for port in ports} == {old.serial_number}
            new, _ = certificate(tmp_path, "new", authority)
            shutil.copy(tmp_path / "new.key", tmp_path / "server.key")
            os.replace(tmp_path / "new.pem", tmp_path / "server.pem")
            until(lambda: "certificate read from" in caplog.text)
            assert {_serial(port, tmp_path / "ca.pem") for port in ports} == {new.serial_number}
            assert client.generate("x", timeout_s=30).images  # on its old connection


def test_a_client_brings_its_certificate_or_trusts_what_the_machine_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = certificate(tmp_path, "ca")
    for name in ("server", "client"):
        certificate(tmp_path, name, authority)
    tls = {"tls_cert": tmp_path / "server.pem", "tls_key": tmp_path / "server.key"}
    with serving(FakeComponents(), Listen(port=0, tls_client_ca=tmp_path / "ca.pem", **tls)) as running:
        own = Tls(ca=tmp_path / "ca.pem", certificate=tmp_path / "client.pem", key=tmp_path / "client.key")
        with Client(running.address, tls=own) as client:
            assert client.generate("x", timeout_s=30).images
    with serving(FakeComponents(), Listen(port=0, **tls)) as running:
        with Client(running.address, tls=True) as client, pytest.raises(ServerError, match=r"UNAVAILABLE|DEADLINE"):
            client.generate("x", timeout_s=2)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        with Client(running.address, tls=True) as client:
            assert client.generate("x", timeout_s=30).images


def test_what_is_no_certificate_is_refused_in_one_line(tmp_path: Path) -> None:
    certificate(tmp_path, "one")
    certificate(tmp_path, "two")
    with pytest.raises(ConfigError, match="no certificate and its key"):
        Certificates(tmp_path / "one.pem", tmp_path / "two.key", None)
    with pytest.raises(ConfigError, match=r"--tls-client-ca .*: no certificate of an authority"):
        Certificates(tmp_path / "one.pem", tmp_path / "one.key", tmp_path / "one.key")
    with pytest.raises(ConfigError, match="needs its key"):
        Client("127.0.0.1:1", tls=Tls(certificate=tmp_path / "one.pem"))
    with pytest.raises(ConfigError, match="cannot read"):
        Client("127.0.0.1:1", tls=Tls(ca=tmp_path / "none.pem"))
