"""The command line: one function a command, each importing only what it needs, so that `--help` answers at once."""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import flashdiff
from flashdiff.errors import ConfigError, FlashdiffError, install

if TYPE_CHECKING:
    from flashdiff.components import Components
    from flashdiff.server.models import Model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can cause are one line on stderr and exit status 1, usage errors 2."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("flashdiff").setLevel(logging.INFO)  # libraries keep to warnings
    try:
        options.run(options)
    except FlashdiffError as error:
        print(f"flashdiff: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk or a missing permission, wherever it strikes
        print(f"flashdiff: error: {error.filename or 'cannot write'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flashdiff: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashdiff", description=flashdiff.__doc__)
    parser.add_argument("--version", action="version", version=f"flashdiff {flashdiff.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    distill = commands.add_parser("distill", help="train a flash LoRA from a recipe", description=_distill.__doc__)
    distill.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file; avatars.toml ships with flashdiff")
    distill.add_argument("--out", type=Path, help="the LoRA folder to make; training state is kept in OUT/training")
    distill.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and what it costs; write nothing, with or without --out"
    )
    distill.set_defaults(run=_distill)

    build = commands.add_parser(
        "build-engine", help="fuse, export, compile and check a bundle", description=_build_engine.__doc__
    )
    build.add_argument(
        "base",
        metavar="BASE|RECIPE",
        help="a diffusers model directory, a hub id, the embedded model 'avatars'; or a .toml file that says all but --out",
    )
    build.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FOLDER[:WEIGHT]",
        help="fuse this LoRA, such as the shipped avatars-flash; may be repeated",
    )
    build.add_argument("--out", type=Path, required=True, help="the bundle folder to make, or to bring up to date")
    build.add_argument(
        "--backend",
        choices=("openvino", "onnxruntime", "torch", "tensorrt", "tensorrt-rtx"),
        help="default: openvino",
    )
    build.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="default: fp32")
    build.add_argument("--size", metavar="WxH[,WxH...]", help="image sizes; default: the size the base was trained at")
    build.add_argument("--batch", metavar="N[,N...]", help="batch sizes; default: 1,2,4,8")
    build.add_argument(
        "--version-compatible", action="store_true", help="TensorRT plans that run on later versions too, more slowly"
    )
    build.add_argument("--guidance", type=float, help="guidance scale of a base without a flash LoRA; default: the family's")
    build.add_argument("--dry-run", action="store_true", help="print what would be built, why, and what it takes; write nothing")
    build.set_defaults(run=_build_engine)

    inspect = commands.add_parser("inspect", help="say what a bundle holds", description=_inspect.__doc__)
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE")
    inspect.set_defaults(run=_inspect)

    evaluate = commands.add_parser(
        "evaluate", help="measure image quality, student beside teacher", description=_evaluate.__doc__
    )
    evaluate.add_argument("subject", metavar="SUBJECT", help="a bundle, a diffusers directory, 'avatars', or a folder of images")
    evaluate.add_argument("--lora", action="append", default=[], metavar="FOLDER[:WEIGHT]", help="fuse this LoRA into SUBJECT")
    evaluate.add_argument("--steps", metavar="N[,N...]", help="steps to measure SUBJECT at, a row each; default: the model's")
    evaluate.add_argument("--teacher", metavar="BASE", help="a bundle or model to measure beside it")
    evaluate.add_argument("--teacher-steps", default="50", metavar="N[,N...]", help="default: %(default)s")
    evaluate.add_argument(
        "--guidance",
        type=float,
        help="guidance scale of the teacher, or of SUBJECT without one; default: what SUBJECT's flash LoRA was taught at (a "
        "bundle does not know it), or the family's",
    )
    evaluate.add_argument(
        "--prompts",
        default="avatars",
        metavar="FILE",
        help="a text file, one prompt a line; or prompts of the embedded world: avatars (default), avatars-held-out",
    )
    evaluate.add_argument("--count", type=int, default=500, help="prompts to use at most; default: %(default)s")
    evaluate.add_argument("--seeds", type=int, default=2, help="images of each prompt; default: %(default)s")
    evaluate.add_argument(
        "--reference",
        default="avatars",
        metavar="IMAGES",
        help="a folder, webdataset shards (.tar), or avatars: the embedded model's training renders (default)",
    )
    evaluate.add_argument(
        "--reference-count", type=int, default=5000, help="reference images at most, evenly spaced; default: %(default)s"
    )
    evaluate.add_argument(
        "--features", metavar="NAME", help="avatars, inception[:FOLDER]; default: avatars for its reference, else inception"
    )
    evaluate.add_argument("--text", metavar="NAME", help="avatars, clip[:MODEL]; default: avatars for its reference, else none")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    evaluate.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md, sheets and all images here")
    evaluate.set_defaults(run=_evaluate)

    serve = commands.add_parser("serve", help="serve bundles over gRPC", description=_serve.__doc__)
    serve.add_argument(
        "bundles", type=Path, nargs="*", metavar="BUNDLE", help="answers to its folder's name; the first is the default"
    )
    serve.add_argument(
        "--repository", type=Path, metavar="FOLDER", help="of bundles that may be loaded, by folder name, while serving"
    )
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", type=int, default=50051, help="default: %(default)s; 0 takes a free one")
    serve.add_argument("--tokens", type=Path, metavar="FILE", help="who may call: lines of NAME TOKEN [CALLS-PER-SECOND]")
    serve.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate chain")
    serve.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM private key")
    serve.add_argument(
        "--tls-client-ca", type=Path, metavar="FILE", help="let in only clients with a certificate of this authority"
    )
    serve.add_argument("--no-auth", action="store_true", help="let anyone in who reaches a public --host")
    serve.add_argument(
        "--shared-memory", action="store_true", help="Triton clients of this machine may pass tensors through shared memory"
    )
    serve.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="default: %(default)s")
    serve.add_argument("--metrics-port", type=int, metavar="PORT", help="Prometheus metrics; default: none")
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="make images without a server", description=_generate.__doc__)
    generate.add_argument("bundle", type=Path, metavar="BUNDLE")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument(
        "-o", "--out", type=Path, required=True, help="a .png, .jpg or .webp file; --count N makes NAME-0, NAME-1, ..."
    )
    generate.add_argument("--steps", type=int, help="default: the model's")
    generate.add_argument("--seed", type=int, default=0, help="default: %(default)s; image i has seed + i")
    generate.add_argument("--size", metavar="WxH", help="default: the model's")
    generate.add_argument("--count", type=int, default=1, help="default: %(default)s")
    generate.add_argument("--image", type=Path, metavar="FILE", help="a PNG, JPEG or WebP file to start from")
    generate.add_argument(
        "--strength", type=float, help="with --image: share of the steps to take, up to 1; less keeps more of it; default: 0.8"
    )
    generate.set_defaults(run=_generate)
    return parser


def _distill(options: argparse.Namespace) -> None:
    """Train a flash LoRA: the base model's guided result in one to four steps. A killed run goes on with the same command."""
    if options.out is None and not options.dry_run:
        raise ConfigError("give --out FOLDER for the LoRA, or --dry-run")
    _need("distill", "torch", "diffusers", "peft")
    from flashdiff.config import load_recipe
    from flashdiff.distill.config import Recipe, bundled_recipe

    bundled = bundled_recipe(options.recipe.name)
    path = bundled if not options.recipe.exists() and options.recipe.parent == Path() and bundled.exists() else options.recipe
    recipe = load_recipe(path, Recipe)
    from flashdiff.distill import processes
    from flashdiff.distill.dry_run import dry_run
    from flashdiff.distill.loop import distill

    _quiet_libraries()
    if not processes.is_main():
        logging.getLogger("flashdiff").setLevel(logging.WARNING)  # only the main process reports progress
    if options.dry_run:
        for line in dry_run(recipe):
            print(line)
        return
    distill(recipe, options.out)
    if processes.is_main():
        print(f"published {options.out}")


def _build_engine(options: argparse.Namespace) -> None:
    """Fuse LoRAs into a base model, export every part, compile it, check it against torch, and publish the bundle."""
    _need("distill", "torch", "diffusers", "peft", "onnx", "onnxscript")
    from flashdiff.config import load_recipe
    from flashdiff.engines.build import build_engine
    from flashdiff.engines.config import BuildOptions, BuildRecipe, parse_batches, parse_sizes
    from flashdiff.engines.plan import describe, plan_build

    given = {
        "loras": tuple(_lora(text) for text in options.lora),
        "backend": options.backend,
        "precision": options.precision,
        "sizes": options.size and parse_sizes(options.size),
        "batch_sizes": options.batch and parse_batches(options.batch),
        "guidance": options.guidance,
        "version_compatible": options.version_compatible,
    }
    given = {name: value for name, value in given.items() if value not in (None, (), False)}
    if options.base.endswith(".toml"):
        if given:
            raise ConfigError(f"{options.base} says {', '.join(given)}: change it there, and give --out alone beside a recipe")
        given = load_recipe(Path(options.base), BuildRecipe).model_dump()
    build = BuildOptions(**{"base": options.base, **given, "out": options.out})
    _quiet_libraries()
    if options.dry_run:
        for line in describe(plan_build(build)):
            print(line)
        return
    build_engine(build, lambda line: print(line, flush=True))


def _inspect(options: argparse.Namespace) -> None:
    """Check a bundle's files and print what it was made from, what it can do, how exact it is and what it costs."""
    from flashdiff.engines.bundle import read_manifest
    from flashdiff.engines.describe import describe

    for line in describe(options.bundle, read_manifest(options.bundle)):
        print(line)


def _evaluate(options: argparse.Namespace) -> None:
    """Measure images against a reference set: FID, KID, text score, attributes, diversity, copies. Prints Markdown tables."""
    _need("distill", "torch", "diffusers", "peft")
    from flashdiff.config import parse_numbers
    from flashdiff.evaluation.command import EvaluateOptions, evaluate

    for name in ("count", "seeds", "reference_count"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a number of at least 1")
    _quiet_libraries()
    text = evaluate(
        EvaluateOptions(
            subject=options.subject,
            loras=tuple(_lora(lora) for lora in options.lora),
            steps=parse_numbers("--steps", options.steps) if options.steps else (),
            teacher=options.teacher,
            teacher_steps=parse_numbers("--teacher-steps", options.teacher_steps),
            guidance=options.guidance,
            prompts=options.prompts,
            count=options.count,
            seeds=options.seeds,
            reference=options.reference,
            reference_count=options.reference_count,
            features=options.features,
            text=options.text,
            json_file=options.json,
            out=options.out,
        ),
        open_bundle=_open_bundle,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(text)


def _open_bundle(path: Path) -> "Components":
    from flashdiff.engines.runtime.engine import open_bundle

    return open_bundle(path)


def _serve(options: argparse.Namespace) -> None:
    """Serve bundles over gRPC until SIGTERM or Ctrl-C, then finish what was accepted and stop."""
    _need("server", "grpc", "grpc_health", "grpc_reflection", "prometheus_client")
    for option, port in (("--port", options.port), ("--metrics-port", options.metrics_port)):
        if port is not None and not 0 <= port <= 65535:
            raise ConfigError(f"{option} {port}: give a number from 0 to 65535")
    if not options.bundles and not options.repository:
        raise ConfigError("give a BUNDLE, or a --repository to load some from")
    if options.repository and not options.repository.is_dir():
        raise ConfigError(f"--repository {options.repository}: there is no such folder")
    import asyncio

    from flashdiff.engines.bundle import read_manifest
    from flashdiff.server.app import Listen, serve
    from flashdiff.server.models import Models

    listen = Listen(
        host=options.host,
        port=options.port,
        tokens=options.tokens,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        tls_client_ca=options.tls_client_ca,
        shared_memory=options.shared_memory,
        no_auth=options.no_auth,
        metrics_host=options.metrics_host,
        metrics_port=options.metrics_port,
    )
    names = [bundle.absolute().name for bundle in options.bundles]
    if len(set(names)) < len(names):
        raise ConfigError(f"two bundles have the same folder name: {', '.join(names)}")
    served = {name: open_model(bundle) for name, bundle in zip(names, options.bundles, strict=True)}
    models = Models(served, options.repository, opener=open_model, identify=lambda bundle: read_manifest(bundle).bundle_hash)
    asyncio.run(serve(models, listen))


def open_model(bundle: Path) -> "Model":
    """The bundle, warmed up and measured."""
    from flashdiff.engines.runtime.engine import open_bundle
    from flashdiff.server.models import Model, ModelIdentity

    engine = open_bundle(bundle)
    manifest = engine.manifest
    identity = ModelIdentity(
        name=bundle.resolve().name,
        bundle_hash=manifest.bundle_hash,
        family=manifest.model.family,
        backend=manifest.backend,
        precision=manifest.precision,
    )
    return Model(identity, engine, engine.measure_costs())


def _generate(options: argparse.Namespace) -> None:
    """Make images with a bundle, in this process: the same pixels that a server with this bundle sends."""
    from flashdiff.engines.config import parse_sizes
    from flashdiff.engines.runtime.engine import open_bundle
    from flashdiff.generate import check_order, generate
    from flashdiff.server.images import FORMAT_OF_SUFFIX, encode_image, start_from_file

    image_format = FORMAT_OF_SUFFIX.get(options.out.suffix.lower())
    if image_format is None:
        raise ConfigError(f"--out {options.out}: the name must end in .png, .jpg or .webp")
    engine = open_bundle(options.bundle)
    size = parse_sizes(options.size)[0] if options.size else None
    order = check_order(
        engine.spec, prompt=options.prompt, seed=options.seed, steps=options.steps, size=size, count=options.count
    )
    order = start_from_file(order, options.image.read_bytes() if options.image else None, options.strength)
    for index, pixels in enumerate(generate(engine, [order])[0]):
        path = options.out if order.count == 1 else options.out.with_stem(f"{options.out.stem}-{index}")
        try:
            path.write_bytes(encode_image(pixels, image_format))
        except OSError as error:
            raise ConfigError(f"{path}: cannot write: {error.strerror or error}") from None
        print(f"{path}  {order.size}  steps {order.steps}  seed {order.seed + index}")


def _lora(text: str) -> tuple[str, float]:
    """`FOLDER` or `FOLDER:WEIGHT`."""
    folder, _, weight = text.rpartition(":")
    if not folder:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"--lora '{text}': the weight after ':' must be a number")
    return folder, number


def _need(extra: str, *modules: str) -> None:
    """ConfigError with the cure when an optional package is missing."""
    import importlib.util

    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"this command needs '{module}', which is not installed: {install(extra)}")


def _quiet_libraries() -> None:
    """No progress bars and advice of the libraries between our own lines."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for module in (diffusers.utils.logging, transformers.utils.logging):
        module.set_verbosity_error()
        module.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
