"""Starting, serving and stopping: listen, say SERVING, drain on SIGTERM."""

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from flashdiff import defaults
from flashdiff.errors import BackendError, ConfigError
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc, triton_pb2
from flashdiff.server.addresses import check_free, is_local, is_origin, is_unix, shown
from flashdiff.server.auth import Tokens
from flashdiff.server.calls import Calls
from flashdiff.server.certificates import Certificates, certificates
from flashdiff.server.connections import close_excess, raise_file_limit
from flashdiff.server.fleet import Fleet
from flashdiff.server.gate import Gate
from flashdiff.server.health import Health
from flashdiff.server.log import hide_lost_replies
from flashdiff.server.metrics import Metrics
from flashdiff.server.models import Models
from flashdiff.server.reply_size import MAX_MESSAGE_BYTES
from flashdiff.server.requests import Requests
from flashdiff.server.service import ImageService
from flashdiff.server.shared_memory import Regions
from flashdiff.server.submitter import Submitter
from flashdiff.server.triton import TritonService
from flashdiff.server.triton_grpc import TRITON_SERVICE, triton_handler
from flashdiff.server.worker import Worker

if TYPE_CHECKING:
    from flashdiff.server.http.listener import HttpListener

_LAST_S = 1.0  # for refusals on their way when all images are sent
_WATCH_S = 0.5  # how often the device thread is checked and the metrics are updated
_MOST_S = 7 * 24 * 3600
_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),  # a request is a prompt, some numbers and perhaps images
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: gRPC would unpack a message before it knows its length
    ("grpc.max_concurrent_streams", 500),  # of one connection
    ("grpc.server_handshake_timeout_ms", 10_000),  # a silent connection is closed
    ("grpc.max_connection_idle_ms", 600_000),  # frees replies that are not read as well: see `unread`
    ("grpc.so_reuseport", 0),  # otherwise two servers would silently share a port
    ("grpc.keepalive_time_ms", 60_000),  # notices a client that vanished
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),  # many clients ping every 5 s; those more often are cut off
    ("grpc.keepalive_permit_without_calls", 1),
]
_SERVICES = (image_pb2.DESCRIPTOR.services_by_name["ImageService"].full_name, TRITON_SERVICE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listen:
    """Where to listen, and which clients to accept; ConfigError for what would be unsafe or incomplete."""

    host: str = defaults.HOST
    """Or `unix:` and the path of a socket, for gRPC without a port."""
    port: int = defaults.PORT
    """0 takes a free one."""
    tokens: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    shared_memory: bool = False
    """Lets clients of this machine pass tensors through any shared memory object of this server's user."""
    no_auth: bool = False
    """Said for a public address without tokens or client certificates."""
    metrics_host: str = defaults.HOST
    metrics_port: int | None = None
    http_port: int | None = None
    """Of the HTTP server, on the same host; None: there is none, and 0 takes a free one."""
    allowed_origins: tuple[str, ...] = ()
    """Of web pages that may use the HTTP server, besides its own."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Further names of models in OpenAI's API: (alias, name)."""
    drain_s: float = defaults.DRAIN_S
    """How long accepted requests may take after SIGTERM before they are cut off."""
    drain_delay_s: float = 0.0
    """How long the server still accepts requests after SIGTERM while it says NOT_SERVING, so that balancers look elsewhere."""
    max_connection_age_s: float | None = None
    """After which a gRPC connection is closed, so that clients connect again, perhaps to another replica; None: never."""

    def __post_init__(self) -> None:
        authenticates = self.tokens or self.tls_client_ca
        if not is_local(self.host) and not authenticates and not self.no_auth:
            raise ConfigError(
                f"--host {self.host} admits every client: give --tokens FILE or --tls-client-ca FILE, or say --no-auth"
            )
        if self.shared_memory and not is_local(self.host):
            raise ConfigError("--shared-memory is for clients of this machine: it needs a loopback --host")
        if authenticates and self.no_auth:
            raise ConfigError("--no-auth contradicts --tokens and --tls-client-ca")
        if self.http_port is None and (self.allowed_origins or self.aliases):
            raise ConfigError("--allow-origin and --alias are for HTTP: give --http-port")
        if self.metrics_port is None and self.metrics_host != defaults.HOST:
            raise ConfigError("--metrics-host is for --metrics-port: give it")
        if is_unix(self.host) and self.http_port is not None:
            raise ConfigError(f"--host {self.host}: HTTP is served on a host and port alone; leave --http-port out")
        for option, seconds, least in (
            ("--drain", self.drain_s, 0),
            ("--drain-delay", self.drain_delay_s, 0),
            ("--max-connection-age", self.max_connection_age_s, 1),
        ):
            if seconds is not None and not least <= seconds <= _MOST_S:
                raise ConfigError(f"{option} {seconds:g}: give seconds from {least} to {_MOST_S}")
        self._check_ports_differ()
        for origin in self.allowed_origins:
            if not is_origin(origin):
                raise ConfigError(f"--allow-origin {origin}: give scheme://host or scheme://host:port, as browsers send it")

    def _check_ports_differ(self) -> None:
        hosts = {"--port": self.host, "--http-port": self.host, "--metrics-port": self.metrics_host}
        given = {"--port": self.port, "--http-port": self.http_port, "--metrics-port": self.metrics_port}
        taken: dict[tuple[str, int], str] = {}
        for option, port in given.items():
            if port and not is_unix(hosts[option]):
                other = taken.setdefault((hosts[option], port), option)
                if other != option:
                    raise ConfigError(f"{other} {port} and {option} {port}: give each a port of its own")


@dataclass
class Server:
    """A running server; `port` is the one it listens on."""

    port: int
    worker: Submitter
    models: Models
    metrics_port: int | None
    http_port: int | None
    tokens: Tokens | None
    _server: Any
    _http: "HttpListener | None"
    _health: Health
    _metrics: Metrics
    _watching: "asyncio.Task[None]"

    def leave(self) -> None:
        """Say NOT_SERVING, to balancers and probes; requests are still accepted."""
        self._health.leave()

    async def stop(self, grace_s: float = defaults.DRAIN_S, hurried: asyncio.Event | None = None) -> None:
        """Say NOT_SERVING, refuse what is new, finish what was accepted, then close; `hurried` ends the wait early."""

        def has_time() -> bool:
            return time.monotonic() < until and not (hurried and hurried.is_set())

        self._health.leave()
        self.worker.drain()
        # At once, so that clients send what is new to another replica; this takes no new connections and ends no call.
        closing = asyncio.create_task(self._server.stop(grace_s + 2 * _LAST_S))
        until = time.monotonic() + grace_s
        while not self.worker.failure and not self.worker.join(0) and has_time():
            await asyncio.sleep(0.01)
        while self.worker.has_unsent and has_time():
            await asyncio.sleep(0.01)  # gRPC's own grace would also wait for streams that only listen, such as health watches
        last_s = min(grace_s, _LAST_S)
        await asyncio.gather(self._server.stop(last_s), *([self._http.stop(last_s)] if self._http else []))
        await closing
        self._watching.cancel()
        self._metrics.page.close()


def check_listen(listen: Listen) -> None:
    """ConfigError for a port, certificate or file of tokens that cannot be had; building and opening models takes minutes."""
    _check_ports(listen)
    certificates(listen.tls_cert, listen.tls_key, listen.tls_client_ca)
    if listen.tokens:
        Tokens(listen.tokens)


def _check_ports(listen: Listen) -> None:
    check_free(listen.host, listen.port, "--port")
    if listen.http_port is not None:
        check_free(listen.host, listen.http_port, "--http-port")
    if listen.metrics_port is not None:
        check_free(listen.metrics_host, listen.metrics_port, "--metrics-port", "--metrics-host")


async def start(models: Models, listen: Listen, worker: type[Worker] = Worker) -> Server:
    """A server that answers; ConfigError when it cannot listen there."""
    _check_aliases(models, listen.aliases)
    hide_lost_replies()
    _check_ports(listen)  # again: opening the models took a while
    host, port = listen.host, listen.port
    tls = certificates(listen.tls_cert, listen.tls_key, listen.tls_client_ca)
    metrics = Metrics([device.name for device in models.devices if device.name])
    tokens = Tokens(listen.tokens) if listen.tokens else None
    calls = Calls(tokens, metrics.ended)
    metrics_port = None if listen.metrics_port is None else await metrics.listen(listen.metrics_host, listen.metrics_port)
    device = _start_workers(models, metrics, worker)
    metrics.watch_models(models)
    health_service = Health(device, models, _SERVICES)
    metrics.page.show_health(lambda: health_service.is_live, lambda: health_service.is_ready)

    requests = Requests(device, models)
    triton = TritonService(health_service, requests, Regions() if listen.shared_memory else None)
    http = None
    if listen.http_port is not None:
        http = await _start_http(health_service, requests, triton, metrics, calls, listen, tls)
    server = grpc.aio.server(options=_options(listen), interceptors=[Gate(calls)])
    image_pb2_grpc.add_ImageServiceServicer_to_server(ImageService(requests), server)
    server.add_generic_rpc_handlers((triton_handler(triton),))
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server, _protocols())
    address = shown(host, port)
    bound = server.add_secure_port(address, tls.grpc_credentials()) if tls else server.add_insecure_port(address)
    await server.start()
    http_port = http.port if http else None
    ports = {port for port in (None if is_unix(host) else bound, http_port, metrics_port) if port is not None}
    watching = asyncio.create_task(_watch(device, metrics, health_service, tls, ports))
    return Server(bound, device, models, metrics_port, http_port, tokens, server, http, health_service, metrics, watching)


def _options(listen: Listen) -> list[tuple[str, int]]:
    if listen.max_connection_age_s is None:
        return _OPTIONS
    # A connection that is too old takes no new calls; those that run have the time of a drain.
    return [
        *_OPTIONS,
        ("grpc.max_connection_age_ms", round(1000 * listen.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", round(1000 * listen.drain_s)),
    ]


def _start_workers(models: Models, metrics: Metrics, worker: type[Worker]) -> Submitter:
    """The only device's worker itself, or a fleet of them."""
    if len(models.devices) == 1:
        (device,) = models.devices
        single = worker(observer=metrics.of_device(device.name), device=device)
        _show(single, metrics)
        return single
    fleet = Fleet(models.devices, metrics, worker=worker, on_lost=models.lose)
    for each in fleet.workers:
        _show(each, metrics)
    return fleet


def _show(worker: Worker, metrics: Metrics) -> None:
    """Let the metrics show the worker's queue, and its device where that has a name."""
    name = worker.device.name
    metrics.watch_queue(lambda: worker.pending_images, name)
    if name:
        metrics.watch_device(name, lambda: not worker.failure)


async def _start_http(
    health: Health,
    requests: Requests,
    triton: TritonService,
    metrics: Metrics,
    calls: Calls,
    listen: Listen,
    tls: Certificates | None,
) -> "HttpListener":
    # Here, because HTTP is an extra to install.
    from flashdiff.server.http.app import http_app
    from flashdiff.server.http.listener import listen_http

    assert listen.http_port is not None
    app = http_app(
        health,
        requests,
        triton,
        metrics,
        calls,
        host=listen.host,
        allowed_origins=listen.allowed_origins,
        aliases=dict(listen.aliases),
    )
    return await listen_http(app, listen.host, listen.http_port, tls)


def _check_aliases(models: Models, aliases: tuple[tuple[str, str], ...]) -> None:
    known = {*models.served, *models.available()}
    for alias, name in aliases:
        if alias in known:
            raise ConfigError(f"--alias {alias}={name}: a model has that name already")
        if name not in known:
            raise ConfigError(f"--alias {alias}={name}: there is no model '{name}', but {', '.join(sorted(known)) or 'none'}")


async def _watch(worker: Submitter, metrics: Metrics, health: Health, tls: Certificates | None, ports: Collection[int]) -> None:
    while True:
        worker.check_alive()
        try:
            health.look()
            metrics.count()
            if tls:
                await asyncio.to_thread(tls.reread)
            if closed := await asyncio.to_thread(close_excess, ports):
                _log.warning("%d connections were closed: their address has more than its share", closed)
        except Exception:  # the watch over the worker must not end by it
            _log.exception("metrics, certificates or connections could not be looked after")
        await asyncio.sleep(_WATCH_S)


def _protocols() -> DescriptorPool:
    """For reflection: what is served, Triton's part under the name that it has on the wire."""
    pool = DescriptorPool()
    for file in (image_pb2, health_pb2, reflection_pb2):
        pool.AddSerializedFile(file.DESCRIPTOR.serialized_pb)
    ours, theirs = FileDescriptorProto(), FileDescriptorProto()
    triton_pb2.DESCRIPTOR.CopyToProto(ours)
    package = TRITON_SERVICE.rpartition(".")[0]
    text_format.Parse(text_format.MessageToString(ours).replace(ours.package, package), theirs)
    pool.Add(theirs)
    return pool


def freeze_loaded() -> None:
    """Exclude what is loaded from garbage collection for good: a full collection of it would delay every request by 30 ms."""
    gc.collect()
    gc.freeze()


async def serve(models: Models, listen: Listen) -> None:
    """Serve until SIGTERM or SIGINT, then leave and drain; a second one cuts both short, and SIGHUP reads the tokens again.

    BackendError when the device thread has died: a supervisor should start anew.
    """
    freeze_loaded()
    raise_file_limit()
    stopping, hurried = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):  # before the first request
        loop.add_signal_handler(number, lambda: (hurried if stopping.is_set() else stopping).set())
    server = await start(models, listen)
    loop.add_signal_handler(signal.SIGHUP, server.tokens.reload if server.tokens else lambda: None)
    if listen.no_auth:
        _log.warning("listening on %s: any client that reaches it is admitted, because of --no-auth", listen.host)
    if listen.tokens and not is_local(listen.host) and not listen.tls_cert:
        _log.warning("tokens cross the network in the clear: give --tls-cert and --tls-key, or end TLS in front of this server")
    for name, model in models.served.items():
        identity = model.identity
        where = shown(listen.host, server.port)
        _log.info("serving %s (bundle %s, %s) on %s", name, identity.bundle_hash[:12], identity.backend, where)
    if server.worker.devices:
        _log.info("devices: %s", ", ".join(device.name for device in server.worker.devices))
    if server.http_port is not None:
        _log.info("HTTP on %s:%d", listen.host, server.http_port)
    while not stopping.is_set() and not server.worker.failure:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _WATCH_S)
    server.worker.check_alive()  # logs the devices that were lost since the last look
    if listen.drain_delay_s and not server.worker.failure:
        _log.info("leaving: not ready any more, but taking requests for %g s", listen.drain_delay_s)
        server.leave()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hurried.wait(), listen.drain_delay_s)
    _log.info("draining: no new requests, up to %g s for those accepted", listen.drain_s)
    await server.stop(listen.drain_s, hurried)
    _log.info("stopped")
    if server.worker.failure:
        raise BackendError(f"the device thread has stopped: {server.worker.failure}")
