"""`flashdiff generate`."""

import argparse
from pathlib import Path

from flashdiff import defaults
from flashdiff.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a .png, .jpg or .webp file; --count N makes NAME-0, NAME-1, ..."
    )
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--seed", type=int, default=defaults.SEED, help="default: %(default)s; image i has seed + i")
    parser.add_argument("--size", metavar="WxH", help="default: the model's")
    parser.add_argument("--count", type=int, default=defaults.COUNT, help="default: %(default)s")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a PNG, JPEG or WebP file to start from")
    parser.add_argument(
        "--strength",
        type=float,  # no default here: a strength without an image is refused
        help=f"with --image: share of the steps to take, up to 1; less keeps more of it; default: {defaults.STRENGTH}",
    )


def run(options: argparse.Namespace) -> None:
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
