"""Triton's gRPC protocol (KServe v2) over the same worker, for stock `tritonclient.grpc`.

A model has a prompt and some numbers as inputs; IMAGES, ENCODED, SEEDS and, in a stream, PREVIEW as outputs.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import message_factory

import flashdiff
from flashdiff.errors import BackendError, FlashdiffError, NotFoundError, TensorError
from flashdiff.proto.v1 import triton_pb2 as pb
from flashdiff.server.gate import Malformed, client_of
from flashdiff.server.jobs import Step
from flashdiff.server.models import Model
from flashdiff.server.requests import Reply, Requests
from flashdiff.server.shared_memory import Regions, offered
from flashdiff.server.status import abort
from flashdiff.server.triton_convert import (
    MAX_ID,
    OUTPUTS,
    VERSION,
    inputs_of,
    read_request,
    write_preview,
    write_result,
)
from flashdiff.server.unread import end_of_call, when_answered
from flashdiff.server.worker import Worker

TRITON_SERVICE = "inference.GRPCInferenceService"
_EXTENSIONS = (
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "schedule_policy",
)
_IN_STREAM = 32  # requests of one stream that are worked on at once; the next is read when one is answered

_log = logging.getLogger(__name__)


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
    """The calls of `proto/v1/triton.proto`, by their names there."""

    def __init__(self, worker: Worker, requests: Requests, regions: Regions | None) -> None:
        self._worker, self._requests, self._models, self._regions = worker, requests, requests.models, regions
        self._statistics: dict[str, _Statistics] = {}

    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=not self._worker.failure)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._worker.is_ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        with contextlib.suppress(NotFoundError):
            self._find(request.name, request.version)
            return pb.ModelReadyResponse(ready=self._worker.is_ready)
        return pb.ModelReadyResponse(ready=False)

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        extensions = [*_EXTENSIONS, *(["system_shared_memory"] if self._regions else [])]
        return pb.ServerMetadataResponse(name="flashdiff", version=flashdiff.__version__, extensions=extensions)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        model = await self._found(request, context)
        inputs = inputs_of(model.components.spec)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform=f"flashdiff_{model.identity.backend}",
            inputs=[tensor(name=name, datatype=t.datatype, shape=t.shape) for name, t in inputs.items()],
            outputs=[tensor(name=name, datatype=t.datatype, shape=t.shape) for name, t in OUTPUTS.items()],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        model = await self._found(request, context)
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

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        try:
            if request.name:
                self._find(request.name, request.version)
        except NotFoundError as error:  # Triton's status for it, here alone
            await abort(context, TensorError(str(error)))
        names = [request.name] if request.name else list(self._models.served)
        stats = [self._statistics.get(name, _Statistics()).message(name) for name in names]
        return pb.ModelStatisticsResponse(model_stats=stats)

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        index = pb.RepositoryIndexResponse.ModelIndex
        served = self._models.served
        models = [index(name=name, version=VERSION, state="READY") for name in served]
        if not request.ready:
            models += [index(name=name) for name in self._models.available() if name not in served]
        return pb.RepositoryIndexResponse(models=models)

    async def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest, context: Any) -> pb.RepositoryModelLoadResponse:
        try:
            if request.parameters:
                raise TensorError("loading takes no parameters: a bundle has its configuration in its manifest")
            await asyncio.to_thread(self._models.load, request.model_name)
        except FlashdiffError as error:
            await abort(context, BackendError(f"failed to load '{request.model_name[:MAX_ID]}': {error}"))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        try:
            with contextlib.suppress(NotFoundError):  # not there, as asked
                self._models.unload(request.model_name)
        except FlashdiffError as error:
            await abort(context, error)
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Any
    ) -> pb.SystemSharedMemoryStatusResponse:
        try:
            found = offered(self._regions).find(request.name)
        except FlashdiffError as error:
            await abort(context, error)
        status = pb.SystemSharedMemoryStatusResponse.RegionStatus
        regions = {r.name: status(name=r.name, key=r.key, offset=r.offset, byte_size=r.byte_size) for r in found}
        return pb.SystemSharedMemoryStatusResponse(regions=regions)

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Any
    ) -> pb.SystemSharedMemoryRegisterResponse:
        try:
            offered(self._regions).register(request.name, request.key, request.offset, request.byte_size)
        except FlashdiffError as error:
            await abort(context, error)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Any
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        try:
            offered(self._regions).unregister(request.name)
        except FlashdiffError as error:
            await abort(context, error)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        try:
            updates = self._infer(request, context.time_remaining(), client_of(context), end_of_call(), stream=False)
            when_answered(updates.aclose)
            return await anext(updates)
        except FlashdiffError as error:
            await abort(context, error)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Requests of one stream run side by side; an error is told in the stream, which goes on."""
        # Both are bounded, so that a client who sends and does not read waits for itself, and holds room by what it has not read.
        responses: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue(1)
        room = asyncio.Semaphore(_IN_STREAM)
        client, end_call = client_of(context), end_of_call()

        async def answer(request: pb.ModelInferRequest | Malformed) -> None:
            try:
                if isinstance(request, Malformed):
                    raise TensorError(request.message)
                async for response in self._infer(request, context.time_remaining(), client, end_call, stream=True):
                    await responses.put(pb.ModelStreamInferResponse(infer_response=response))
            except Exception as error:
                if not isinstance(error, FlashdiffError):
                    _log.exception("a request of a stream failed")
                message = str(error) if isinstance(error, FlashdiffError) else "internal error"
                failed = pb.ModelInferResponse()
                if not isinstance(request, Malformed):
                    failed.model_name, failed.id = request.model_name[:MAX_ID], request.id[:MAX_ID]
                await responses.put(pb.ModelStreamInferResponse(error_message=message, infer_response=failed))
            finally:
                room.release()

        async def read() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    async for request in requests:
                        await room.acquire()
                        group.create_task(answer(request))
            except Exception:
                await responses.put(None)
                raise
            await responses.put(None)  # not when cancelled: then nobody reads any more

        reading = asyncio.ensure_future(read())
        try:
            while (response := await responses.get()) is not None:
                yield response
            await reading
        finally:
            reading.cancel()

    async def _infer(
        self,
        request: pb.ModelInferRequest,
        remaining_s: float | None,
        client: str,
        end_call: Callable[[], None],
        *,
        stream: bool,
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The previews, where they are asked for, and the result; errors count as failed in the statistics."""
        started = time.monotonic()
        statistics = None
        try:
            model = self._find(request.model_name, request.model_version)
            call = read_request(request, model.components.spec, remaining_s, self._regions, stream=stream)
            statistics = self._statistics.setdefault(request.model_name, _Statistics())
            updates = self._requests.serve(model, call.request, client, end_call)
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
        """Triton's words, so that who looks for them finds them."""
        if version not in ("", VERSION):
            raise NotFoundError("model", f"{name} version {version}", f"every model has version {VERSION} only")
        if not name:
            raise NotFoundError("model", name, "name one")
        return self._models.get(name)

    async def _found(self, request: Any, context: Any) -> Model:
        try:
            return self._find(request.name, request.version)
        except FlashdiffError as error:
            await abort(context, error)


def triton_handler(worker: Worker, requests: Requests, regions: Regions | None) -> grpc.GenericRpcHandler:
    """The service under Triton's name; without `regions` there is no shared memory."""
    service = TritonService(worker, requests, regions)
    handlers = {}
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        make = grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_unary_rpc_method_handler
        read = message_factory.GetMessageClass(method.input_type).FromString
        write: Callable[[Any], bytes] = message_factory.GetMessageClass(method.output_type).SerializeToString
        handlers[method.name] = make(getattr(service, method.name), read, write)
    return grpc.method_handlers_generic_handler(TRITON_SERVICE, handlers)


def _count(statistics: _Statistics, reply: Reply, total_ms: float) -> None:
    stages = reply.timings.by_stage(reply.model.components.spec)
    statistics.images += len(reply.images)
    statistics.last_ms = round(1000 * time.time())
    statistics.add("success", total_ms)
    statistics.add("queue", reply.timings.queue)
    statistics.add("compute_input", stages["text"] + stages["input_image"])
    statistics.add("compute_infer", stages["denoise"])
    statistics.add("compute_output", stages["decode"] + reply.encoding_ms)
