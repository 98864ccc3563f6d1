"""The certificates of TLS: checked at the start, and read again when their files change, for new connections."""

import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from flashdiff.errors import ConfigError
from flashdiff.reading import MAX_BYTES, read_file, witness

_log = logging.getLogger(__name__)


class Certificates:
    """A chain, its key and, with `client_ca`, the authority whose clients alone can connect.

    Files that do not fit together, as in the middle of a replacement, change nothing until they do; the log says why.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None) -> None:
        self._chain, self._key, self._client_ca = chain, key, client_ca
        self._contexts: list[ssl.SSLContext] = []
        self._trouble = ""  # as logged
        self._files = [chain, key, *([client_ca] if client_ca else [])]
        self._seen = witness(self._files)
        self._now = self._read()

    def grpc_credentials(self) -> Any:
        """Credentials of a gRPC server that follow the files."""
        given = self._now

        def fetch() -> Any:
            nonlocal given
            if given is self._now:
                return None  # unchanged
            given = self._now
            return given

        return grpc.dynamic_ssl_server_credentials(given, fetch, require_client_authentication=self._client_ca is not None)

    def http_context(self) -> ssl.SSLContext:
        """A context of an HTTP server that follows the files; a new client authority is added to the old one."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self._client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
        self._load_into(context)
        self._contexts.append(context)
        return context

    def reread(self) -> None:
        """Take the files as they are now, if they have changed."""
        seen = witness(self._files)
        if seen == self._seen:
            return
        try:
            fresh = self._read()
            for context in self._contexts:
                self._load_into(context)
        except ConfigError as error:  # they may be half written: tried again the next time
            if str(error) != self._trouble:
                _log.error("the certificates stay as they were: %s", error)
            self._trouble = str(error)
            return
        self._seen, self._now, self._trouble = seen, fresh, ""
        _log.info("certificate read from %s", self._chain)

    def _read(self) -> Any:
        """What gRPC takes; ConfigError for files that cannot be read or are no certificate and its key."""
        chain, key = _bytes_of(self._chain, "--tls-cert"), _bytes_of(self._key, "--tls-key")
        roots = _bytes_of(self._client_ca, "--tls-client-ca") if self._client_ca else None
        self._load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots)

    def _load_into(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._chain, self._key, _no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"--tls-cert {self._chain}, --tls-key {self._key}: no certificate and its key: {error}") from None
        try:
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--tls-client-ca {self._client_ca}: no certificate of an authority: {error}") from None


def certificates(chain: Path | None, key: Path | None, client_ca: Path | None) -> Certificates | None:
    """None where no file is given; ConfigError when one lacks."""
    if chain is None and key is None and client_ca is None:
        return None
    if chain is None or key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    return Certificates(chain, key, client_ca)


def _bytes_of(path: Path, option: str) -> bytes:
    try:
        return read_file(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot read: {error.strerror or error}") from None


def _no_password() -> str:
    """For keys that need one: OpenSSL would ask the terminal."""
    return ""
