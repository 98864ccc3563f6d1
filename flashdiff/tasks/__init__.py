"""The tasks by name, and how a request's values become an order. Only this folder knows a task's name."""

from collections.abc import Callable, Collection, Mapping, Sequence

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size
from flashdiff.controls import ControlRequest, check_controls, check_steps, read_control
from flashdiff.errors import RequestError
from flashdiff.lora_requests import LoraRequest, check_loras, read_loras
from flashdiff.noise import SEED_LIMIT
from flashdiff.orders import Order, Pixels
from flashdiff.parts import EDITED_IMAGE, LOW_RES_IMAGE, Condition
from flashdiff.references import ReferenceRequest, check_reference, read_reference
from flashdiff.tasks import edit, image_to_image, inpainting, super_resolution, text_to_image, upscaling
from flashdiff.tasks.base import Parameter, Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (text_to_image, image_to_image, inpainting, edit, super_resolution, upscaling)
}

MAX_COUNT = 16
"""Images per request."""

Reader = Callable[[Size | None], Pixels]
"""Reads an image [H, W, 3] of a size; None: of its own."""

_CHARACTERS_PER_TOKEN = 64  # no word of a tokenizer is longer
_MOST_CUT = 1 << 16  # characters of a prompt that may be cut: a tokenizer reads all of it first


def tasks_of(spec: ModelSpec) -> list[Task]:
    """What a model can do: what its spec names, and to enlarge images where it can start from one."""
    named = [TASKS[name] for name in spec.tasks]
    return [*named, upscaling.TASK] if image_to_image.TASK in named else named


def tasks_for(conditions: Collection[Condition]) -> tuple[str, ...]:
    """The names of what a model can do whose network takes these conditions together with the latents."""
    names = {condition.name for condition in conditions}
    if LOW_RES_IMAGE in names:
        return (super_resolution.TASK.name,)
    if EDITED_IMAGE in names:
        return text_to_image.TASK.name, edit.TASK.name
    return text_to_image.TASK.name, image_to_image.TASK.name, inpainting.TASK.name


def trained_task(spec: ModelSpec) -> Task | None:
    """The task that makes the conditions which a model takes and its text encoder does not make; None where it takes none."""
    wanted = {condition.name for condition in spec.taken_by() if condition.part is None}
    return next((task for task in tasks_of(spec) if wanted and wanted <= {*task.conditions_made}), None)


def input_names() -> list[str]:
    """The images that any task takes."""
    return list(dict.fromkeys(name for task in TASKS.values() for name in task.inputs))


def parameters() -> dict[str, Parameter]:
    """The numbers that any task takes, by name."""
    return {parameter.name: parameter for task in TASKS.values() for parameter in task.parameters}


def check_order(
    spec: ModelSpec,
    *,
    prompt: str,
    seed: int = defaults.SEED,
    steps: int | None = None,
    size: Size | None = None,
    count: int = defaults.COUNT,
    negative_prompt: str = "",
    truncate_prompt: bool = False,
    inputs: Mapping[str, Pixels | Reader] | None = None,
    parameters: Mapping[str, float] | None = None,
    controls: Sequence[ControlRequest] = (),
    reference: ReferenceRequest | None = None,
    loras: Sequence[LoraRequest] = (),
) -> Order:
    """An order that this model can fill, with defaults filled in; RequestError names the field, the value and what is allowed.

    The inputs are images [H, W, 3], or functions that read an image of the size that the task needs: these are called last, after
    all other checks. The names of the inputs choose the task, which says what its parameters mean and their bounds; of tasks with
    the same inputs, a parameter that only one of them takes.
    """
    inputs, parameters = inputs or {}, parameters or {}
    _check_text(spec, prompt, negative_prompt, truncate_prompt)
    if not 0 <= seed < SEED_LIMIT:
        raise RequestError("seed", seed, "it must be between 0 and 2^64 - 1")
    steps = spec.sampler.default_steps if steps is None else steps
    if not 1 <= steps <= spec.sampler.max_steps:
        raise RequestError("steps", steps, f"this model takes 1 to {spec.sampler.max_steps}")
    size = check_size(spec, size)
    if not 1 <= count <= MAX_COUNT:
        raise RequestError("count", count, f"it must be between 1 and {MAX_COUNT}")
    task = task_for(spec, inputs, parameters)
    numbers = _checked(spec, task, inputs, parameters)
    check_controls(spec, controls)
    check_reference(spec, reference)
    check_loras(spec, loras)
    order = Order(
        task=task,
        prompt=prompt,
        seed=seed,
        steps=steps,
        size=size,
        count=count,
        negative_prompt=negative_prompt,
        truncate_prompt=truncate_prompt,
        inputs={name: _input(name, given, task.input_size(spec, name, size)) for name, given in inputs.items()},
        parameters=numbers,
        controls={control.name: read_control(control, size) for control in controls},
        reference=read_reference(spec, reference),
        loras=read_loras(spec, loras),
    )
    task.check(spec, order)
    check_steps(order.controls, order.steps_taken)
    return task.laid_out(spec, order)


def _input(name: str, given: Pixels | Reader, size: Size | None) -> Pixels:
    pixels = given(size) if callable(given) else given
    height, width, _ = pixels.shape
    if size and (width, height) != size:
        raise RequestError(name, f"{width}x{height}", f"it must have {size} pixels")
    return pixels


def check_size(spec: ModelSpec, size: Size | None) -> Size:
    """The size, or the model's default for None; RequestError when the model was not built for it."""
    size = spec.sizes[0] if size is None else size
    if size not in spec.sizes:
        raise RequestError("size", str(size), f"this model was built for {', '.join(map(str, spec.sizes))}")
    return size


def _check_text(spec: ModelSpec, prompt: str, negative_prompt: str, truncate: bool) -> None:
    if not prompt.strip():
        raise RequestError("prompt", prompt, "it must not be empty")
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        fitting = _CHARACTERS_PER_TOKEN * spec.prompt_tokens
        if len(text) > (max(fitting, _MOST_CUT) if truncate else fitting):  # refused before a tokenizer spends time on it
            limit = f"the {_MOST_CUT} that are cut" if truncate else f"{spec.prompt_tokens} tokens can be"
            cure = "" if truncate else "; truncate_prompt cuts it"
            raise RequestError(name, text, f"{len(text)} characters are more than {limit}{cure}")
        if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of bytes that are not UTF-8
            raise RequestError(name, text, "it must be valid Unicode text")
    if negative_prompt and spec.sampler.evaluations_per_step == 1:
        raise RequestError("negative_prompt", negative_prompt, "this model runs without guidance, it must be empty")


def task_for(spec: ModelSpec, inputs: Collection[str], parameters: Collection[str] = ()) -> Task:
    """The model's task that takes just these inputs, and that these parameters tell from others; RequestError without one."""
    fitting = [task for task in tasks_of(spec) if set(task.inputs) == set(inputs) and task.telling <= {*parameters}]
    if fitting:
        return max(fitting, key=lambda task: len(task.telling))
    if not inputs:
        task = tasks_of(spec)[0]
        raise RequestError(task.inputs[0], None, f"this model makes no image without it ({task.name})")
    taken = "; ".join(f"{task.name} takes {', '.join(task.inputs) or 'none'}" for task in tasks_of(spec))
    raise RequestError("inputs", ", ".join(inputs), f"of the images a request may bring, {taken}")


def _checked(spec: ModelSpec, task: Task, inputs: Collection[str], given: Mapping[str, float]) -> dict[str, float]:
    """Every parameter of the task, defaults filled in."""
    known = {parameter.name: parameter for parameter in task.parameters_of(spec)}
    for name, value in given.items():
        if name not in known:
            raise RequestError(name, value, _remedy(spec, name, inputs))
    return {name: parameter.check(given.get(name)) for name, parameter in known.items()}


def _remedy(spec: ModelSpec, parameter: str, inputs: Collection[str]) -> str:
    """The inputs that a request with these ones needs for its parameter to have a meaning."""
    for task in tasks_of(spec):
        if parameter in {known.name for known in task.parameters_of(spec)}:
            needed = " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in task.inputs)
            return f"it needs {needed}{' alone' if set(inputs) > set(task.inputs) else ''} ({task.name})"
    return "no task of this model takes it"
