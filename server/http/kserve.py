"""The KServe v2 protocol over HTTP, for stock `tritonclient.http`: `/v2/...`, by the same service as over gRPC."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashdiff.errors import TensorError
from flashdiff.proto.v1 import triton_pb2 as pb
from flashdiff.server.http.fields import remaining_s
from flashdiff.server.http.front import exchange_of
from flashdiff.server.http.images_request import read_json
from flashdiff.server.http.kserve_convert import HEADER_LENGTH, as_json, check_outputs, read_inference, write_inference
from flashdiff.server.http.sending import Closing
from flashdiff.server.image_threads import ImageThreads
from flashdiff.server.triton import TritonService

_MODEL, _REGIONS = "/v2/models/{name}", "/v2/systemsharedmemory"


class KServeApi:
    """The routes of a service."""

    def __init__(self, service: TritonService, threads: ImageThreads) -> None:
        self._service, self._threads = service, threads

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v2", self._show_server),
            Route("/v2/health/live", self._show_live),
            Route("/v2/health/ready", self._show_ready),
            Route("/v2/models/stats", self._show_statistics),
            *self._of_model("", self._show_model),
            *self._of_model("/ready", self._show_model_ready),
            *self._of_model("/config", self._show_config),
            *self._of_model("/stats", self._show_statistics),
            *self._of_model("/infer", self._infer, "POST"),
            Route("/v2/repository/index", self._show_repository, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", self._load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", self._unload, methods=["POST"]),
            Route(f"{_REGIONS}/status", self._show_regions),
            Route(f"{_REGIONS}/unregister", self._unregister, methods=["POST"]),
            Route(f"{_REGIONS}/region/{{name}}/status", self._show_regions),
            Route(f"{_REGIONS}/region/{{name}}/register", self._register, methods=["POST"]),
            Route(f"{_REGIONS}/region/{{name}}/unregister", self._unregister, methods=["POST"]),
        ]

    def _of_model(self, end: str, show: Callable[[Request], Awaitable[Response]], method: str = "GET") -> list[Route]:
        """Of a model, with and without its version."""
        return [Route(f"{_MODEL}{version}{end}", show, methods=[method]) for version in ("", "/versions/{version}")]

    async def _show_server(self, request: Request) -> Response:
        """The server and its extensions."""
        return JSONResponse(as_json(await self._service.ServerMetadata(None)))

    async def _show_live(self, request: Request) -> Response:
        """200 while a device thread lives, else 503."""
        return _yes_or_no((await self._service.ServerLive(None)).live)

    async def _show_ready(self, request: Request) -> Response:
        """200 while requests are taken, else 503."""
        return _yes_or_no((await self._service.ServerReady(None)).ready)

    async def _show_model_ready(self, request: Request) -> Response:
        """200 while requests to the model are taken, else 503."""
        return _yes_or_no((await self._service.ModelReady(pb.ModelReadyRequest(**_named(request)))).ready)

    async def _show_model(self, request: Request) -> Response:
        """A model's tensors."""
        return JSONResponse(as_json(await self._service.ModelMetadata(pb.ModelMetadataRequest(**_named(request)))))

    async def _show_config(self, request: Request) -> Response:
        """A model's configuration."""
        return JSONResponse(as_json((await self._service.ModelConfig(pb.ModelConfigRequest(**_named(request)))).config))

    async def _show_statistics(self, request: Request) -> Response:
        """Counts and times of requests."""
        return JSONResponse(as_json(await self._service.ModelStatistics(pb.ModelStatisticsRequest(**_named(request)))))

    async def _show_repository(self, request: Request) -> Response:
        """The models that are served, and those that could be."""
        ready = _given(request).get("ready", False)
        if not isinstance(ready, bool):
            raise TensorError("ready must be true or false")
        index = await self._service.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready))
        return JSONResponse([as_json(model) for model in index.models])

    async def _load(self, request: Request) -> Response:
        """Load a model of the repository."""
        message = pb.RepositoryModelLoadRequest(model_name=request.path_params["name"])
        parameters = _given(request).get("parameters") or {}
        if not isinstance(parameters, dict):
            raise TensorError("parameters must be an object")
        for name in parameters:
            message.parameters[name].string_param = ""  # refused by the service, whatever it is
        await self._service.RepositoryModelLoad(message)
        return Response(status_code=200)

    async def _unload(self, request: Request) -> Response:
        """Stop serving a model."""
        await self._service.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=request.path_params["name"]))
        return Response(status_code=200)

    async def _show_regions(self, request: Request) -> Response:
        """The regions of shared memory."""
        asked = pb.SystemSharedMemoryStatusRequest(name=request.path_params.get("name", ""))
        regions = (await self._service.SystemSharedMemoryStatus(asked)).regions
        return JSONResponse([as_json(region) for region in regions.values()])

    async def _register(self, request: Request) -> Response:
        """Register a region of shared memory."""
        given = _given(request)
        key, offset, byte_size = given.get("key"), given.get("offset", 0), given.get("byte_size")
        if not isinstance(key, str) or type(offset) is not int or type(byte_size) is not int:
            raise TensorError("a region takes a key, an offset and a byte_size")
        if not (0 <= offset < 2**63 and 0 <= byte_size < 2**63):
            raise TensorError("a region's offset and byte_size must be numbers from 0 on")
        await self._service.SystemSharedMemoryRegister(
            pb.SystemSharedMemoryRegisterRequest(name=request.path_params["name"], key=key, offset=offset, byte_size=byte_size)
        )
        return Response(status_code=200)

    async def _unregister(self, request: Request) -> Response:
        """Forget a region of shared memory, or all."""
        asked = pb.SystemSharedMemoryUnregisterRequest(name=request.path_params.get("name", ""))
        await self._service.SystemSharedMemoryUnregister(asked)
        return Response(status_code=200)

    async def _infer(self, request: Request) -> Response:
        """Make images."""
        exchange, parameters = exchange_of(request), request.path_params
        header_length = request.headers.get(HEADER_LENGTH)
        name, version = parameters["name"], parameters.get("version", "")
        inference = await self._threads.run(read_inference, exchange.body, header_length, name, version)
        check_outputs(inference)
        updates = self._service.infer(inference.message, remaining_s(request), exchange.call.client, stream=False)
        response = await anext(updates)
        body, json_length = await self._threads.run(write_inference, inference, response)
        if json_length is None:
            return Closing(body, updates, media_type="application/json")
        headers = {HEADER_LENGTH: str(json_length)}
        return Closing(body, updates, media_type="application/octet-stream", headers=headers)


def _named(request: Request) -> dict[str, str]:
    return {name: request.path_params[name] for name in ("name", "version") if name in request.path_params}


def _given(request: Request) -> dict[str, Any]:
    """The JSON object in the body; empty without a body."""
    body = exchange_of(request).body
    return read_json(body) if body.strip() else {}


def _yes_or_no(is_so: bool) -> Response:
    return Response(status_code=200 if is_so else 503)
