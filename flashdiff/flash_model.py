"""A flash student that is a whole model: the directory of its base with other weights in the denoiser, and `flash.json`."""

import json
import shutil
from functools import partial
from pathlib import Path

from flashdiff.errors import LoraError, first_line
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.files import INDEX, local_files, read_index
from flashdiff.files import write_whole
from flashdiff.lora import FlashInfo
from flashdiff.lora_files import FLASH


def save_flash_model(folder: Path, model: TorchModel, family: ModelFamily, info: FlashInfo) -> None:
    """Write a directory that diffusers loads into `folder`, which exists: the denoiser in float32, all else as the base has it.

    flash.json is written last. LoraError where it cannot be written.
    """
    own, unfinished = f"{family.lora_prefix}/", folder / ".weights"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        model.network.save_pretrained(unfinished)
        (unfinished / "config.json").unlink()  # the base's own names no folder of this machine
        (folder / own).mkdir(exist_ok=True)
        for path in unfinished.iterdir():
            path.chmod(0o644)  # safetensors keeps others out
            path.replace(folder / own / path.name)
        unfinished.rmdir()
        files = local_files(model.folder)
        del files[INDEX]
        for name, file in files.items():
            if name == f"{own}config.json" or not name.startswith(own):
                with (model.folder / file).open("rb") as source:
                    write_whole(folder / name, partial(shutil.copyfileobj, source))
        write_whole(folder / INDEX, json.dumps(_index(folder, model.folder), indent=2) + "\n")
        write_whole(folder / FLASH, info.model_dump_json(indent=2) + "\n")
    except Exception as error:  # safetensors has its own errors for a full disk
        raise LoraError(f"{folder}: cannot write the model: {first_line(error)}") from None


def _index(folder: Path, base: Path) -> dict[str, object]:
    """The base's model_index.json without the parts that are not in `folder`, such as a safety checker."""
    return {
        name: [None, None] if isinstance(value, list) and not (folder / name).is_dir() else value
        for name, value in read_index(base).items()
    }
