"""Whether requests are wanted here: gRPC's health service, by service and by model, and the probes of HTTP."""

import asyncio
from collections.abc import Collection
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flashdiff.server.models import Models
from flashdiff.server.submitter import Submitter

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says SERVING for the server (""), for its `services` and for every model that is served, until `leave`.

    The servicer of grpcio-health-checking is not used: when one of two watchers leaves, it forgets the other one.
    """

    def __init__(self, worker: Submitter, models: Models, services: Collection[str]) -> None:
        self._worker, self._models, self._services = worker, models, frozenset(("", *services))
        self._is_leaving = False
        self._said: Any = None
        self._changed = asyncio.Event()  # set, and replaced, when a status may have changed

    @property
    def is_live(self) -> bool:
        """Whether a device thread lives."""
        return not self._worker.failure

    @property
    def is_ready(self) -> bool:
        """Whether new requests should come here."""
        return self._worker.is_ready and not self._is_leaving

    def leave(self) -> None:
        """Say NOT_SERVING from now on; requests are still accepted."""
        self._is_leaving = True
        self.look()

    def look(self) -> None:
        """Pass on what has changed to those that watch."""
        now = (self.is_ready, frozenset(self._models.served))
        if now != self._said:
            self._said = now
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    async def Check(self, request: Any, context: Any) -> Any:
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service and no model has that name")
        return _Status(status=status)

    async def List(self, request: Any, context: Any) -> Any:
        """All of them, as later versions of the protocol ask; with earlier ones nothing calls this."""
        names = (*self._services, *self._models.served)
        return health_pb2.HealthListResponse(statuses={name: _Status(status=self._status(name)) for name in names})

    async def Watch(self, request: Any, context: Any) -> None:
        sent = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != sent:
                await context.write(_Status(status=status))
                sent = status
            await changed.wait()

    def _status(self, name: str) -> int:
        if name not in self._services and name not in self._models.served:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if self.is_ready else _Status.NOT_SERVING)
