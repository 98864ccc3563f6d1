"""A small typed client, blocking and asyncio.

with Client("127.0.0.1:50051") as client:
    result = client.generate("a green monster with horns", steps=2, seed=7)
    Path("monster.png").write_bytes(result.images[0])
"""

import asyncio
import difflib
import json
import os
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc

from flashdiff.components import Size
from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.names import LOOPBACK, ImageFormat, Priority
from flashdiff.server.replies import (
    Control,
    Estimate,
    Lora,
    Preview,
    Reference,
    Result,
    read_estimate,
    read_models,
    read_response,
    read_update,
    write_request,
)


class ServerError(FlashdiffError):
    """The server refused, failed or did not answer; `code` is the gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str | None) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code


class Options(TypedDict, total=False):
    """The optional fields of a request; the server has defaults for those that are absent."""

    model: str
    negative_prompt: str
    truncate_prompt: bool
    """Cut prompts to what the model takes; else longer ones are refused."""
    seed: int | None
    steps: int | None
    size: Size | None
    count: int
    image_format: ImageFormat
    quality: int | None
    priority: Priority
    image: bytes | None
    strength: float | None
    noise_level: float | None
    """A whole number, for a model that upscales the image."""
    upscale: float | None
    """How many times as wide and as high as `image` the result is, which the model makes in tiles of `size`."""
    inputs: Mapping[str, bytes]
    """Files of other inputs that a task of the model takes, by name."""
    parameters: Mapping[str, float]
    """The task's other numbers, by name."""
    controls: Sequence[Control]
    """Images that steer the steps, for a model that was built with controls."""
    reference: Reference | None
    """An image that goes with the prompt, for a model that was built with an IP-Adapter."""
    loras: Sequence[Lora]
    """LoRAs of the server's folder, for a model that was built with LoRA slots."""


_SERVICE = image_pb2.DESCRIPTOR.services_by_name["ImageService"].full_name

# Retries are idempotent: the same request gives the same pixels. One may run twice, because UNAVAILABLE may also mean that the
# connection was lost during the call, and so may a CANCELLED from the other end; the caller's own cancel is never retried.
_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
            },
        }
    ]
}


@dataclass(frozen=True, kw_only=True)
class Tls:
    """How a client connects by TLS."""

    ca: Path | None = None
    """The certificate of the server's authority; None: the authorities that this machine trusts."""
    certificate: Path | None = None
    """The client's own chain, and its key, for servers with --tls-client-ca."""
    key: Path | None = None

    def credentials(self) -> Any:
        """gRPC's channel credentials; ConfigError for a certificate without its key, and for a file that cannot be read."""
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a client certificate needs its key, and a key its certificate")
        roots = _read(self.ca) if self.ca else _system_roots()
        return grpc.ssl_channel_credentials(roots, *(_read(path) if path else None for path in (self.key, self.certificate)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror or error}") from None


def _system_roots() -> bytes | None:
    """The authorities that this machine trusts, as OpenSSL finds them; None for those that gRPC brings."""
    found = ssl.get_default_verify_paths()
    places = (os.environ.get("SSL_CERT_FILE"), found.cafile, *_ROOTS)
    return next((Path(place).read_bytes() for place in places if place and Path(place).is_file()), None)


_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")  # Debian, Fedora, Alpine


def _tls_of(tls: Tls | bool, ca: Path | None) -> Tls | None:
    if isinstance(tls, Tls):
        return tls
    return Tls(ca=ca) if tls or ca else None


def _channel_arguments(
    address: str, token: str | None, tls: Tls | None, *, retries: bool, round_robin: bool
) -> tuple[Any, list[tuple[str, Any]]]:
    """Credentials (None: plain) and options of a channel."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", 256 * 1024 * 1024),
        # gRPC's own pauses grow to two minutes: a client would find a server long after its start.
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if address.startswith("unix:") or address.rpartition(":")[0].strip("[]") in LOOPBACK:
        options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot reach this machine's own servers
    config: dict[str, Any] = {}
    if round_robin:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        if not token:  # gRPC sends none with its own health checks
            config["healthCheckConfig"] = {"serviceName": _SERVICE}
    if retries:  # the buffer holds requests with images too, which gRPC's default is too small to send again
        config |= _RETRIES
        options.append(("grpc.per_rpc_retry_buffer_size", 8 * 1024 * 1024))
    else:
        options.append(("grpc.enable_retries", 0))
    if config:
        options.append(("grpc.service_config", json.dumps(config)))
    credentials = tls.credentials() if tls else None
    if token and credentials:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
    return credentials, options


def _request(prompt: str, options: Options) -> image_pb2.GenerateRequest:
    """TypeError for an option that there is not, as Python itself raises it, but with the names that there are."""
    if unknown := options.keys() - Options.__annotations__:
        name = min(unknown)
        near = difflib.get_close_matches(name, Options.__annotations__, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(Options.__annotations__)}"
        raise TypeError(f"a request has no option '{name}'; {hint}")
    return write_request(prompt, **options)


def _metadata(token: str | None, tls: Tls | None) -> tuple[tuple[str, str], ...]:
    """The token as a header of a plain connection; on encrypted ones gRPC sends it with the call credentials."""
    return (("authorization", f"Bearer {token}"),) if token and not tls else ()


def _server_error(error: grpc.RpcError) -> ServerError:
    return ServerError(error.code(), error.details())


def _no_server(timeout_s: float) -> ServerError:
    return ServerError(grpc.StatusCode.UNAVAILABLE, f"no server answered within {timeout_s:g} s")


class Client:
    """A connection to a server, safe to share between threads.

    With `tls` it is encrypted: True trusts this machine's authorities, `tls_ca` names another one, and a `Tls` has a client
    certificate as well. With `round_robin` the calls take turns over all addresses that a name such as `dns:///flashdiff:50051`
    has and, without a token, whose server says SERVING. ConfigError for certificates that cannot be read.

    Calls that were refused for lack of room, or that reached no server, are retried up to three times within their deadline,
    unless `retries` is off.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: Tls | bool = False,
        tls_ca: Path | None = None,
        retries: bool = True,
        round_robin: bool = False,
    ) -> None:
        given = _tls_of(tls, tls_ca)
        credentials, options = _channel_arguments(address, token, given, retries=retries, round_robin=round_robin)
        self._channel = (
            grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
        )
        self._stub = image_pb2_grpc.ImageServiceStub(self._channel)
        self._metadata = _metadata(token, given)

    def generate(self, prompt: str, *, timeout_s: float | None = None, **options: Unpack[Options]) -> Result:
        """Images of the prompt, encoded as `image_format`; times in the result are milliseconds.

        RequestError for a value that no request can carry, TypeError for an unknown option; ServerError, with its
        status, for a refusal, a failure or no server.
        """
        request = _request(prompt, options)
        try:
            return read_response(self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _server_error(error) from None

    def stream(self, prompt: str, *, timeout_s: float | None = None, **options: Unpack[Options]) -> Iterator[Preview | Result]:
        """A preview after every step, then the result; leaving the loop early cancels the request. Errors as in `generate`."""
        request = _request(prompt, options)
        call = self._stub.GenerateStream(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for update in call:
                yield read_update(update)
        except grpc.RpcError as error:
            raise _server_error(error) from None
        finally:
            call.cancel()

    def estimate(self, prompt: str, *, timeout_s: float | None = None, **options: Unpack[Options]) -> Estimate:
        """Milliseconds that this request would take now, and the number of pending images. Errors as in `generate`."""
        try:
            return read_estimate(self._stub.Estimate(_request(prompt, options), timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _server_error(error) from None

    def models(self, *, timeout_s: float | None = None) -> list[str]:
        """The names of the models that requests may name, the default first; ServerError when the server does not answer."""
        try:
            return read_models(self._stub.ListModels(image_pb2.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _server_error(error) from None

    def wait_until_ready(self, timeout_s: float) -> None:
        """Block until the server answers; ServerError when it does not in time."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout_s)
        except grpc.FutureTimeoutError:
            raise _no_server(timeout_s) from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio; one per event loop."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: Tls | bool = False,
        tls_ca: Path | None = None,
        retries: bool = True,
        round_robin: bool = False,
    ) -> None:
        given = _tls_of(tls, tls_ca)
        credentials, options = _channel_arguments(address, token, given, retries=retries, round_robin=round_robin)
        self._channel = (
            grpc.aio.secure_channel(address, credentials, options) if credentials else grpc.aio.insecure_channel(address, options)
        )
        self._stub: Any = image_pb2_grpc.ImageServiceStub(self._channel)  # the stubs are typed for the blocking channel
        self._metadata = _metadata(token, given)

    async def generate(self, prompt: str, *, timeout_s: float | None = None, **options: Unpack[Options]) -> Result:
        """See `Client.generate`; cancelling the task cancels the request."""
        request = _request(prompt, options)
        try:
            return read_response(await self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _server_error(error) from None

    async def stream(
        self, prompt: str, *, timeout_s: float | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Preview | Result]:
        """See `Client.stream`."""
        request = _request(prompt, options)
        call = self._stub.GenerateStream(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for update in call:
                yield read_update(update)
        except grpc.RpcError as error:
            raise _server_error(error) from None
        finally:
            call.cancel()

    async def estimate(self, prompt: str, *, timeout_s: float | None = None, **options: Unpack[Options]) -> Estimate:
        """See `Client.estimate`."""
        try:
            return read_estimate(await self._stub.Estimate(_request(prompt, options), timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _server_error(error) from None

    async def models(self, *, timeout_s: float | None = None) -> list[str]:
        """See `Client.models`."""
        try:
            return read_models(
                await self._stub.ListModels(image_pb2.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata)
            )
        except grpc.RpcError as error:
            raise _server_error(error) from None

    async def wait_until_ready(self, timeout_s: float) -> None:
        """See `Client.wait_until_ready`."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            raise _no_server(timeout_s) from None

    async def close(self) -> None:
        """End the connection, and with it the calls that run."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
