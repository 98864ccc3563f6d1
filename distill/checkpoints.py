"""Files of a run: its recipe, and its checkpoints in their order."""

from pathlib import Path

RECIPE, WEIGHTS = "recipe.json", "weights"
"""The file of a run's recipe, and its key for the hashes of the files that the run loaded, by the recipe's keys."""


def checkpoint_path(work: Path, update: int) -> Path:
    """Where the checkpoint after so many updates lies in a run's working folder."""
    return work / "checkpoints" / f"{update:06d}.pt"


def checkpoints(work: Path) -> list[Path]:
    """The checkpoints in `work`, oldest first: by number, because names grow longer after 999,999 updates. Other files,
    such as a copy kept there under another name, are ignored."""
    found = [path for path in (work / "checkpoints").glob("*.pt") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))
