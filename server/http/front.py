"""What every HTTP request passes before its route, and its response on the way back.

Its page is allowed, its caller is authenticated, it gets a place among the calls at once, its body is read, it is watched, and it
ends when its client leaves or does not read the response.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from flashdiff.errors import BackendError, CancelledError, FlashdiffError, OutOfMemoryError
from flashdiff.server.calls import Call, Calls
from flashdiff.server.http.bodies import Bodies
from flashdiff.server.http.errors import HttpError, error_response, status_of
from flashdiff.server.http.origins import Origins, is_preflight, preflight_response
from flashdiff.server.http.sending import ABORT, send_in_time
from flashdiff.server.status import CLIENT_LEFT
from flashdiff.server.tracing import note_error

OPEN_TO_ALL = frozenset(
    {"/", "/openapi.json", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"}
)  # as gRPC's health checks; the page holds no secret, and a browser has no token before it is loaded
_HEALTH = frozenset({"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"})
_UNWATCHED = _HEALTH | {"/metrics"}  # asked every second
_UNMATCHED = "unmatched"  # and not the path, of which there are any number

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What a route knows of its request besides path and headers."""

    call: Call
    body: bytes = field(repr=False)
    arrived: float
    """On `time.monotonic`, when the headers had been read."""


def exchange_of(request: Request) -> Exchange:
    """The exchange that `Front` made for this request."""
    exchange: Exchange = request.scope["flashdiff.exchange"]
    return exchange


class Front:
    """The ASGI application: the routes behind what every request passes."""

    def __init__(self, routes: list[Route], calls: Calls, origins: Origins) -> None:
        self._router = Router(routes, redirect_slashes=False)
        self._calls, self._origins, self._bodies = calls, origins, Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        address = scope["client"][0] if scope["client"] else ""
        scope["app"] = self  # so that the router raises for what it does not find
        if scope["path"] in _UNWATCHED:
            await self._answer(scope, headers, receive, send, Call(scope["path"], "", address, "200"))
            return
        with self._calls.watch(_UNMATCHED, address, headers, "200") as call:
            await self._answer(scope, headers, receive, send, call)

    async def _answer(self, scope: Scope, headers: Mapping[str, str], receive: Receive, send: Send, call: Call) -> None:
        """Run the route; every error becomes a response, and the call's code."""
        sender, error = _Sender(send, call, self._origins.headers(headers), scope[ABORT]), None
        try:
            self._origins.check(headers)
            if is_preflight(scope["method"], headers):
                await preflight_response(headers)(scope, receive, sender)
                return
            if scope["path"] not in OPEN_TO_ALL:
                call.client = self._calls.admit(headers.get("authorization", "")) or call.client
            arrived = time.monotonic()
            with self._calls.placed(call.client, is_health=scope["path"] in _HEALTH) as place:
                async with self._bodies.read(scope["path"], call.client, headers, receive) as body:
                    place.is_waiting = False
                    scope["flashdiff.exchange"] = Exchange(call=call, body=body, arrived=arrived)
                    await self._run(scope, receive, sender)
        except FlashdiffError as caught:
            error = caught
        except HTTPException as caught:  # of the router
            error = HttpError(caught.status_code, _ROUTING.get(caught.status_code, caught.detail), caught.headers)
        except asyncio.CancelledError:
            call.fail(str(CLIENT_LEFT))
            raise
        except MemoryError:
            error = OutOfMemoryError("there is not enough memory for this now")
        except Exception:
            _log.exception("a request of %s failed", _path_of(scope))
            error = BackendError("internal error")
        finally:
            call.method = _path_of(scope) or call.method
        if error is None:
            return
        note_error(error)
        call.fail(str(status_of(error)))
        if not sender.has_started and not isinstance(error, CancelledError):
            await error_response(scope["path"], error)(scope, receive, sender)

    async def _run(self, scope: Scope, receive: Receive, sender: "_Sender") -> None:
        """Run the route until it has answered; CancelledError, and the route's end, when the client leaves before."""
        work = asyncio.create_task(self._router(scope, _receive_nothing, sender))
        leaving = asyncio.create_task(_until_left(receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not sender.has_ended:
                raise CancelledError("the client has left")
            await work
        finally:
            for task in (work, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):  # what the work raised has been raised above
                    await task


def _path_of(scope: Scope) -> str:
    """The path of the route that took a request, as it is written in the table of routes; empty before."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else ""


_ROUTING = {404: "there is no such path; /openapi.json lists them", 405: "this path does not take that method"}


async def _receive_nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}  # the body has been read


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Sender:
    """Sends a response with what all responses have, and notes how it goes."""

    def __init__(self, send: Send, call: Call, headers: Mapping[str, str], abort: Callable[[], None]) -> None:
        self._send, self._call, self._abort = send, call, abort
        self._headers = {"x-content-type-options": "nosniff", **headers}
        if call.request_id:
            self._headers["x-request-id"] = call.request_id
        self.has_started = self.has_ended = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            MutableHeaders(scope=message).update(self._headers)
            if not self._call.has_failed:
                self._call.code = str(message["status"])
            await self._send(message)
        else:
            await send_in_time(self._hand_on, message, self._abort)

    async def _hand_on(self, message: Message) -> None:
        self.has_ended = not message.get("more_body", False)
        await self._send(message)
