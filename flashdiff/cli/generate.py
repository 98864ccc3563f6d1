"""`flashdiff generate`."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flashdiff import defaults
from flashdiff.cli.build_options import OF_REQUESTS, add_build_arguments, refuse_without_base
from flashdiff.cli.bundles import bundle_of_base, find_bundles
from flashdiff.cli.shared import Once, assignment, parse_control
from flashdiff.errors import ConfigError

if TYPE_CHECKING:
    from flashdiff.controls import ControlRequest
    from flashdiff.engines.runtime.engine import Engine
    from flashdiff.lora_requests import LoraRequest
    from flashdiff.references import ReferenceRequest

T = TypeVar("T")
_NUMBERS = ("scale", "start", "end")
"""Of a control, in the order in which --control takes them."""
_PARAMETERS = {
    "strength": (
        "SHARE",
        "with --image: share of the steps to take, up to 1; a lower share keeps more of the image; "
        f"default: {defaults.STRENGTH}, with --mask 1, with --upscale {defaults.UPSCALE_STRENGTH}",
    ),
    "upscale": ("SCALE", "with --image, of any size: make it 1 to 8 times as wide and as high, in tiles of --size"),
    "noise_level": (
        "LEVEL",
        "with --image, for a model that upscales it: a whole number, how much noise the image gets before the model reads it; "
        f"default: {defaults.NOISE_LEVEL}",
    ),
}
"""Numbers of tasks that have an option of their own: what it calls its value, and its help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle, or 'avatars', the embedded model; left out with --base")
    prompt = parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a .png, .jpg or .webp file; --count N makes NAME-0, NAME-1, ..."
    )
    parser.add_argument("--steps", type=int, help="steps of the sampler; default: the model's")
    parser.add_argument("--seed", type=int, default=defaults.SEED, help="default: %(default)s; image i has seed + i")
    parser.add_argument("--negative-prompt", metavar="PROMPT", help="what images should not show, for a model with guidance")
    parser.add_argument("--size", metavar="WxH", help="image size; default: the model's")
    parser.add_argument(
        "--truncate-prompt", action="store_true", help="cut a prompt to the tokens that the model takes, in place of refusing it"
    )
    parser.add_argument("--count", type=int, default=defaults.COUNT, help="number of images; default: %(default)s")
    parser.add_argument(
        "--image",
        dest="inputs",
        type=_value_of("image", Path),
        action="append",
        default=[],
        metavar="FILE",
        help="a PNG, JPEG or WebP file to start from",
    )
    parser.add_argument(
        "--mask",
        dest="inputs",
        type=_value_of("mask", Path),
        action="append",
        metavar="FILE",
        help="with --image, of the same size: white where the image is replaced; the rest is kept",
    )
    for name, (metavar, text) in _PARAMETERS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest="parameters",
            type=_value_of(name, float),
            action="append",
            default=[],  # none here: a parameter without its image is refused
            metavar=metavar,
            help=text,
        )
    parser.add_argument(
        "--input",
        dest="inputs",
        type=assignment(Path),
        action="append",
        metavar="NAME=FILE",
        help="any other image that a task of the model takes",
    )
    parser.add_argument(
        "--parameter",
        dest="parameters",
        type=assignment(float),
        action="append",
        metavar="NAME=NUMBER",
        help="any other number that a task of the model takes",
    )
    parser.add_argument(
        "--control",
        dest="controls",
        action="append",
        default=[],
        metavar="NAME=FILE[:SCALE[:START[:END]]]",
        help="an image that steers the steps, for a bundle that was built with controls; its scale is 0 to 2, default "
        f"{defaults.CONTROL_SCALE:g}; it counts from START to END, shares of the steps; may be repeated",
    )
    parser.add_argument(
        "--reference",
        action=Once,
        metavar="FILE[:SCALE]",
        help="an image that goes with the prompt, for a bundle that was built with an IP-Adapter; its scale is 0 to 2, default "
        f"{defaults.REFERENCE_SCALE:g}",
    )
    parser.add_argument(
        "--with-lora",
        dest="with_loras",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA for this request alone, a .safetensors file or a folder, for a bundle that was built with --lora-slots; its "
        f"scale is up to {defaults.MAX_LORA_SCALE:g} either way, default {defaults.LORA_SCALE:g}; may be repeated",
    )
    building = parser.add_argument_group(
        "build from a base", "the bundle is kept in the cache, and reused while it is up to date"
    )
    building.add_argument(
        "--base",
        action=_base_before(prompt),
        metavar="BASE",
        help="a diffusers model directory, a hub id or a recipe in the place of BUNDLE; it is built for --size",
    )
    add_build_arguments(parser, building, without=OF_REQUESTS)


def _base_before(prompt: argparse.Action) -> type[argparse.Action]:
    """An action that stores --base, with which the only positional argument is the prompt."""

    class StoreBase(argparse.Action):
        def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: str | None = None) -> None:
            prompt.required = False
            namespace.base = values

    return StoreBase


def _value_of(name: str, kind: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """Reads an option's text as the value of one of a task's inputs or parameters."""

    def read(text: str) -> tuple[str, T]:
        return name, kind(text)

    read.__name__ = getattr(kind, "__name__", name)  # what argparse calls a wrong value
    return read


def run(options: argparse.Namespace) -> None:
    """Make images with a bundle, in this process: the same pixels that a server with this bundle sends."""
    from flashdiff.engines.config import parse_sizes
    from flashdiff.engines.runtime.engine import open_bundle
    from flashdiff.generate import generate
    from flashdiff.noise import image_seed
    from flashdiff.reading import MAX_BYTES, read_file
    from flashdiff.server.images import FORMAT_OF_SUFFIX, encode_image, readers
    from flashdiff.tasks import check_order

    image_format = FORMAT_OF_SUFFIX.get(options.out.suffix.lower())
    if image_format is None:
        raise ConfigError(f"--out {options.out}: the name must end in .png, .jpg or .webp")
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {options.out.parent}")
    # Before a bundle is built, which takes minutes.
    sizes = parse_sizes(options.size) if options.size else [None]
    if len(sizes) > 1:
        raise ConfigError(f"--size {options.size}: give one, an image has no other")
    for given in (options.inputs, options.parameters):
        if twice := [name for name, count in Counter(name for name, _ in given).items() if count > 1]:
            raise ConfigError(f"'{twice[0]}' is given twice; an image and a number of a task have one value")
    inputs = readers({name: read_file(path, MAX_BYTES) for name, path in options.inputs})
    controls = [_control(text) for text in options.controls]
    reference = _reference(options.reference) if options.reference is not None else None
    files = [_lora_file(text) for text in options.with_loras]
    bundle, prompt = _bundle_and_prompt(options)
    engine = open_bundle(bundle)
    order = check_order(
        engine.spec,
        prompt=prompt,
        seed=options.seed,
        steps=options.steps,
        size=sizes[0],
        count=options.count,
        negative_prompt=options.negative_prompt or "",
        truncate_prompt=options.truncate_prompt,
        inputs=inputs,
        parameters=dict(options.parameters),
        controls=controls,
        reference=reference,
        loras=_loras(engine, files),
    )
    for index, pixels in enumerate(generate(engine, [order])[0]):
        path = options.out if order.count == 1 else options.out.with_stem(f"{options.out.stem}-{index}")
        try:
            path.write_bytes(encode_image(pixels, image_format))
        except OSError as error:
            raise ConfigError(f"{path}: cannot write: {error.strerror or error}") from None
        print(f"{path}  {order.whole_size}  steps {order.steps}  seed {image_seed(order.seed, index)}")


def _control(text: str) -> "ControlRequest":
    """Reads `NAME=FILE[:SCALE[:START[:END]]]`."""
    from flashdiff.reading import MAX_BYTES, read_file
    from flashdiff.server.images import control_request

    name, value = parse_control(text, "FILE[:SCALE[:START[:END]]]")
    file, numbers = _file_and_numbers(f"--control {name}=", value, _NUMBERS)
    return control_request(name, read_file(file, MAX_BYTES), **dict(zip(_NUMBERS, numbers, strict=False)))


def _reference(text: str) -> "ReferenceRequest":
    """Reads `FILE[:SCALE]`."""
    from flashdiff.reading import MAX_BYTES, read_file
    from flashdiff.server.images import reference_request

    if not text:
        raise ConfigError("--reference '': give FILE[:SCALE]")
    file, numbers = _file_and_numbers("--reference ", text, _NUMBERS[:1])
    return reference_request(read_file(file, MAX_BYTES), scale=numbers[0] if numbers else None)


def _file_and_numbers(option: str, text: str, names: Sequence[str]) -> tuple[Path, list[float]]:
    """`FILE[:NUMBER]...`, of a file whose name may itself hold colons; ConfigError names the option where there is none."""
    file, numbers = text, list[float]()
    while len(numbers) < len(names) and not Path(file).exists():
        start, is_there, last = file.rpartition(":")
        try:
            numbers.insert(0, float(last if is_there else ""))
        except ValueError:
            break
        file = start
    if not Path(file).exists():
        raise ConfigError(f"{option}{text}: there is no such file; numbers may follow its name ({':'.join(names)})")
    return Path(file), numbers


def _lora_file(text: str) -> tuple[Path, float]:
    """Reads `FILE[:SCALE]`: the file with the tensors, and the scale."""
    from flashdiff.lora_slots import find_weights

    place, scale, most = text, defaults.LORA_SCALE, defaults.MAX_LORA_SCALE
    if not Path(text).exists():
        place, _, number = text.rpartition(":")
        try:
            scale = float(number)
        except ValueError:
            place = ""
    file = find_weights(Path(place)) if place else None
    if file is None:
        raise ConfigError(f"--with-lora '{text}': give a .safetensors file or a folder with a LoRA, then :SCALE if any")
    if not abs(scale) <= most:
        raise ConfigError(f"--with-lora '{text}': the scale after ':' must be between {-most:g} and {most:g}")
    return file, scale


def _loras(engine: "Engine", files: Sequence[tuple[Path, float]]) -> "list[LoraRequest]":
    """The LoRAs of a request, by their numbers; RequestError or LoraError for those that the bundle does not take."""
    from flashdiff.lora_requests import LoraRequest, check_loras
    from flashdiff.lora_slots import read_slot_lora

    given = [LoraRequest(name=str(index + 1), scale=scale) for index, (_, scale) in enumerate(files)]
    check_loras(engine.spec, given)
    if engine.slots is None:
        return []
    return [
        replace(lora, values=read_slot_lora(file, engine.slots, f"--with-lora {file}").values)
        for lora, (file, _) in zip(given, files, strict=True)
    ]


def _bundle_and_prompt(options: argparse.Namespace) -> tuple[Path, str]:
    if options.base is None:
        refuse_without_base(options, without=OF_REQUESTS)
        return find_bundles([Path(options.bundle)])[0], options.prompt
    if options.prompt is not None:
        raise ConfigError(f"--base {options.base}: it takes the place of BUNDLE; leave '{options.bundle}' out")
    if options.controls:
        raise ConfigError(
            f"--base {options.base}: it is built without controls; build a bundle with build-engine --control first"
        )
    if options.reference is not None:
        raise ConfigError(
            f"--base {options.base}: it is built without an IP-Adapter; build a bundle with build-engine --reference first"
        )
    if options.with_loras and not (options.lora_slots or options.base.endswith(".toml")):
        raise ConfigError(f"--base {options.base}: it is built without LoRA slots; give --lora-slots too, or fuse with --lora")
    return bundle_of_base(options, without=OF_REQUESTS - {"size"}), options.bundle
