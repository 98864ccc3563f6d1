"""Networks that are no part of a base: found as a folder or on the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from flashdiff.errors import ModelError
from flashdiff.families.files import network_files
from flashdiff.families.hub import download_part, hub_name, name_of
from flashdiff.families.views import view
from flashdiff.files import hash_files

Library = Literal["diffusers", "transformers"]
"""That a network is a class of."""

_STEMS: dict[Library, str] = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def find_network(
    option: str,
    name: str,
    *,
    what: str,
    inside: Sequence[str] = (),
    library: Library = "diffusers",
    shipped: Sequence[str] = (),
) -> Path:
    """The folder of a network: a path, or owner/name[/folder][@revision] on the hub; or one of the folders `inside` it.

    ModelError begins with the `option` that named it, and says `what` is not there; `shipped` are names that could be given too.
    """
    folder = Path(name)
    if not folder.is_dir():
        on_hub = hub_name(name)
        if on_hub is None:
            names = "".join(f"'{own}', " for own in shipped)
            raise ModelError(f"{option}: there is no such folder; give one with a config.json, {names}or a hub id (owner/name)")
        folder = download_part(on_hub, (f"{_STEMS[library]}.safetensors", f"{_STEMS[library]}.fp16.safetensors"))
    if not (folder / "config.json").is_file():
        folder = next((folder / part for part in inside if (folder / part / "config.json").is_file()), folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{option}: it holds no {what} of {library}: there is no config.json")
    files = network_files(folder, library)
    if all(plain == own for plain, own in files.items()):
        return folder
    return view(name_of(folder), {plain: folder / own for plain, own in files.items()})


def files_of_network(folder: Path, library: Library = "diffusers") -> list[Path]:
    """The files of a network that are read."""
    return [folder / file for file in network_files(folder, library).values()]


def hash_of_network(folder: Path, library: Library = "diffusers") -> str:
    """Hash of a network's weights and configuration."""
    return hash_files(folder, files_of_network(folder, library))
