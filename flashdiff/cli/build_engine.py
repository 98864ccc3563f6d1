"""`flashdiff build-engine`."""

import argparse
from pathlib import Path

from flashdiff import defaults
from flashdiff.cli.shared import add_sampling_arguments, given_sampling, listed, need, parse_lora, quiet_libraries
from flashdiff.engines.backends import BACKENDS
from flashdiff.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that are left out stay None here: a recipe may be given instead, and `BuildRecipe` has the defaults."""
    parser.add_argument(
        "base",
        metavar="BASE|RECIPE",
        help="a diffusers model directory, a hub id, the embedded model 'avatars'; or a .toml recipe, with --out alone",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FOLDER[:WEIGHT]",
        help="fuse this LoRA, such as the shipped avatars-flash; may be repeated",
    )
    parser.add_argument("--out", type=Path, required=True, help="the bundle folder to make, or to bring up to date")
    parser.add_argument("--backend", choices=tuple(BACKENDS), help=f"default: {defaults.BACKEND}")
    parser.add_argument("--precision", choices=defaults.PRECISIONS, help=f"default: {defaults.PRECISION}")
    parser.add_argument("--size", metavar="WxH[,WxH...]", help="image sizes; default: the size the base was trained at")
    parser.add_argument("--batch", metavar="N[,N...]", help=f"batch sizes; default: {listed(defaults.BATCH_SIZES)}")
    parser.add_argument(
        "--version-compatible", action="store_true", help="TensorRT plans that run on later versions too, more slowly"
    )
    parser.add_argument(
        "--guidance", type=float, help="guidance scale of a model that is no flash student, up to 1: none; default: the family's"
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--compare-stock",
        action=argparse.BooleanOptionalAction,
        help="compare an image with the stock diffusers pipeline of the model before publishing; default: yes",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be built, why, and what it takes; write nothing")


def run(options: argparse.Namespace) -> None:
    """Fuse LoRAs into a base model, export every part, compile it, check it against torch, and publish the bundle."""
    need("distill", "torch", "diffusers", "peft", "onnx", "onnxscript")
    from flashdiff.config import load_recipe, parse_record
    from flashdiff.engines.build import build_engine
    from flashdiff.engines.config import BuildOptions, BuildRecipe, parse_batches, parse_sizes
    from flashdiff.engines.plan import describe, plan_build

    given = {
        "loras": tuple(parse_lora(text) for text in options.lora),
        "backend": options.backend,
        "precision": options.precision,
        "sizes": options.size and parse_sizes(options.size),
        "batch_sizes": options.batch and parse_batches(options.batch),
        "version_compatible": options.version_compatible or None,
        "compare_stock": options.compare_stock,
        **given_sampling(options),
    }
    given = {name: value for name, value in given.items() if value is not None and value != ()}
    if options.base.endswith(".toml"):
        if given:
            raise ConfigError(f"{options.base} says {', '.join(given)}: change it there, and give --out alone beside a recipe")
        given = load_recipe(Path(options.base), BuildRecipe).model_dump()
    build = parse_record({"base": options.base, **given, "out": options.out}, BuildOptions, source="build-engine")
    quiet_libraries()
    if options.dry_run:
        for line in describe(plan_build(build)):
            print(line)
        return
    build_engine(build, lambda line: print(line, flush=True))
