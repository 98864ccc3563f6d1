"""Triton's gRPC protocol (KServe v2) over the same worker, for stock `tritonclient.grpc`.

A model has a prompt and some numbers as inputs; IMAGES, ENCODED, SEEDS and, in a stream, PREVIEW as outputs.
"""

import asyncio
import contextlib
import logging
import secrets
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf import message_factory
from numpy.typing import NDArray

import flashdiff
from flashdiff.components import Size
from flashdiff.errors import BackendError, FlashdiffError, NotFoundError, RequestError, TensorError
from flashdiff.generate import Order, check_order
from flashdiff.noise import image_seed
from flashdiff.proto.v1 import triton_pb2 as pb
from flashdiff.server.gate import Malformed, client_of
from flashdiff.server.images import ImageFormat
from flashdiff.server.models import Model, Models
from flashdiff.server.scheduler import Priority
from flashdiff.server.service import ImageEncoders, progress
from flashdiff.server.shared_memory import Regions
from flashdiff.server.status import abort
from flashdiff.server.worker import Finished, Step, Worker

TRITON_SERVICE = "inference.GRPCInferenceService"
_VERSION = "1"  # of every model: bundles are told apart by name and hash
_EXTENSIONS = (
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "schedule_policy",
)
_IN_STREAM = 32  # requests of one stream that are worked on at once; the next is read when one is answered
_MAX_ID = 256
_MAX_INPUT_BYTES = 1024 * 1024  # as for requests on the wire

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tensor:
    datatype: str
    config_type: pb.DataType
    shape: tuple[int, ...]
    optional: bool = True


_INPUTS = {
    "PROMPT": _Tensor("BYTES", pb.TYPE_STRING, (1,), optional=False),
    "NEGATIVE_PROMPT": _Tensor("BYTES", pb.TYPE_STRING, (1,)),
    "SEED": _Tensor("UINT64", pb.TYPE_UINT64, (1,)),
    "STEPS": _Tensor("INT32", pb.TYPE_INT32, (1,)),
    "WIDTH": _Tensor("INT32", pb.TYPE_INT32, (1,)),
    "HEIGHT": _Tensor("INT32", pb.TYPE_INT32, (1,)),
    "COUNT": _Tensor("INT32", pb.TYPE_INT32, (1,)),
    "FORMAT": _Tensor("BYTES", pb.TYPE_STRING, (1,)),
}
_OUTPUTS = {
    "IMAGES": _Tensor("UINT8", pb.TYPE_UINT8, (-1, -1, -1, 3)),  # [count, height, width, RGB]
    "ENCODED": _Tensor("BYTES", pb.TYPE_STRING, (-1,)),  # [count] files of FORMAT
    "SEEDS": _Tensor("UINT64", pb.TYPE_UINT64, (-1,)),  # [count]
    "PREVIEW": _Tensor("UINT8", pb.TYPE_UINT8, (-1, -1, 3)),  # [h, w, RGB] at latent size; streams only
}
_NUMPY = {"UINT64": "<u8", "INT32": "<i4"}
_TYPED = {"UINT64": "uint64_contents", "INT32": "int_contents", "BYTES": "bytes_contents"}
_FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")


@dataclass(frozen=True)
class _Call:
    """One inference request, read and checked."""

    model: Model
    order: Order
    outputs: dict[str, dict[str, Any]]  # name -> where in shared memory it goes, if anywhere
    format: ImageFormat
    priority: Priority
    timeout_s: float | None


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
            version=_VERSION,
            last_inference=self.last_ms,
            inference_count=self.images,
            execution_count=self.durations.get("success", [0])[0],
            inference_stats=pb.InferStatistics(**durations),
        )


class TritonService:
    """The calls of `proto/v1/triton.proto`, by their names there."""

    def __init__(self, worker: Worker, models: Models, encoders: ImageEncoders, regions: Regions | None) -> None:
        self._worker, self._models, self._encoders, self._shared = worker, models, encoders, regions
        self._statistics: dict[str, _Statistics] = {}

    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=not self._worker.failure)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not self._worker.failure)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        with contextlib.suppress(NotFoundError):
            self._find(request.name, request.version)
            return pb.ModelReadyResponse(ready=not self._worker.failure)
        return pb.ModelReadyResponse(ready=False)

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        extensions = [*_EXTENSIONS, *(["system_shared_memory"] if self._shared else [])]
        return pb.ServerMetadataResponse(name="flashdiff", version=flashdiff.__version__, extensions=extensions)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        model = await self._found(request, context)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[_VERSION],
            platform=f"flashdiff_{model.identity.backend}",
            inputs=[tensor(name=name, datatype=t.datatype, shape=t.shape) for name, t in _INPUTS.items()],
            outputs=[tensor(name=name, datatype=t.datatype, shape=t.shape) for name, t in _OUTPUTS.items()],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        model = await self._found(request, context)
        config = pb.ModelConfig(
            name=request.name,
            platform=f"flashdiff_{model.identity.backend}",
            backend="flashdiff",
            max_batch_size=0,  # requests are not tensors to be stacked: the server batches the steps within them
            input=[
                pb.ModelInput(name=name, data_type=t.config_type, dims=t.shape, optional=t.optional)
                for name, t in _INPUTS.items()
            ],
            output=[pb.ModelOutput(name=name, data_type=t.config_type, dims=t.shape) for name, t in _OUTPUTS.items()],
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        if request.name:
            await self._found(request, context)
        names = [request.name] if request.name else list(self._models.served)
        stats = [self._statistics.get(name, _Statistics()).message(name) for name in names]
        return pb.ModelStatisticsResponse(model_stats=stats)

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        index = pb.RepositoryIndexResponse.ModelIndex
        served = self._models.served
        models = [index(name=name, version=_VERSION, state="READY") for name in served]
        if not request.ready:
            models += [index(name=name) for name in self._models.available() if name not in served]
        return pb.RepositoryIndexResponse(models=models)

    async def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest, context: Any) -> pb.RepositoryModelLoadResponse:
        try:
            if request.parameters:
                raise TensorError("loading takes no parameters: a bundle has its configuration in its manifest")
            await asyncio.to_thread(self._models.load, request.model_name)
        except FlashdiffError as error:
            await abort(context, BackendError(f"failed to load '{request.model_name[:_MAX_ID]}': {error}"))
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
            found = self._regions.find(request.name)
        except FlashdiffError as error:
            await abort(context, error)
        status = pb.SystemSharedMemoryStatusResponse.RegionStatus
        regions = {r.name: status(name=r.name, key=r.key, offset=r.offset, byte_size=r.byte_size) for r in found}
        return pb.SystemSharedMemoryStatusResponse(regions=regions)

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Any
    ) -> pb.SystemSharedMemoryRegisterResponse:
        try:
            self._regions.register(request.name, request.key, request.offset, request.byte_size)
        except FlashdiffError as error:
            await abort(context, error)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Any
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        try:
            self._regions.unregister(request.name)
        except FlashdiffError as error:
            await abort(context, error)
        return pb.SystemSharedMemoryUnregisterResponse()

    @property
    def _regions(self) -> Regions:
        if self._shared is None:
            raise TensorError("this server was started without --shared-memory")
        return self._shared

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        try:
            updates, loop = (
                self._infer(request, context.time_remaining(), client_of(context), stream=False),
                asyncio.get_running_loop(),
            )
            context.add_done_callback(lambda _: loop.create_task(updates.aclose()))  # when the response is sent
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
        client = client_of(context)

        async def answer(request: pb.ModelInferRequest | Malformed) -> None:
            try:
                if isinstance(request, Malformed):
                    raise TensorError(request.message)
                async for response in self._infer(request, context.time_remaining(), client, stream=True):
                    await responses.put(pb.ModelStreamInferResponse(infer_response=response))
            except Exception as error:
                if not isinstance(error, FlashdiffError):
                    _log.exception("a request of a stream failed")
                message = str(error) if isinstance(error, FlashdiffError) else "internal error"
                failed = pb.ModelInferResponse()
                if not isinstance(request, Malformed):
                    failed.model_name, failed.id = request.model_name[:_MAX_ID], request.id[:_MAX_ID]
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
        self, request: pb.ModelInferRequest, remaining_s: float | None, client: str, *, stream: bool
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The previews, where they are asked for, and the result; errors count as failed in the statistics."""
        started = time.monotonic()
        statistics = None
        try:
            call = self._read(request, remaining_s, stream=stream)
            statistics = self._statistics.setdefault(request.model_name, _Statistics())
            steps = "PREVIEW" in call.outputs
            updates = progress(self._worker, call.model, call.order, call.timeout_s, client, call.priority, steps=steps)
            async with contextlib.aclosing(updates):
                async for update in updates:
                    if isinstance(update, Step):
                        yield _preview(request, update)
                    else:
                        finished, encoding = update, time.monotonic()
                        files = await self._encoders.encode(finished.images, call.format) if "ENCODED" in call.outputs else []
                        response = await self._encoders.run(self._result, request, call, finished, files)
                        now = time.monotonic()
                        _count(statistics, finished, 1000 * (now - started), 1000 * (now - encoding))
                        yield response
        except FlashdiffError:
            if statistics:
                statistics.add("fail", 1000 * (time.monotonic() - started))
            raise

    def _read(self, request: pb.ModelInferRequest, remaining_s: float | None, *, stream: bool) -> _Call:
        model = self._find(request.model_name, request.model_version)
        if len(request.id) > _MAX_ID:
            raise TensorError(f"the request's id has {len(request.id)} characters, at most {_MAX_ID} are taken")
        values = self._read_inputs(request)
        parameters = _parameters(request.parameters)
        outputs = {output.name: _parameters(output.parameters) for output in request.outputs} or {name: {} for name in _OUTPUTS}
        for name in outputs:
            if name not in _OUTPUTS:
                raise TensorError(f"unexpected inference output '{name}' for model '{request.model_name}'")
        if "shared_memory_region" in outputs.get("PREVIEW", {}):
            raise TensorError("output 'PREVIEW' does not go to shared memory: it comes more than once")
        if not stream and "PREVIEW" in outputs:
            if request.outputs:
                raise TensorError("output 'PREVIEW' comes in a stream only: use ModelStreamInfer")
            del outputs["PREVIEW"]
        image_format = values.get("FORMAT", "png")
        if image_format not in _FORMATS:
            raise RequestError("FORMAT", image_format, f"it must be one of {', '.join(_FORMATS)}")
        order = check_order(
            model.components.spec,
            prompt=values["PROMPT"],
            negative_prompt=values.get("NEGATIVE_PROMPT", ""),
            seed=values.get("SEED", secrets.randbits(32)),
            steps=values.get("STEPS"),
            size=Size(values.get("WIDTH", 0), values.get("HEIGHT", 0)) if {"WIDTH", "HEIGHT"} & set(values) else None,
            count=values.get("COUNT", 1),
        )
        return _Call(model, order, outputs, image_format, _priority(parameters), _timeout_s(parameters, remaining_s))

    def _read_inputs(self, request: pb.ModelInferRequest) -> dict[str, Any]:
        """The value of every input given; RequestError names the tensor that is wrong."""
        model = request.model_name
        raws = iter(request.raw_input_contents)
        values: dict[str, Any] = {}
        for tensor in request.inputs:
            if tensor.name not in _INPUTS:
                raise TensorError(f"unexpected inference input '{tensor.name}' for model '{model}'")
            expected = _INPUTS[tensor.name]
            if tensor.name in values:
                raise TensorError(f"input '{tensor.name}' is given twice for model '{model}'")
            if tensor.datatype != expected.datatype:
                raise TensorError(
                    f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{model}' expects "
                    f"'{expected.datatype}'"
                )
            if tuple(tensor.shape) != expected.shape:
                raise TensorError(
                    f"unexpected shape for input '{tensor.name}' for model '{model}': expected {list(expected.shape)}, "
                    f"got {list(tensor.shape)}"
                )
            # Raw contents are those of the inputs that have no place in shared memory, in their order.
            place = _parameters(tensor.parameters)
            raw = self._read_shared(place) if "shared_memory_region" in place else next(raws, None)
            if raw is not None and tensor.HasField("contents"):
                raise TensorError(f"input '{tensor.name}' has both contents and raw contents")
            value = _typed_value(tensor, expected) if raw is None else _raw_value(tensor.name, expected, raw)
            values[tensor.name] = _text(tensor.name, value) if isinstance(value, bytes) else int(value)
        if next(raws, None) is not None:
            raise TensorError(f"more raw input contents than inputs that need them for model '{model}'")
        missing = [name for name, tensor in _INPUTS.items() if not tensor.optional and name not in values]
        if missing:
            raise TensorError(f"expected input '{missing[0]}' for model '{model}' is not there")
        return values

    def _read_shared(self, place: Mapping[str, Any]) -> bytes:
        region, offset, byte_size = _place(place)
        if byte_size > _MAX_INPUT_BYTES:
            raise TensorError(f"an input of {byte_size} bytes is more than the {_MAX_INPUT_BYTES} that are taken")
        return self._regions.read(region, offset, byte_size)

    def _result(
        self, request: pb.ModelInferRequest, call: _Call, finished: Finished, files: Sequence[bytes]
    ) -> pb.ModelInferResponse:
        tensors: dict[str, NDArray[Any] | list[bytes]] = {}
        for name in call.outputs:
            if name == "IMAGES":
                tensors[name] = np.stack(finished.images)
            elif name == "SEEDS":
                tensors[name] = np.array([image_seed(call.order.seed, i) for i in range(call.order.count)], dtype="<u8")
            elif name == "ENCODED":
                tensors[name] = list(files)
        response = _response(request, tensors)
        raws = list(response.raw_output_contents)
        del response.raw_output_contents[:]
        for output, raw in zip(response.outputs, raws, strict=True):
            place = call.outputs[output.name]
            if "shared_memory_region" not in place:
                response.raw_output_contents.append(raw)
                continue
            region, offset, room = _place(place)
            self._regions.write(region, offset, raw, room)
            output.parameters["shared_memory_region"].string_param = region
            output.parameters["shared_memory_offset"].int64_param = offset
            output.parameters["shared_memory_byte_size"].int64_param = len(raw)
        response.parameters["steps"].int64_param = call.order.steps
        response.parameters["bundle_hash"].string_param = call.model.identity.bundle_hash
        for name, spent in vars(finished.timings).items():
            response.parameters[f"{name}_ms"].double_param = spent
        response.parameters["triton_final_response"].bool_param = True
        return response

    def _find(self, name: str, version: str) -> Model:
        """Triton's words, so that who looks for them finds them."""
        if version not in ("", _VERSION):
            raise NotFoundError("model", f"{name} version {version}", f"every model has version {_VERSION} only")
        if not name:
            raise NotFoundError("model", name, "name one")
        return self._models.get(name)

    async def _found(self, request: Any, context: Any) -> Model:
        try:
            return self._find(request.name, request.version)
        except FlashdiffError as error:
            await abort(context, error)


def triton_handler(worker: Worker, models: Models, encoders: ImageEncoders, regions: Regions | None) -> grpc.GenericRpcHandler:
    """The service under Triton's name; without `regions` there is no shared memory."""
    service = TritonService(worker, models, encoders, regions)
    handlers = {}
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        make = grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_unary_rpc_method_handler
        read = message_factory.GetMessageClass(method.input_type).FromString
        write: Callable[[Any], bytes] = message_factory.GetMessageClass(method.output_type).SerializeToString
        handlers[method.name] = make(getattr(service, method.name), read, write)
    return grpc.method_handlers_generic_handler(TRITON_SERVICE, handlers)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("parameter_choice") or "string_param") for name, value in parameters.items()}


def _place(parameters: Mapping[str, Any]) -> tuple[str, int, int]:
    """(region, offset, bytes) of a tensor in shared memory."""
    region, offset, byte_size = (
        parameters.get(f"shared_memory_{name}", default) for name, default in (("region", ""), ("offset", 0), ("byte_size", 0))
    )
    if not isinstance(region, str) or not isinstance(offset, int) or not isinstance(byte_size, int):
        raise TensorError("shared memory takes a region's name, an offset and a number of bytes")
    return region, offset, byte_size


def _raw_value(name: str, tensor: _Tensor, raw: bytes) -> Any:
    """The one element: for BYTES a 4-byte little-endian length and as many bytes."""
    if tensor.datatype == "BYTES":
        if len(raw) < 4 or struct.unpack("<I", raw[:4])[0] != len(raw) - 4:
            raise TensorError(f"input '{name}': {len(raw)} bytes are not one element with its length before it")
        return raw[4:]
    kind = np.dtype(_NUMPY[tensor.datatype])
    if len(raw) != kind.itemsize:
        raise TensorError(f"input '{name}': expected {kind.itemsize} bytes, got {len(raw)}")
    return np.frombuffer(raw, kind)[0]


def _typed_value(tensor: pb.ModelInferRequest.InferInputTensor, expected: _Tensor) -> Any:
    contents = getattr(tensor.contents, _TYPED[expected.datatype])
    if len(contents) != 1:
        raise TensorError(f"input '{tensor.name}': expected 1 element, got {len(contents)}")
    return contents[0]


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(name, value[:40], "it must be valid UTF-8") from None


def _priority(parameters: Mapping[str, Any]) -> Priority:
    """Triton's number: 1 goes first; 0, or none, is the default."""
    number = parameters.get("priority", 0)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise RequestError("priority", number, "it must be a whole number from 0 on")
    named: dict[int, Priority] = {0: "normal", 1: "high", 2: "normal"}
    return named.get(number, "low")


def _timeout_s(parameters: Mapping[str, Any], remaining_s: float | None) -> float | None:
    """The nearer of the call's deadline and the parameter, which is in microseconds."""
    number = parameters.get("timeout", 0)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise RequestError("timeout", number, "it must be a number of microseconds from 0 on")
    limits = [limit for limit in (remaining_s, number / 1e6 if number else None) if limit is not None]
    return min(limits, default=None)


def _preview(request: pb.ModelInferRequest, step: Step) -> pb.ModelInferResponse:
    response = _response(request, {"PREVIEW": step.picture})
    for name, value in (("image", step.index), ("step", step.step), ("total", step.total)):
        response.parameters[name].int64_param = value
    response.parameters["triton_final_response"].bool_param = False
    return response


def _response(request: pb.ModelInferRequest, tensors: Mapping[str, NDArray[Any] | list[bytes]]) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=_VERSION, id=request.id)
    for name, values in tensors.items():
        shape = [len(values)] if isinstance(values, list) else values.shape
        response.outputs.add(name=name, datatype=_OUTPUTS[name].datatype, shape=shape)
        raw = b"".join(struct.pack("<I", len(v)) + v for v in values) if isinstance(values, list) else values.tobytes()
        response.raw_output_contents.append(raw)
    return response


def _count(statistics: _Statistics, finished: Finished, total_ms: float, encoding_ms: float) -> None:
    timings = finished.timings
    statistics.images += len(finished.images)
    statistics.last_ms = round(1000 * time.time())
    statistics.add("success", total_ms)
    statistics.add("queue", timings.queue)
    statistics.add("compute_input", timings.text)
    statistics.add("compute_infer", timings.denoise)
    statistics.add("compute_output", timings.decode + encoding_ms)
