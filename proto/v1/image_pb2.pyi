from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_JPEG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]
    IMAGE_FORMAT_RAW_RGB: _ClassVar[ImageFormat]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_JPEG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
IMAGE_FORMAT_RAW_RGB: ImageFormat
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority
PRIORITY_LOW: Priority

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "seed", "steps", "width", "height", "count", "format", "model", "negative_prompt", "quality", "priority", "image", "strength", "inputs", "parameters", "truncate_prompt", "controls", "reference", "noise_level", "loras", "upscale")
    class InputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    NOISE_LEVEL_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    UPSCALE_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    count: int
    format: ImageFormat
    model: str
    negative_prompt: str
    quality: int
    priority: Priority
    image: bytes
    strength: float
    inputs: _containers.ScalarMap[str, bytes]
    parameters: _containers.ScalarMap[str, float]
    truncate_prompt: bool
    controls: _containers.RepeatedCompositeFieldContainer[Control]
    reference: Reference
    noise_level: float
    loras: _containers.RepeatedCompositeFieldContainer[Lora]
    upscale: float
    def __init__(self, prompt: _Optional[str] = ..., seed: _Optional[int] = ..., steps: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., count: _Optional[int] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., model: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., quality: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ..., image: _Optional[bytes] = ..., strength: _Optional[float] = ..., inputs: _Optional[_Mapping[str, bytes]] = ..., parameters: _Optional[_Mapping[str, float]] = ..., truncate_prompt: _Optional[bool] = ..., controls: _Optional[_Iterable[_Union[Control, _Mapping]]] = ..., reference: _Optional[_Union[Reference, _Mapping]] = ..., noise_level: _Optional[float] = ..., loras: _Optional[_Iterable[_Union[Lora, _Mapping]]] = ..., upscale: _Optional[float] = ...) -> None: ...

class Reference(_message.Message):
    __slots__ = ("image", "scale")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    scale: float
    def __init__(self, image: _Optional[bytes] = ..., scale: _Optional[float] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("name", "image", "scale", "start", "end")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    name: str
    image: bytes
    scale: float
    start: float
    end: float
    def __init__(self, name: _Optional[str] = ..., image: _Optional[bytes] = ..., scale: _Optional[float] = ..., start: _Optional[float] = ..., end: _Optional[float] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("name", "scale")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    name: str
    scale: float
    def __init__(self, name: _Optional[str] = ..., scale: _Optional[float] = ...) -> None: ...

class GenerateUpdate(_message.Message):
    __slots__ = ("preview", "result")
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    preview: Preview
    result: GenerateResponse
    def __init__(self, preview: _Optional[_Union[Preview, _Mapping]] = ..., result: _Optional[_Union[GenerateResponse, _Mapping]] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("image", "step", "steps", "width", "height", "png")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    PNG_FIELD_NUMBER: _ClassVar[int]
    image: int
    step: int
    steps: int
    width: int
    height: int
    png: bytes
    def __init__(self, image: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., png: _Optional[bytes] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ServedModel]
    def __init__(self, models: _Optional[_Iterable[_Union[ServedModel, _Mapping]]] = ...) -> None: ...

class ServedModel(_message.Message):
    __slots__ = ("name", "model", "sizes", "default_steps", "max_steps", "max_prompt_tokens", "takes_negative_prompt", "tasks", "devices", "controls", "takes_reference", "loras", "max_loras", "max_noise_level")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TAKES_NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    TAKES_REFERENCE_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    MAX_LORAS_FIELD_NUMBER: _ClassVar[int]
    MAX_NOISE_LEVEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: Model
    sizes: _containers.RepeatedCompositeFieldContainer[Size]
    default_steps: int
    max_steps: int
    max_prompt_tokens: int
    takes_negative_prompt: bool
    tasks: _containers.RepeatedScalarFieldContainer[str]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    controls: _containers.RepeatedScalarFieldContainer[str]
    takes_reference: bool
    loras: _containers.RepeatedScalarFieldContainer[str]
    max_loras: int
    max_noise_level: int
    def __init__(self, name: _Optional[str] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., sizes: _Optional[_Iterable[_Union[Size, _Mapping]]] = ..., default_steps: _Optional[int] = ..., max_steps: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., takes_negative_prompt: _Optional[bool] = ..., tasks: _Optional[_Iterable[str]] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., controls: _Optional[_Iterable[str]] = ..., takes_reference: _Optional[bool] = ..., loras: _Optional[_Iterable[str]] = ..., max_loras: _Optional[int] = ..., max_noise_level: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "failure")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    failure: str
    def __init__(self, name: _Optional[str] = ..., failure: _Optional[str] = ...) -> None: ...

class Size(_message.Message):
    __slots__ = ("width", "height")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class EstimateResponse(_message.Message):
    __slots__ = ("expected_ms", "pending_images")
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    PENDING_IMAGES_FIELD_NUMBER: _ClassVar[int]
    expected_ms: float
    pending_images: int
    def __init__(self, expected_ms: _Optional[float] = ..., pending_images: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("images", "steps", "width", "height", "format", "timings", "model", "denoise_batches")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DENOISE_BATCHES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    steps: int
    width: int
    height: int
    format: ImageFormat
    timings: Timings
    model: Model
    denoise_batches: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., steps: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., denoise_batches: _Optional[_Iterable[int]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("data", "seed")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    seed: int
    def __init__(self, data: _Optional[bytes] = ..., seed: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "text_ms", "denoise_ms", "decode_ms", "image_encoding_ms", "total_ms", "input_image_ms", "part_ms")
    class PartMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    TEXT_MS_FIELD_NUMBER: _ClassVar[int]
    DENOISE_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ENCODING_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    INPUT_IMAGE_MS_FIELD_NUMBER: _ClassVar[int]
    PART_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    text_ms: float
    denoise_ms: float
    decode_ms: float
    image_encoding_ms: float
    total_ms: float
    input_image_ms: float
    part_ms: _containers.ScalarMap[str, float]
    def __init__(self, queue_ms: _Optional[float] = ..., text_ms: _Optional[float] = ..., denoise_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., image_encoding_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., input_image_ms: _Optional[float] = ..., part_ms: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "bundle_hash", "family", "backend", "precision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_HASH_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    bundle_hash: str
    family: str
    backend: str
    precision: str
    def __init__(self, name: _Optional[str] = ..., bundle_hash: _Optional[str] = ..., family: _Optional[str] = ..., backend: _Optional[str] = ..., precision: _Optional[str] = ...) -> None: ...
