"""Files of data sets as people have them: which of a folder's count, rows of metadata files, samples of webdataset shards."""

import csv
import io
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from flashdiff.errors import first_line, install
from flashdiff.reading import MAX_BYTES, lines_of, open_file, parse_json, read_file

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
CAPTIONS = ("text", "caption", "prompt")
"""Columns and keys that hold captions, the first that is there first."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files with a row for each image of their folder, as the library `datasets` has them."""

_PACKED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$")
_MAX_MEMBER_BYTES = 1 << 30  # of a file in a shard


def visible(folder: Path, *suffixes: str) -> list[Path]:
    """The files of a folder and below with these endings, sorted; hidden ones (`.x`, macOS's `._x`, `__MACOSX`) never count."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in found if not _is_hidden(path.relative_to(folder).as_posix()))


def packed_in(source: Path) -> Path | None:
    """A compressed shard (`.tar.gz`, `.tgz` and the like) that a data set is or holds, which is not read; None: there is none."""
    names = visible(source, ".gz", ".tgz", ".bz2", ".xz", ".zst") if source.is_dir() else [source]
    return next((path for path in names if _PACKED.search(path.name.lower()) and path.is_file()), None)


def _is_hidden(name: str) -> bool:
    parts = [part for part in PurePosixPath(name).parts if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def value_at(row: Mapping[str, Any], place: str) -> Any:
    """The value of a column, or of a field within it (`json.caption`, `captions.0`); KeyError where there is none."""
    value: Any = row
    if place in row:
        return row[place]
    for name in place.split("."):
        if isinstance(value, Mapping):
            value = value[name]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise KeyError(place)
    return value


# --- metadata files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a metadata file."""

    where: str
    """The file and the row, for messages."""
    folder: str
    """Of the file, relative to the data set: `""` or `train/`; file names in the row are relative to it."""
    values: dict[str, Any]


def metadata_rows(folder: Path) -> Iterator[Row]:
    """The rows of a data set's metadata files, in its folder and below. OSError or ValueError with one line for a bad file."""
    files = [path for path in visible(folder, ".jsonl", ".csv", ".parquet") if path.name in METADATA]
    for path, other in pairwise(files):
        if path.parent == other.parent:
            raise ValueError(f"{path.parent} has {path.name} and {other.name}; keep one of them")
    for path in files:
        place = path.parent.relative_to(folder).as_posix()
        for where, values in {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix](path):
            yield Row(where=where, folder="" if place == "." else f"{place}/", values=values)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines_of(_text(path)), start=1):
        if not line:
            continue
        try:
            values = parse_json(line)
        except ValueError:
            raise ValueError(f"{path}:{number}: the line: Invalid JSON") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}:{number}: the line: it is no JSON object")
        yield f"{path}:{number}", values


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: the line: it has another number of columns than the first")
            yield where, {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: the line: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs 'pyarrow', which is not installed: {install('distill')}") from None
    open_file(path).close()  # a pipe or a device would keep the library waiting
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # the library has many kinds for a damaged file
        raise ValueError(f"{path}: cannot read: {first_line(error)}") from None
    for number, values in enumerate(rows, start=1):
        yield f"{path}, row {number}", {name: value for name, value in values.items() if value is not None}


def _text(path: Path) -> str:
    try:
        return read_file(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}") from None


# --- webdataset shards -----------------------------------------------------------------------------------------------


def shard_samples(path: Path) -> Iterator[dict[str, bytes]]:
    """The samples of a webdataset shard, each its members by name: those that share a name up to the first dot, wherever they
    lie in the shard, in the order of their first members.

    Raises what tarfile raises for a damaged shard, after the samples before the damage.
    """
    with open_file(path) as file, tarfile.open(fileobj=file) as shard:
        members: dict[tuple[str, str], list[tuple[str, tarfile.TarInfo]]] = {}
        damage: Exception | None = None
        try:
            for member in shard:
                if not member.isfile() or _is_hidden(member.name):
                    continue
                if member.size > _MAX_MEMBER_BYTES:
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                members.setdefault((folder, stem), []).append((f"{stem}.{extension.lower()}", member))
        except Exception as error:
            damage = error
            if members:
                members.popitem()  # the damage may have taken members of this one
        for sample in members.values():
            yield {name: _content(shard, member) for name, member in sample}
        if damage:
            raise damage


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = shard.extractfile(member)
    assert content
    return content.read()


def image_of(members: Mapping[str, bytes]) -> str | None:
    """The member of a sample that is its image: NAME.png rather than NAME.mask.png; None where there is none.

    ValueError where several may be meant.
    """
    images = [name for name in members if Path(name).suffix in SUFFIXES]
    plain = [name for name in images if name.count(".") == 1]
    found = plain or images
    if len(found) > 1:
        raise ValueError(f"it has several images: {', '.join(sorted(found))}")
    return found[0] if found else None


def caption_of(members: Mapping[str, bytes], place: str | None = None) -> bytes | None:
    """The caption among a sample's members: NAME.txt, another .txt, or a text in its .json; None where there is none.

    `place` names the text in the .json. ValueError where the .json holds no such text.
    """
    texts = sorted((name for name in members if name.endswith(".txt")), key=lambda name: (name.count("."), name))
    if texts and place is None:
        return members[texts[0]]
    records = sorted((name for name in members if name.endswith(".json")), key=lambda name: (name.count("."), name))
    if not records:
        return None
    try:
        record = parse_json(members[records[0]])
    except ValueError:
        raise ValueError(f"{records[0]} is not valid JSON") from None
    if isinstance(record, str) and place is None:
        return record.encode()
    text = caption_in(record, place) if isinstance(record, dict) else None
    if text is None:
        raise ValueError(f"{records[0]} has no text '{place}'" if place else f"{records[0]} has none of {', '.join(CAPTIONS)}")
    return text.encode(errors="surrogatepass")


def caption_in(record: Mapping[str, Any], place: str | None = None) -> str | None:
    """The caption in a row or JSON object, at `place` or under a usual name; None where there is none.

    ValueError where something else than text is there.
    """
    if place is None:
        place = next((name for name in CAPTIONS if record.get(name) is not None), None)
    try:
        value = None if place is None else value_at(record, place)
    except KeyError:
        return None
    if not isinstance(value, str | None):
        raise ValueError(f"'{place}' holds {type(value).__name__}, where text is needed")
    return value
