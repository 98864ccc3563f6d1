"""The base that an adapter was trained for, recorded next to it: enough to refuse another base of the same form."""

from pathlib import Path
from typing import Self

from pydantic import Field

from flashdiff.components import ModelSpec
from flashdiff.config import Record, parse_record
from flashdiff.errors import ConfigError, ModelError
from flashdiff.families.files import base_hash
from flashdiff.families.prints import prints_of, shared_precision
from flashdiff.lora import hashes_of
from flashdiff.reading import read_json


class MadeFor(Record):
    """What the file holds."""

    base: str
    base_hash: str
    base_prints: dict[str, str] = Field(default={}, max_length=10)
    """Names of the base's weights as they are when rounded to a precision."""

    @classmethod
    def of(cls, name: str, folder: Path, **more: str) -> Self:
        """The record of an adapter for the base in a folder."""
        return cls(base=name, base_hash=base_hash(folder), base_prints=prints_of(folder), **more)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in a file, None where there is no file, as with published adapters; ModelError when it cannot be read."""
        try:
            return parse_record(read_json(path), cls, source=str(path)) if path.is_file() else None
        except OSError as error:
            raise ModelError(f"{path}: cannot read: {error.strerror}") from None
        except ConfigError as error:  # which names the file
            raise ModelError(str(error)) from None
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {error}") from None

    def is_in(self, base: Path) -> bool:
        """Whether a folder holds the base, a full student of it, or a copy in another precision."""
        return self.base_hash in hashes_of(base, base_hash(base)) or shared_precision(base, self.base_prints) is not None

    def check(self, option: str, own: str, base: Path, spec: ModelSpec) -> None:
        """ModelError, with both hashes, for another base; `own` names the adapter, as 'the control is 0123456789ab'."""
        if self.is_in(base):
            return
        hashes = f"'{self.base}' with hash {self.base_hash[:12]}, but {spec.name} has hash {base_hash(base)[:12]}"
        raise ModelError(f"{option} was made for another base: {hashes} ({own})")
