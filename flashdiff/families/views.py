"""Folders of links in the cache, which show a base with other files than its own directory holds under the loaders' names."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flashdiff.errors import ModelError
from flashdiff.families.files import INDEX, local_files
from flashdiff.families.hub import name_of
from flashdiff.files import cache_folder


def plain_view(folder: Path, variant: str | None) -> Path:
    """A base as one whose weights have plain names: itself, or a view where a variant of them is to be loaded.

    A folder that is no model directory is returned as it is: `family_of` refuses it.
    """
    if not (folder / INDEX).is_file():
        return folder
    files = local_files(folder, variant=variant)
    if all(name == file for name, file in files.items()):
        return folder
    return view(name_of(folder), {name: folder / file for name, file in files.items()})


def view(name: str, files: Mapping[str, Path]) -> Path:
    """A folder of that name with links to these files, by their names in it; the same folder for the same files."""
    targets = {inside: os.path.realpath(path) for inside, path in files.items()}
    key = hashlib.sha256(json.dumps(targets, sort_keys=True).encode()).hexdigest()[:24]
    parent = cache_folder() / "bases"
    target = parent / key / name
    if target.is_dir():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".") as place:
            made = Path(place, key, name)
            for inside, path in targets.items():
                (made / inside).parent.mkdir(parents=True, exist_ok=True)
                (made / inside).symlink_to(path)
            if not target.parent.exists():
                made.parent.rename(target.parent)
    except OSError as error:
        if not target.is_dir():  # else another process has made the same
            raise ModelError(f"{error.filename or parent}: cannot make a view of the base: {error.strerror}") from None
    return target
