"""`flashdiff build-engine`."""

import argparse
from pathlib import Path

from flashdiff.cli.build_options import add_build_arguments, base_of
from flashdiff.cli.shared import given_sampling, need, parse_control, parse_lora, quiet_libraries
from flashdiff.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base",
        metavar="BASE|RECIPE",
        help="a diffusers model directory, a hub id (owner/name[@revision]), the embedded model 'avatars'; or a .toml recipe, "
        "which takes only --out and --dry-run besides",
    )
    parser.add_argument("--out", type=Path, required=True, help="the bundle folder to make, or to bring up to date")
    add_build_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be built, why, and what it takes; write nothing")


def run(options: argparse.Namespace) -> None:
    """Fuse LoRAs into a base model, export every part, compile it, check it against torch, and publish the bundle."""
    need("distill", "torch", "diffusers", "peft", "onnx", "onnxscript")
    from flashdiff.config import load_recipe, parse_record
    from flashdiff.engines.build import build_engine
    from flashdiff.engines.choose import describe_choice
    from flashdiff.engines.config import BuildOptions, BuildRecipe, parse_batches, parse_sizes
    from flashdiff.engines.plan import describe, plan_build

    given = {
        "loras": tuple(parse_lora(text) for text in options.lora),
        "controls": tuple(parse_control(text) for text in options.controls),
        "lora_slots": options.lora_slots,
        "lora_rank": options.lora_rank,
        "decode_tile": options.decode_tile,
        "variant": options.variant,
        "config": options.config,
        "vae": options.vae,
        "reference": options.reference,
        "reference_encoder": options.reference_encoder,
        "backend": options.backend,
        "precision": options.precision,
        "calibration_prompts": options.calibration_prompts,
        "sizes": options.size and parse_sizes(options.size),
        "batch_sizes": options.batch and parse_batches(options.batch),
        "version_compatible": options.version_compatible or None,
        "compile": options.compile or None,
        "compare_stock": options.compare_stock,
        **given_sampling(options),
    }
    given = {name: value for name, value in given.items() if value is not None and value != ()}
    if options.base.endswith(".toml"):
        if given:
            raise ConfigError(f"{options.base} is a recipe: set {', '.join(given)} there, and give --out alone here")
        given = load_recipe(Path(options.base), BuildRecipe).model_dump(exclude_unset=True)
    build = parse_record(
        {"base": base_of(options.base, options.revision), **given, "out": options.out}, BuildOptions, source="build-engine"
    )
    quiet_libraries()
    if options.dry_run:
        for line in describe_choice(build) if build.precision == "auto" else describe(plan_build(build)):
            print(line)
        return
    build_engine(build, lambda line: print(line, flush=True))
