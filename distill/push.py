"""A published student on the Hugging Face hub: `flashdiff distill RECIPE --out OUT --push owner/name`."""

from pathlib import Path

from flashdiff.distill.comfyui import WORKFLOW
from flashdiff.errors import ConfigError, TrainingError, first_line
from flashdiff.families.files import INDEX, base_files
from flashdiff.families.hub import HubName, hub_name
from flashdiff.lora_files import FLASH, KOHYA, WEIGHTS

_FILES = (WEIGHTS, KOHYA, FLASH, WORKFLOW, "README.md")
_TOKEN = "set HF_TOKEN, or run `hf auth login`, with a token that may write there"


def repository_name(text: str) -> HubName:
    """`owner/name`; ConfigError for another form."""
    name = hub_name(text)
    if name is None or name.file or name.revision:
        raise ConfigError(f"--push {text}: give a repository on the hub as owner/name")
    return name


def open_repository(name: HubName) -> None:
    """Make a repository that is not there, a private one. Called before a run, to find a missing right then.

    TrainingError when the hub refuses.
    """
    import huggingface_hub

    try:
        huggingface_hub.HfApi().create_repo(name.repository, private=True, exist_ok=True)
        huggingface_hub.HfApi().auth_check(name.repository, write=True)  # one that is there may be readable alone
    except Exception as error:  # of the network and of the hub's library
        raise _refused(name, error) from None


def push(out: Path, name: HubName) -> str:
    """Upload the student and its card in one commit; the address of the repository."""
    import huggingface_hub

    is_model = (out / INDEX).is_file()
    whole = [path.relative_to(out).as_posix() for path in base_files(out)] if is_model else []

    try:
        huggingface_hub.HfApi().upload_folder(
            repo_id=name.repository,
            folder_path=out,
            allow_patterns=[*_FILES, *whole],
            commit_message=f"Flash {'student' if is_model else 'LoRA'}, by flashdiff distill",
        )
    except Exception as error:  # as above
        raise _refused(name, error) from None
    return f"{huggingface_hub.constants.ENDPOINT}/{name.repository}"


def _refused(name: HubName, error: Exception) -> TrainingError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    why = f"it answered with status {status}: {_TOKEN}" if status in (401, 403, 404) else first_line(error)
    return TrainingError(f"--push {name}: the hub did not take it ({why})")
