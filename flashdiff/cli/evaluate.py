"""`flashdiff evaluate`."""

import argparse
import sys
from pathlib import Path

from flashdiff import defaults
from flashdiff.cli.build_options import add_base_arguments, base_of
from flashdiff.cli.shared import add_sampling_arguments, assignment, given_sampling, listed, need, parse_lora, quiet_libraries
from flashdiff.errors import ConfigError

_MOST_IMAGES = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "subject",
        metavar="SUBJECT",
        help="a bundle, a base as for build-engine, a checkpoint (OUT/training/checkpoints/N.pt), or a folder of images",
    )
    parser.add_argument("--lora", action="append", default=[], metavar="LORA[:WEIGHT]", help="fuse this LoRA into SUBJECT")
    add_base_arguments(parser.add_argument_group("a SUBJECT that is a base"))
    parser.add_argument("--steps", metavar="N[,N...]", help="steps to measure SUBJECT at, a row each; default: the model's")
    parser.add_argument("--teacher", metavar="BASE", help="a bundle or model to measure as well")
    parser.add_argument(
        "--teacher-steps",
        default=listed(defaults.TEACHER_STEPS),
        metavar="N[,N...]",
        help="steps to measure the teacher at; default: %(default)s",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        help="guidance scale of the teacher, or of SUBJECT without --teacher; default: the scale that SUBJECT's flash LoRA was "
        "trained at (not recorded in a bundle), else the family's; 1 or less: none",
    )
    add_sampling_arguments(parser, with_steps=False)
    parser.add_argument(
        "--prompts",
        default=defaults.PROMPTS,
        metavar="FILE",
        help="a text file, one prompt a line, with --reference; or prompts of the embedded world: %(default)s (default), "
        "avatars-held-out",
    )
    parser.add_argument("--count", type=int, default=defaults.PROMPT_COUNT, help="prompts to use at most; default: %(default)s")
    parser.add_argument(
        "--seeds", type=int, default=defaults.IMAGES_PER_PROMPT, help="images of each prompt; default: %(default)s"
    )
    parser.add_argument(
        "--reference",
        default=defaults.REFERENCE,
        metavar="IMAGES",
        help="a folder, webdataset shards (.tar), or %(default)s: the embedded model's training renders (default)",
    )
    parser.add_argument(
        "--reference-count",
        type=int,
        default=defaults.REFERENCE_COUNT,
        help="reference images at most, evenly spaced; default: %(default)s",
    )
    parser.add_argument(
        "--features",
        metavar="NAME",
        help="avatars, inception[:FOLDER], dino[:MODEL]; default: avatars with --reference avatars, else inception",
    )
    parser.add_argument(
        "--text",
        metavar="NAME",
        help="avatars, clip[:MODEL], pickscore, aesthetic[:FOLDER], image-reward, hpsv2; default: avatars with --reference "
        "avatars, else none",
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help="measure after papers' tables, on COCO's validation set: coco2014-30k, coco2014-10k or coco2017-5k, with --prompts "
        "captions_val20XX.json and --reference FOLDER of its images; --text is CLIP ViT-g by default, and --out keeps what is "
        "measured, so that the same command goes on after a kill",
    )
    parser.add_argument(
        "--scores",
        metavar="NAME[,NAME...]",
        help="further columns of --protocol: pickscore, aesthetic, image-reward, hpsv2, and dino[:MODEL] for the diversity of a "
        "prompt's images",
    )
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="measure what the models make of images: inpainting, image_to_image, edit, upscaling, super_resolution; control: "
        "how closely they keep to edges, silhouettes or a small picture (tile); identity and swap: how well they show the "
        "figure of a reference. The originals are drawn by the embedded world's renderer or, but for identity and swap, come "
        "from --images",
    )
    parser.add_argument(
        "--parameter",
        dest="parameters",
        type=assignment(float),
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="of --task, as strength=0.5; default: the task's. Of control the scale of each, as edges=1, and with "
        "tile a strength; of identity and swap scale, the reference's",
    )
    parser.add_argument(
        "--images",
        metavar="IMAGES",
        help="of --task: a folder or webdataset shards of images of the models' size; their captions are the prompts",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md, sheets and all images here")


def run(options: argparse.Namespace) -> None:
    """Measure images against a reference set: FID, KID, text score, attributes, diversity, copies. Prints Markdown tables."""
    need("distill", "torch", "diffusers", "peft")
    from flashdiff.components import Components
    from flashdiff.config import parse_numbers, parse_record
    from flashdiff.distill.saved_student import open_checkpoint
    from flashdiff.engines.runtime.engine import open_bundle
    from flashdiff.evaluation.command import EvaluateOptions, evaluate
    from flashdiff.samplers.options import SamplingOptions

    for name in ("count", "seeds", "reference_count"):
        value = getattr(options, name)
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give a number of at least 1")
        if value > _MOST_IMAGES:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give a number of at most {_MOST_IMAGES}")
    quiet_libraries()

    def opened(path: Path) -> Components:
        return open_checkpoint(path) if path.suffix == ".pt" else open_bundle(path)

    text = evaluate(
        EvaluateOptions(
            subject=base_of(options.subject, options.revision),
            variant=options.variant,
            config=options.config,
            vae=options.vae,
            loras=tuple(parse_lora(lora) for lora in options.lora),
            steps=parse_numbers("--steps", options.steps) if options.steps else (),
            teacher=options.teacher,
            teacher_steps=parse_numbers("--teacher-steps", options.teacher_steps),
            guidance=options.guidance,
            sampling=parse_record(given_sampling(options) | {"guidance": None}, SamplingOptions, source="evaluate"),
            prompts=options.prompts,
            count=options.count,
            seeds=options.seeds,
            reference=options.reference,
            reference_count=options.reference_count,
            features=options.features,
            text=options.text,
            json_file=options.json,
            protocol=options.protocol,
            task=options.task,
            parameters=tuple(dict(options.parameters).items()),
            images=options.images,
            scores=tuple(name for name in (options.scores or "").split(",") if name),
            out=options.out,
        ),
        open_bundle=opened,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(text)
