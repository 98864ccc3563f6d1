"""Which web pages may use the server: its own, and those of allowed origins.

A browser sends requests to a loopback server for any page that asks it to, so a loopback server refuses foreign `Host` headers
(DNS rebinding), and every server refuses foreign `Origin` headers. Clients that are no browsers send no `Origin`.
"""

from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.responses import Response

from flashdiff.server.addresses import as_sent
from flashdiff.server.http.errors import HttpError
from flashdiff.server.names import LOOPBACK

_EXPOSED = "x-request-id, retry-after, retry-after-ms, x-should-retry, inference-header-content-length"


class Origins:
    """Checks the `Host` and `Origin` of requests to a server that listens on `host`."""

    def __init__(self, host: str, allowed: Collection[str]) -> None:
        self._allowed = frozenset(as_sent(origin) for origin in allowed)
        self._hosts = {*LOOPBACK, *(urlsplit(origin).hostname for origin in self._allowed)} if host in LOOPBACK else None

    def check(self, headers: Mapping[str, str]) -> None:
        """HttpError for a page that may not use this server."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            raise HttpError(403, f"host: {host[:80]!r} is not a name of this loopback server; see --allow-origin")
        if origin is not None and origin.lower() not in self._allowed and _place_of(origin) != host.lower():
            raise HttpError(403, f"origin: {origin[:80]!r} may not use this server; see --allow-origin")

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What lets an allowed page read the response."""
        origin = headers.get("origin")
        if origin is None or origin.lower() not in self._allowed:
            return {}
        return {"access-control-allow-origin": origin, "access-control-expose-headers": _EXPOSED, "vary": "origin"}


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    """Whether this is a CORS preflight: a browser checks whether a page may send a request."""
    return method == "OPTIONS" and "access-control-request-method" in headers


def preflight_response(headers: Mapping[str, str]) -> Response:
    """Yes, with any headers; the request itself is authenticated."""
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": headers.get("access-control-request-headers", ""),
            "access-control-max-age": "600",
        },
    )


def _place_of(origin: str) -> str | None:
    """Host and port of an `Origin` header, None when it is not an origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _name_of(host: str) -> str:
    """The name in a `Host` header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
