"""Starting, serving and stopping: open the bundle, warm it up, say SERVING, drain on SIGTERM."""

import asyncio
import contextlib
import logging
import signal
import socket
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from flashdiff.components import Components, Costs
from flashdiff.errors import BackendError, ConfigError
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.convert import ModelIdentity
from flashdiff.server.service import ImageService
from flashdiff.server.worker import Worker

DRAIN_S = 30.0
"""How long accepted requests may take after SIGTERM before they are cut off."""

_WATCH_S = 0.5  # how often the device thread is looked after
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_MESSAGE = 256 * 1024 * 1024
_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    ("grpc.max_receive_message_length", 1024 * 1024),  # a request is a prompt and some numbers
    ("grpc.so_reuseport", 0),  # otherwise two servers share one port in silence
]
_SERVICE = image_pb2.DESCRIPTOR.services_by_name["ImageService"].full_name

_log = logging.getLogger(__name__)


@dataclass
class Server:
    """A running server; `port` is the one it listens on."""

    port: int
    worker: Worker
    _server: Any
    _health: Any

    async def stop(self, grace_s: float = DRAIN_S) -> None:
        """Say NOT_SERVING, refuse what is new, finish what was accepted, then close."""
        await self._health.enter_graceful_shutdown()
        self.worker.drain()
        await self._server.stop(grace_s)
        await asyncio.to_thread(self.worker.join, 1.0)


async def start(components: Components, costs: Costs, model: ModelIdentity, *, host: str, port: int) -> Server:
    """A server that answers; ConfigError when it cannot listen there. Port 0 takes a free one."""
    if not _is_free(host, port):  # asked first, because gRPC would add lines of its own to our error
        raise ConfigError(f"cannot listen on {host}:{port}: the port is in use or not ours to take; choose another with --port")
    worker = Worker(components, costs)
    server = grpc.aio.server(options=_OPTIONS)
    image_pb2_grpc.add_ImageServiceServicer_to_server(ImageService(worker, model), server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    await server.start()
    for name in ("", _SERVICE):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return Server(bound, worker, server, servicer)


def _is_free(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        return False
    return True


async def serve(components: Components, costs: Costs, model: ModelIdentity, *, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then drain. BackendError when the device thread has died: a supervisor should start anew."""
    server = await start(components, costs, model, host=host, port=port)
    if host not in _LOOPBACK:
        _log.warning("listening on %s: anyone who reaches it can use it, there is no TLS and no authentication", host)
    _log.info("serving %s (bundle %s, %s) on %s:%d", model.name, model.bundle_hash[:12], model.backend, host, server.port)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    while not stopping.is_set() and not server.worker.failure:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _WATCH_S)
    _log.info("draining: no new requests, up to %.0f s for those accepted", DRAIN_S)
    await server.stop()
    _log.info("stopped")
    if server.worker.failure:
        raise BackendError(f"the device thread has stopped: {server.worker.failure}")
