"""A private copy of a bundle, hashed while it is copied: the bytes that run are those that were checked.

Libraries open files by path, some map them, and a part is compiled when it is first used. The bundle itself may be replaced or
edited meanwhile; the copy may not.
"""

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from flashdiff.engines.bundle import Manifest, read_bundle
from flashdiff.errors import BundleError
from flashdiff.files import copy_hashed, locked_folder, sweep_folders

_PREFIX, _SUFFIX = "flashdiff-", ".open"


class Snapshot:
    """The copy of a bundle in `folder`, in the system's folder for temporary files ($TMPDIR).

    It is removed with this object, by `remove`, or when the process ends; what a killed process leaves, the next one removes.
    """

    def __init__(self, bundle: Path) -> None:
        """BundleError says what is wrong with the bundle, or that there is no room for the copy."""
        place = None
        try:
            place = Path(tempfile.gettempdir())
            sweep_folders(place, _PREFIX, _SUFFIX)
            self.folder, lock = locked_folder(place, _PREFIX, _SUFFIX)
        except OSError as error:
            raise BundleError(f"{place or 'TMPDIR'}: no place for a copy of {bundle}: {error.strerror or error}") from None
        self._finalizer = weakref.finalize(self, _remove, self.folder, lock)
        try:
            self.manifest: Manifest = read_bundle(bundle, self._copy)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the copy, when every file of it has been read; what is mapped stays until its library lets go of it."""
        self._finalizer()

    def _copy(self, source: Path, name: str) -> str:
        target = self.folder / name
        target.unlink(missing_ok=True)  # of an earlier try, while the bundle was replaced
        return copy_hashed(source, target)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
