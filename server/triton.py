"""Triton's protocol (KServe v2) in its messages, without a transport: gRPC and HTTP share this module.

A model has a prompt and some numbers as inputs; IMAGES, ENCODED, SEEDS and, in a stream, PREVIEW as outputs.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import flashdiff
from flashdiff.errors import BackendError, FlashdiffError, NotFoundError, RepositoryError, TensorError
from flashdiff.proto.v1 import triton_pb2 as pb
from flashdiff.server.health import Health
from flashdiff.server.jobs import Step
from flashdiff.server.models import Model
from flashdiff.server.repository import Repository
from flashdiff.server.requests import Reply, Requests
from flashdiff.server.shared_memory import Regions, offered
from flashdiff.server.triton_convert import (
    MAX_ID,
    OUTPUTS,
    VERSION,
    inputs_of,
    read_request,
    write_preview,
    write_result,
)

_EXTENSIONS = (
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "schedule_policy",
)


@dataclass
class _Statistics:
    """Of one model name; nanoseconds."""

    images: int = 0
    last_ms: int = 0
    durations: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, milliseconds: float) -> None:
        count_and_ns = self.durations.setdefault(name, [0, 0])
        count_and_ns[0] += 1
        count_and_ns[1] += round(1e6 * milliseconds)

    def message(self, name: str) -> pb.ModelStatistics:
        durations = {
            key: pb.StatisticDuration(count=count, ns=nanoseconds) for key, (count, nanoseconds) in self.durations.items()
        }
        return pb.ModelStatistics(
            name=name,
            version=VERSION,
            last_inference=self.last_ms,
            inference_count=self.images,
            execution_count=self.durations.get("success", [0])[0],
            inference_stats=pb.InferStatistics(**durations),
        )


class TritonService:
    """The calls of `proto/v1/triton.proto`, by their names there; a FlashdiffError says why there is no response."""

    def __init__(self, health: Health, requests: Requests, regions: Regions | None) -> None:
        self._health, self._requests, self._models, self._regions = health, requests, requests.models, regions
        self._repository = Repository(requests.models)
        self._statistics: dict[str, _Statistics] = {}

    async def ServerLive(self, request: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self._health.is_live)

    async def ServerReady(self, request: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._health.is_ready)

    async def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        with contextlib.suppress(NotFoundError):
            self._find(request.name, request.version)
            return pb.ModelReadyResponse(ready=self._health.is_ready)
        return pb.ModelReadyResponse(ready=False)

    async def ServerMetadata(self, request: Any) -> pb.ServerMetadataResponse:
        extensions = [*_EXTENSIONS, *(["system_shared_memory"] if self._regions else [])]
        return pb.ServerMetadataResponse(name="flashdiff", version=flashdiff.__version__, extensions=extensions)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        model = self._find(request.name, request.version)
        inputs = inputs_of(model.components.spec)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform=f"flashdiff_{model.identity.backend}",
            inputs=[tensor(name=name, datatype=t.datatype, shape=t.shape) for name, t in inputs.items()],
            outputs=[tensor(name=name, datatype=t.datatype, shape=t.shape) for name, t in OUTPUTS.items()],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        model = self._find(request.name, request.version)
        inputs = inputs_of(model.components.spec)
        config = pb.ModelConfig(
            name=request.name,
            platform=f"flashdiff_{model.identity.backend}",
            backend="flashdiff",
            max_batch_size=0,  # requests are not tensors to be stacked: the server batches the steps within them
            input=[
                pb.ModelInput(name=name, data_type=t.config_type, dims=t.shape, optional=t.optional) for name, t in inputs.items()
            ],
            output=[pb.ModelOutput(name=name, data_type=t.config_type, dims=t.shape) for name, t in OUTPUTS.items()],
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        try:
            if request.name:
                self._find(request.name, request.version)
        except NotFoundError as error:  # Triton's status for it, here alone
            raise TensorError(str(error)) from None
        names = [request.name] if request.name else list(self._models.served)
        stats = [self._statistics.get(name, _Statistics()).message(name) for name in names]
        return pb.ModelStatisticsResponse(model_stats=stats)

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        index = pb.RepositoryIndexResponse.ModelIndex
        served = self._models.served
        models = [index(name=name, version=VERSION, state="READY") for name in served]
        if not request.ready:
            models += [index(name=name) for name in await self._repository.available() if name not in served]
        return pb.RepositoryIndexResponse(models=models)

    async def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        try:
            if request.parameters:
                raise TensorError("loading takes no parameters: a bundle has its configuration in its manifest")
            await self._repository.load(request.model_name)
        except RepositoryError:
            raise
        except FlashdiffError as error:
            raise BackendError(f"failed to load '{request.model_name[:MAX_ID]}': {error}") from None
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        with contextlib.suppress(NotFoundError):  # not there, as asked
            self._models.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(self, request: pb.SystemSharedMemoryStatusRequest) -> pb.SystemSharedMemoryStatusResponse:
        found = offered(self._regions).find(request.name)
        status = pb.SystemSharedMemoryStatusResponse.RegionStatus
        regions = {r.name: status(name=r.name, key=r.key, offset=r.offset, byte_size=r.byte_size) for r in found}
        return pb.SystemSharedMemoryStatusResponse(regions=regions)

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest
    ) -> pb.SystemSharedMemoryRegisterResponse:
        offered(self._regions).register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        offered(self._regions).unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def infer(
        self,
        request: pb.ModelInferRequest,
        remaining_s: float | None,
        client: str,
        *,
        stream: bool,
        on_unread: Callable[[], None] | None = None,
        max_message_bytes: int | None = None,
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The previews, where they are asked for, and the result; errors count as failed in the statistics.

        `on_unread` as in `Requests.serve`; a response that may have more than `max_message_bytes` is refused.
        """
        started = time.monotonic()
        statistics = None
        try:
            model = self._find(request.model_name, request.model_version)
            call = read_request(
                request, model.components.spec, remaining_s, self._regions, stream=stream, max_message_bytes=max_message_bytes
            )
            statistics = self._statistics.setdefault(request.model_name, _Statistics())
            updates = self._requests.serve(model, call.request, client, on_unread)
            async with contextlib.aclosing(updates):
                async for update in updates:
                    if isinstance(update, Step):
                        yield write_preview(request, update)
                    else:
                        response = await self._requests.threads.run(write_result, request, call, update, self._regions)
                        _count(statistics, update, 1000 * (time.monotonic() - started))
                        yield response
        except FlashdiffError:
            if statistics:
                statistics.add("fail", 1000 * (time.monotonic() - started))
            raise

    def _find(self, name: str, version: str) -> Model:
        """Triton's own wording, so that clients that match on it work."""
        if version not in ("", VERSION):
            raise NotFoundError("model", f"{name} version {version}", f"every model has version {VERSION} only")
        if not name:
            raise NotFoundError("model", name, "name one")
        return self._models.get(name)


def _count(statistics: _Statistics, reply: Reply, total_ms: float) -> None:
    stages = reply.stages_ms
    statistics.images += len(reply.images)
    statistics.last_ms = round(1000 * time.time())
    statistics.add("success", total_ms)
    statistics.add("queue", reply.timings.queue)
    statistics.add("compute_input", stages["text"] + stages["input_image"])
    statistics.add("compute_infer", stages["denoise"])
    statistics.add("compute_output", stages["decode"] + reply.encoding_ms)
