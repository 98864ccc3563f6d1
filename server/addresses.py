"""Where a server listens: a host and a port, or the file of a unix socket; and why it cannot."""

import errno
import re
import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

from flashdiff.errors import ConfigError
from flashdiff.server.names import LOOPBACK

_UNIX = "unix:"
_LONGEST_PATH = 107  # bytes of a socket's path, by the system
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_unix(host: str) -> bool:
    """Whether a host is `unix:PATH`, a socket in the file system."""
    return host.startswith(_UNIX)


def is_local(host: str) -> bool:
    """Whether only this machine's clients reach it."""
    return host in LOOPBACK or is_unix(host)


def shown(host: str, port: int) -> str:
    """The address for people and for clients."""
    if is_unix(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_free(host: str, port: int, option: str, host_option: str = "--host") -> None:
    """ConfigError when there is no listening there, before gRPC would add lines of its own to the error.

    The file that a server left which was killed is removed.
    """
    if is_unix(host):
        _check_socket(socket_file(host))
        return
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: f"the port is in use; choose another with {option}",
            errno.EACCES: f"this user may not take the port; choose one from 1024 on with {option}",
            errno.EADDRNOTAVAIL: f"this machine has no such address; choose another with {host_option}",
        }
        reason = remedies.get(error.errno or 0, f"{error.strerror or error}; choose another {host_option}")
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None


def socket_file(host: str) -> Path:
    """The file of a unix address, `unix:/run/flashdiff.sock`; ConfigError where it names none."""
    path = host.removeprefix(_UNIX)
    if path.startswith("///"):
        path = path[2:]  # unix:///run/...
    if not path or path.startswith("//"):
        raise ConfigError(f"--host {host}: give the path of a socket, as unix:/run/flashdiff.sock")
    if len(path.encode()) > _LONGEST_PATH:
        raise ConfigError(f"--host {host}: a socket's path has at most {_LONGEST_PATH} bytes")
    return Path(path)


def _check_socket(path: Path) -> None:
    try:
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"cannot listen on unix:{path}: a file that is no socket is there; choose another --host")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            if client.connect_ex(str(path)) == 0:
                raise ConfigError(f"cannot listen on unix:{path}: another server listens there; choose another --host")
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        path.unlink()
    except OSError as error:
        remedies = {
            errno.ENOENT: f"there is no folder {path.parent}; make it, or choose another --host",
            errno.EACCES: f"this user may not write to {path.parent}; choose another --host",
            errno.EPERM: f"this user may not write to {path.parent}; choose another --host",
            errno.EROFS: f"{path.parent} is read-only; choose another --host",
        }
        reason = remedies.get(error.errno or 0, f"{error.strerror or error}; choose another --host")
        raise ConfigError(f"cannot listen on unix:{path}: {reason}") from None


def is_origin(text: str) -> bool:
    """Whether `as_sent` makes of it what a browser could send as `Origin`."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    is_whole = text.lower() == f"{parts.scheme}://{parts.netloc}".lower()
    is_name = re.fullmatch(r"[^\s*@]+", parts.netloc) is not None and bool(parts.hostname)
    return is_whole and is_name and parts.scheme in _DEFAULT_PORTS and port != 0


def as_sent(origin: str) -> str:
    """An origin as browsers write it: in lower case, and without the port that its scheme has anyway."""
    origin = origin.lower()
    parts = urlsplit(origin)
    return f"{parts.scheme}://{parts.netloc.rpartition(':')[0]}" if parts.port == _DEFAULT_PORTS[parts.scheme] else origin
