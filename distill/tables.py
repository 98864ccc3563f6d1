"""Rows of tables with images and captions: parquet files, and the folders that `datasets` writes with `save_to_disk`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashdiff.datasets import CAPTIONS, value_at
from flashdiff.errors import TrainingError, first_line, install
from flashdiff.reading import read_file, read_json

_IMAGES = ("image", "jpg", "jpeg", "png", "webp")
"""Columns that hold images, the first that is there first; all but the first are webdataset's."""
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a table has its images and captions; None: under a usual name."""

    image: str | None = None
    caption: str | None = None
    further: Mapping[str, str] = field(default_factory=dict)
    """The columns of images that go with these, by what they are; in shards and folders, the words in their files' names."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """An image file with its caption, the column of that, and the image files that go with it, by what they are."""

    image: bytes | None
    caption: str | None
    column: str
    further: Mapping[str, bytes | None]


def saved_files(folder: Path) -> list[Path] | None:
    """The files of a folder that `save_to_disk` wrote, in order; of several splits, those of `train`. None for other folders.

    TrainingError where it is damaged, or none of several splits is `train`.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = read_json(folder / "dataset_dict.json")["splits"]
            chosen = splits[0] if len(splits) == 1 else "train"
            if chosen not in splits:
                raise TrainingError(f"data.source '{folder}' has the splits {', '.join(splits)}; give the folder of one of them")
            return saved_files(folder / str(chosen)) or []
        if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
            return None
        state = read_json(folder / "state.json")
        if state.get("_indices_files"):
            raise TrainingError(f"data.source '{folder}' keeps an order of its own; save it anew with `flatten_indices()`")
        return [folder / str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TrainingError(f"data.source '{folder}': its save_to_disk files are damaged ({first_line(error)})") from None


def table_rows(path: Path, where: str, columns: Columns) -> Iterator[TableRow]:
    """The rows of a parquet or arrow file, which messages call `where`.

    TrainingError names a column that is missing or of another type; OSError: the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise TrainingError(
            f"{where}: reading {path.suffix[1:]} needs 'pyarrow', which is not installed: {install('distill')}"
        ) from None
    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            schema, batches = file.schema_arrow, lambda names: file.iter_batches(batch_size=_BATCH, columns=names)
        else:
            schema, batches = _arrow(pyarrow, path)
        image, caption = _chosen(where, schema, columns)
        for batch in batches(_columns(schema, image, caption, *columns.further.values())):
            for values in batch.to_pylist():
                further = {kind: _image(path, values, column) for kind, column in columns.further.items()}
                yield TableRow(
                    image=_image(path, values, image), caption=_value(values, caption), column=caption, further=further
                )
    except TrainingError:
        raise
    except Exception as error:  # the library has many kinds for a damaged file
        raise OSError(first_line(error)) from None


def _arrow(pyarrow: Any, path: Path) -> tuple[Any, Callable[[list[str]], Iterator[Any]]]:
    """The schema of a file in arrow's stream or file format, and its batches with some of the columns."""
    source = pyarrow.memory_map(str(path))
    try:
        stream = pyarrow.ipc.open_stream(source)
        whole: Iterator[Any] = iter(stream)
    except pyarrow.ArrowInvalid:
        stream = pyarrow.ipc.open_file(source)
        whole = (stream.get_batch(index) for index in range(stream.num_record_batches))

    def batches(names: list[str]) -> Iterator[Any]:
        for batch in whole:
            for start in range(0, batch.num_rows, _BATCH):
                yield batch.select(names).slice(start, _BATCH)

    return stream.schema, batches


def _columns(schema: Any, *places: str) -> list[str]:
    """The whole columns that these places are in."""
    return list(dict.fromkeys(place if place in schema.names else place.split(".")[0] for place in places))


def _chosen(where: str, schema: Any, columns: Columns) -> tuple[str, str]:
    """The columns of images and captions; TrainingError where one is missing or of another type."""
    names = list(schema.names)
    taken = columns.further.values()
    image = columns.image or next((name for name in _IMAGES if name in names and name not in taken), None)
    caption = columns.caption or next((name for name in CAPTIONS if name in names), None) or _nested_caption(schema)
    for option, place in (("image_column", columns.image), ("caption_column", columns.caption)):
        if place and _type_at(schema, place) is None:
            raise TrainingError(f"{where}: data.{option} '{place}': there is no such column; it has {', '.join(names)}")
    if image is None or caption is None:
        raise TrainingError(
            f"{where} has columns {', '.join(names)}; it needs 'image' and one of {', '.join(CAPTIONS)}: name them in "
            "data.image_column and data.caption_column"
        )
    for kind, place in columns.further.items():
        if _type_at(schema, place) is None:
            raise TrainingError(
                f"{where}: there is no column '{place}' with {kind} images: {', '.join(names)}; name it in data.further_images"
            )
    of_caption = _type_at(schema, caption)
    for place in (image, *columns.further.values()):
        if not _holds_files(of_image := _type_at(schema, place)):
            raise TrainingError(f"{where}: column '{place}' holds {of_image}, where image files are needed (bytes, or {{bytes}})")
    if not _holds_text(of_caption):
        first = f'; data.caption_column = "{caption}.0" takes the first' if _is_list(of_caption) else ""
        raise TrainingError(f"{where}: column '{caption}' holds {of_caption}, where text is needed{first}")
    return image, caption


def _nested_caption(schema: Any) -> str | None:
    """The one field within a column that has a caption's name (webdataset's `json.caption`)."""
    from pyarrow import types

    structs = [field for field in schema if types.is_struct(field.type)]
    found = [f"{field.name}.{inner.name}" for field in structs for inner in field.type if inner.name in CAPTIONS]
    return found[0] if len(found) == 1 else None


def _type_at(schema: Any, place: str) -> Any:
    """The arrow type at a column or a field within it; None where there is none."""
    from pyarrow import types

    if place in schema.names:
        return schema.field(place).type
    first, *inner = place.split(".")
    if first not in schema.names:
        return None
    found = schema.field(first).type
    for name in inner:
        if types.is_struct(found) and found.get_field_index(name) >= 0:
            found = found.field(name).type
        elif _is_list(found) and name.isdigit():
            found = found.value_type
        else:
            return None
    return found


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind))


def _holds_files(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and (_holds_files(kind.field(index).type) or types.is_null(kind.field(index).type))
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _image(path: Path, values: dict[str, Any], column: str) -> bytes | None:
    """The bytes of an image, or of the file that the row names in their place."""
    image = _value(values, column)
    if isinstance(image, dict):
        if image.get("bytes") is None and isinstance(image.get("path"), str) and (path.parent / image["path"]).is_file():
            return read_file(path.parent / image["path"])
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None


def _value(values: dict[str, Any], column: str) -> Any:
    try:
        return value_at(values, column)
    except KeyError:  # within a field that this row lacks
        return None
