"""`flashdiff distill`."""

import argparse
import logging
from pathlib import Path

from flashdiff.cli.shared import need, quiet_libraries
from flashdiff.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file; avatars.toml ships with flashdiff")
    parser.add_argument("--out", type=Path, help="the LoRA's or model's folder to make; training state is kept in OUT/training")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the finished student with its card to this repository on the Hugging Face hub; a new one is private",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and what it costs; write nothing, with or without --out"
    )


def run(options: argparse.Namespace) -> None:
    """Train a flash LoRA, or a whole model (`student = "full"`): the base's guided result in one to four steps. The same command
    resumes a killed run.

    docs/distillation.md introduces recipes. Every key is explained where it is declared: distill/config.py,
    flashdiff/schedule.py ([grid]) and distill/losses/settings.py ([loss]).
    """
    if options.out is None and not options.dry_run:
        raise ConfigError("give --out FOLDER for the student, or --dry-run")
    need("distill", "torch", "diffusers", "peft")
    from flashdiff.config import load_recipe
    from flashdiff.distill.config import Recipe, find_recipe

    recipe = load_recipe(find_recipe(options.recipe), Recipe)
    from flashdiff.distill import processes
    from flashdiff.distill.dry_run import dry_run
    from flashdiff.distill.loop import distill
    from flashdiff.distill.push import open_repository, push, repository_name
    from flashdiff.distill.speed import summary

    quiet_libraries()
    if not processes.is_main():
        logging.getLogger("flashdiff").setLevel(logging.WARNING)  # only the main process reports progress
    repository = repository_name(options.push) if options.push and processes.is_main() else None
    if options.dry_run:
        for line in dry_run(recipe):
            print(line)
        return
    if repository:
        open_repository(repository)
    trained = distill(recipe, options.out)
    if processes.is_main():
        for line in summary(options.out / "training") if trained else ():
            print(line)
        print(f"published {options.out}" if trained else f"{options.out} is finished: trained from this recipe; nothing to do")
    if repository:
        print(f"pushed to {push(options.out, repository)}")
