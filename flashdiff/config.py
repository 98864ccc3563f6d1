"""Recipes: TOML files read into frozen records. Unknown keys are refused; the resolved form has a hash."""

import difflib
import hashlib
import json
import reprlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashdiff.errors import ConfigError
from flashdiff.reading import read_text

R = TypeVar("R", bound="Record")
Name = Annotated[str, Field(min_length=1)]
"""Of a model, a file or a column: an empty one is no name."""


class Record(BaseModel):
    """A frozen value with checked fields; equal content means equal records."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical_json(self) -> str:
        """One text for one content: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def key_types(cls) -> dict[str, Any]:
        """The keys that a file may give, with their types."""
        return {name: field.annotation for name, field in cls.model_fields.items()}

    @property
    def content_hash(self) -> str:
        """SHA-256 of the canonical JSON, as hex."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """`4,2` as numbers from 1 on, in their order; ConfigError for anything else."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} '{text}': give whole numbers from 1 on, such as 4,2")
    return numbers


def load_recipe(path: Path, record: type[R]) -> R:
    """Read a TOML file into `record`; ConfigError names the file, the key and the nearest known one."""
    try:
        values = tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except ValueError as error:  # of TOML, of UTF-8, and of numbers with thousands of digits
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a TOML file: nested too deeply") from None
    return parse_record(values, record, source=str(path))


def parse_record(values: Mapping[str, Any], record: type[R], *, source: str) -> R:
    """`values` as a record; ConfigError says in one line all that is wrong, `source` being where the values stood."""
    try:
        return record.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list whose items are at fault counts as too short as well.
        faults = [
            item
            for item in found
            if item["type"] != "too_short"
            or not any(o is not item and o["loc"][: len(item["loc"])] == item["loc"] for o in found)
        ]
        problems = "; ".join(_problem(item, record) for item in faults)
        raise ConfigError(f"{source}: {problems}") from None


def _problem(item: Any, record: type[Record]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        name = str(item["loc"][-1])
        if nearest := difflib.get_close_matches(name, _known_keys(record, item["loc"][:-1]), n=1):
            return f"unknown key '{key}', did you mean '{nearest[0]}'?"
        return f"unknown key '{key}'" + (f"; '{name}' stands above the first [table]" if name in record.model_fields else "")
    if item["type"] == "missing":
        return f"'{key}' is missing"
    if item["type"] == "value_error":  # a rule across fields; its message names them
        return str(item["msg"]).removeprefix("Value error, ")
    shown = reprlib.repr(item["input"])
    return f"'{key}' = {shown}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _known_keys(record: type[Record], path: tuple[int | str, ...]) -> list[str]:
    for name in path:
        if isinstance(name, int):  # a place in a list of records
            continue
        found = record.key_types().get(name)
        kinds = (found, *get_args(found))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Record)]
        if not inner:
            return []
        record = inner[0]
    return list(record.key_types())
