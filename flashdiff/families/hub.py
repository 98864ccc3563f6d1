"""Models on the Hugging Face hub: their names, and downloads of just the files that are loaded.

Downloads are huggingface_hub's: resumed where they broke off, kept in its cache, with its progress bar, token and settings.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TypeVar

from flashdiff.errors import FlashdiffError, LoraError, ModelError, first_line

T = TypeVar("T")

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """`owner/name[/file][@revision]`."""

    repository: str
    file: str | None
    """Or a folder, of a base's parts."""
    revision: str | None

    def __str__(self) -> str:
        return "".join([self.repository, f"/{self.file}" if self.file else "", f"@{self.revision}" if self.revision else ""])


def hub_name(text: str) -> HubName | None:
    """The name on the hub that a text is; None where it can only be a path."""
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or match["repository"].endswith((".safetensors", ".toml")):
        return None
    return HubName(repository=match["repository"], file=match["file"], revision=match["revision"])


def name_of(folder: Path) -> str:
    """The name of a model by its directory; in the hub's cache, where a directory is named after its commit, the repository's."""
    place = folder.resolve()
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return place.name


def download_base(name: HubName, variant: str | None) -> Path:
    """The directory of a base model in the hub's cache; ModelError when the hub does not give it."""
    from flashdiff.families import family_of
    from flashdiff.families.files import INDEX, read_index, used_files

    def choose(names: list[str]) -> Iterable[str]:
        if INDEX not in names:
            raise ModelError(f"{name} on the hub is no diffusers model: it has no {INDEX}")
        folder = _fetch(name, [INDEX])
        return used_files(names, read_index(folder), family_of(folder), source=name, variant=variant).values()

    if name.file:
        raise ModelError(f"no base model '{name}': a hub id has the form owner/name[@revision]")
    refused = f"no base model '{name}': not a directory, and the hub did not give it"
    return _given(name, lambda: _download(name, choose, INDEX), lambda why: ModelError(f"{refused} ({why})"))[0]


def download_config(name: HubName) -> Path:
    """The directory of a model in the hub's cache, with its configurations and tokenizers alone."""
    from flashdiff.families.files import INDEX

    def choose(names: list[str]) -> Iterable[str]:
        return [file for file in names if file.count("/") <= 1 and file.endswith((".json", ".txt", ".model"))]

    refused = f"the hub did not give '{name}'"
    return _given(name, lambda: _download(name, choose, INDEX), lambda why: ModelError(f"{refused} ({why})"))[0]


def download_lora(name: HubName, usual: str, companions: tuple[str, ...]) -> Path:
    """A LoRA in the hub's cache: the file named, or the repository's folder where it holds the file `usual`, or its only file.

    `companions` are files that are taken with the weights where there are such. LoraError when the hub does not give it.
    """

    def choose(names: list[str]) -> Iterable[str]:
        file = name.file or _only_lora(name, names, usual)
        if file not in names:
            raise LoraError(f"no LoRA '{name}': {name.repository} on the hub has no file {file}")
        folder = file.rpartition("/")[0]
        with_it = {f"{folder}/{companion}".removeprefix("/") for companion in companions}
        return [file, *sorted(with_it & {*names})]

    refused = f"no LoRA '{name}': neither a file nor a folder, and the hub did not give it"
    folder, names = _given(name, lambda: _download(name, choose, name.file), lambda why: LoraError(f"{refused} ({why})"))
    return folder / (name.file or _only_lora(name, names, usual))


def download_part(name: HubName, files: tuple[str, ...]) -> Path:
    """The first of these files that a repository has, with its config.json: the folder in the hub's cache."""
    inside = f"{name.file}/" if name.file else ""
    config = f"{inside}config.json"

    def choose(names: list[str]) -> Iterable[str]:
        found = next((file for file in files if inside + file in names), None)
        if found is None or config not in names:
            raise ModelError(f"{name} on the hub has no config.json with {' or '.join(files)}")
        return [inside + found, config]

    refused = f"'{name}' is not a directory, and the hub did not give it"
    return _given(name, lambda: _download(name, choose, config), lambda why: ModelError(f"{refused} ({why})"))[0] / inside


def download_file(name: HubName) -> Path:
    """One file of a repository, which the name has to name, in the hub's cache; ModelError when the hub does not give it."""

    def choose(names: list[str]) -> Iterable[str]:
        if name.file not in names:
            raise ModelError(f"{name.repository} on the hub has no file {name.file}")
        return [name.file]

    if not name.file:
        raise ModelError(f"'{name}' names no file: give owner/name/file, or a local path")
    refused = f"'{name}' is not a local file, and the hub did not give it"
    return _given(name, lambda: _download(name, choose, name.file), lambda why: ModelError(f"{refused} ({why})"))[0] / name.file


def _only_lora(name: HubName, names: list[str], usual: str) -> str:
    """The file that is meant where none is named."""
    if usual in names:
        return usual
    files = [file for file in names if file.endswith(".safetensors")]
    if len(files) == 1:
        return files[0]
    shown = f"several, {', '.join(sorted(files)[:5])} among them" if files else "none"
    raise LoraError(f"no LoRA '{name}': of .safetensors files it has {shown}; give {name.repository}/FILE")


def _download(name: HubName, choose: Callable[[list[str]], Iterable[str]], witness: str | None) -> tuple[Path, list[str]]:
    """The chosen ones of a repository's files in the cache, and all their names; without the hub what the cache has, if
    `witness` is there."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = huggingface_hub.HfApi().model_info(name.repository, revision=name.revision)
    except HfHubHTTPError:
        raise
    except Exception as error:  # no connection, or none allowed
        cached = _cached(name, witness)
        if cached is None:
            is_off = isinstance(error, OfflineModeIsEnabled)
            why = "HF_HUB_OFFLINE forbids a download" if is_off else f"it cannot be reached: {first_line(error)}"
            cure = "unset it" if is_off else "try again"
            raise _UnreachableError(f"it is not in the cache, and {why}; {cure}, or give a local path") from None
        return cached, [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    names = [file.rfilename for file in found.siblings or ()]
    return _fetch(name, choose(names)), names


def _cached(name: HubName, witness: str | None) -> Path | None:
    """The snapshot of a repository in the cache, if it is there with the file `witness`."""
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name.repository, revision=name.revision, local_files_only=True, allow_patterns=[witness or "*.none"]
            )
        )
    except OSError:
        return None
    return folder if witness is None or (folder / witness).is_file() else None


def _fetch(name: HubName, files: Iterable[str]) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            name.repository, revision=name.revision, allow_patterns=[escape(file) for file in files]
        )
    )


class _UnreachableError(Exception):
    """Neither the hub nor the cache has the files."""


def _given(name: HubName, get: Callable[[], T], refusal: Callable[[str], FlashdiffError]) -> T:
    """What `get` returns; its errors as a refusal that says what to do."""
    from huggingface_hub import errors

    token = "set HF_TOKEN, or run `hf auth login`, with a token that may read it"
    try:
        return get()
    except FlashdiffError:
        raise
    except errors.GatedRepoError:
        why = f"its owner asks for an agreement: accept it at https://huggingface.co/{name.repository}, then {token}"
    except errors.RepositoryNotFoundError:
        why = f"it is not there or private: check the name; if it is private, {token}"
    except errors.RevisionNotFoundError:
        why = f"it has no revision '{name.revision}'"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        why = (
            f"it answered with status {status}: {token}"
            if status in (401, 403)
            else f"it answered with status {status}; try again"
        )
    except Exception as error:  # of the network, the disk and the hub's library
        why = first_line(error)
    raise refusal(why)
