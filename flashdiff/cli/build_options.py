"""The options that say what a bundle is built from and how: of `build-engine`, and of commands that build one for `--base`."""

import argparse
from pathlib import Path

from flashdiff import defaults
from flashdiff.cli.shared import Once, add_sampling_arguments, listed
from flashdiff.engines.backends import BACKENDS
from flashdiff.errors import ConfigError

_VALUES = (
    "revision", "variant", "config", "vae", "reference", "reference-encoder", "lora-slots", "lora-rank", "backend",
    "precision", "calibration-prompts", "size", "decode-tile", "batch", "guidance", "preset", "sampler", "spacing",
    "timesteps", "eta", "shift", "prediction", "steps",
)  # fmt: skip
"""Options with a value, but for --lora, which may be repeated."""
OF_REQUESTS = frozenset({"size", "steps", "control", "reference", "reference-encoder"})
"""Those that are a request's own in `generate`."""


def add_build_arguments(
    parser: argparse.ArgumentParser, group: argparse._ArgumentGroup | None = None, *, without: frozenset[str] = frozenset()
) -> None:
    """All but the base, in the group of help if given.

    Options that are left out stay None: a recipe may be given instead, and `BuildRecipe` has the defaults.
    """
    to = group or parser
    to.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="LORA[:WEIGHT]",
        help="fuse this LoRA: a folder, a .safetensors file, owner/name[/file][@revision] on the hub, or the shipped "
        "avatars-flash; may be repeated",
    )
    add_base_arguments(to)
    if "control" not in without:
        to.add_argument(
            "--control",
            dest="controls",
            action="append",
            default=[],
            metavar="NAME=CONTROL",
            help="a ControlNet or T2I-adapter that requests may name so: a folder, owner/name[/folder][@revision] on the hub, or "
            "the shipped avatars-edges, avatars-silhouettes and avatars-tile; may be repeated",
        )
    if "reference" not in without:
        to.add_argument(
            "--reference",
            action=Once,
            metavar="ADAPTER",
            help="an IP-Adapter, with which requests may bring a reference image: a .safetensors file, "
            "owner/name/file[@revision] on the hub, or the shipped avatars-identity",
        )
        to.add_argument(
            "--reference-encoder",
            metavar="FOLDER",
            help="the adapter's CLIP image encoder: a folder, or owner/name[/folder][@revision] on the hub; default: the folder "
            "image_encoder next to the adapter",
        )
    to.add_argument(
        "--lora-slots",
        type=int,
        metavar="N",
        help=f"let each request bring up to N LoRAs, 1 to {defaults.MAX_LORA_SLOTS}, which are not fused; default: none",
    )
    to.add_argument(
        "--lora-rank", type=int, metavar="R", help=f"of these slots, 1 to {defaults.MAX_LORA_RANK}; default: {defaults.LORA_RANK}"
    )
    to.add_argument(
        "--backend", choices=tuple(BACKENDS), help="default: the fastest that runs here - torch on an NVIDIA GPU, else openvino"
    )
    to.add_argument(
        "--precision",
        choices=defaults.PRECISIONS,
        help=f"default: {defaults.PRECISION}; int8 is for openvino and onnxruntime on CPUs, and for TensorRT; fp8 for torch and "
        "TensorRT on GPUs of compute capability 8.9 or later; auto builds those that run here, measures them and keeps one",
    )
    to.add_argument(
        "--calibration-prompts",
        metavar="FILE",
        help="for int8, fp8 and auto: a text file with a prompt a line, like those that will be served; default for the embedded "
        "model: prompts of its world",
    )
    if "size" not in without:
        to.add_argument("--size", metavar="WxH[,WxH...]", help="image sizes; default: the size the base was trained at")
    to.add_argument(
        "--decode-tile",
        type=int,
        metavar="PIXELS",
        help="decode images with a longer side than this in tiles of it, which takes less memory; default: decode them at once",
    )
    to.add_argument("--batch", metavar="N[,N...]", help=f"batch sizes; default: {listed(defaults.BATCH_SIZES)}")
    to.add_argument(
        "--version-compatible", action="store_true", help="TensorRT plans that run on later versions too, more slowly"
    )
    to.add_argument(
        "--compile",
        action="store_true",
        help="with --backend torch: compile every part to machine code for this kind of machine and this version of torch; takes "
        "minutes and needs a C++ compiler",
    )
    to.add_argument(
        "--guidance", type=float, help="scale for a model that is not a flash student; 1 or less: none; default: the family's"
    )
    to.add_argument(
        "--compare-stock",
        action=argparse.BooleanOptionalAction,
        help="compare an image with the stock diffusers pipeline of the model before publishing; default: yes",
    )
    add_sampling_arguments(parser, with_steps="steps" not in without, with_presets=group is None)


def add_base_arguments(to: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Which files of a base are read."""
    to.add_argument("--revision", metavar="REV", help="branch, tag or commit of a base on the hub; the same as BASE@REV")
    to.add_argument(
        "--variant", metavar="NAME", help="which weights of the base, such as fp16; default: the plain ones, else the only ones"
    )
    to.add_argument(
        "--config",
        metavar="FOLDER",
        help="of a base that is a single .safetensors file: a model directory or hub id with its configuration and the parts "
        "that it lacks; default: the one that diffusers finds on the hub",
    )
    to.add_argument(
        "--decoder",
        "--vae",
        dest="vae",
        metavar="FOLDER",
        help="an autoencoder in the place of the base's own: a folder, a hub id (owner/name), or tiny, the small one of TAESD's "
        "form for the base's family",
    )


def base_of(base: str, revision: str | None) -> str:
    """The base with its revision; ConfigError for a revision of a base that is not on the hub."""
    if revision is None:
        return base
    if Path(base).exists() or base.count("/") != 1 or "@" in base:
        raise ConfigError(f"--revision {revision}: it is for a base on the hub, owner/name, and {base} is none")
    return f"{base}@{revision}"


def build_command(options: argparse.Namespace, *, without: frozenset[str] = frozenset()) -> list[str]:
    """The `build-engine` command line, but for --out, that builds what these options say."""
    command = ["build-engine", options.base, *(f"--lora={lora}" for lora in options.lora)]
    command += [f"--control={control}" for control in _controls(options, without)]
    command += [f"--{name}={_value(options, name)}" for name in _given(options, without)]
    if options.version_compatible:
        command.append("--version-compatible")
    if options.compile:
        command.append("--compile")
    if options.compare_stock is not None:
        command.append("--compare-stock" if options.compare_stock else "--no-compare-stock")
    return command


def refuse_without_base(options: argparse.Namespace, *, without: frozenset[str] = frozenset()) -> None:
    """ConfigError for a build option together with a bundle, which is built already."""
    named = [
        *(["lora"] if options.lora else []),
        *(["control"] if _controls(options, without) else []),
        *_given(options, without),
    ]
    if options.version_compatible:
        named.append("version-compatible")
    if options.compile:
        named.append("compile")
    if options.compare_stock is not None:
        named.append("compare-stock")
    if named:
        raise ConfigError(f"--{named[0]} is settled when a bundle is built: give it to build-engine, or with --base")


def _controls(options: argparse.Namespace, without: frozenset[str]) -> list[str]:
    return [] if "control" in without else options.controls


def _given(options: argparse.Namespace, without: frozenset[str]) -> list[str]:
    return [name for name in _VALUES if name not in without and _value(options, name) is not None]


def _value(options: argparse.Namespace, name: str) -> object:
    return getattr(options, name.replace("-", "_"))
