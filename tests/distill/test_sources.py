"""Data sets as people have them: hidden files, shards in any order, metadata files, tables, save_to_disk, remote shards."""

import csv
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hub import Hub, running
from PIL import Image

from flashdiff.components import Size
from flashdiff.distill.config import DataRecipe
from flashdiff.distill.sources import Damage, Sample, read_samples
from flashdiff.errors import EvaluationError, TrainingError
from flashdiff.evaluation.images import read_images


def _png(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(file, "png")
    return file.getvalue()


def _read(source: Path | str, **changes: Any) -> list[Sample]:
    damage = Damage(str(source))
    samples = list(read_samples(DataRecipe.model_validate({"source": str(source), **changes}), Size(8, 8), 0, damage))
    damage.check()
    return samples


def _found(source: Path | str, **changes: Any) -> list[tuple[str, int]]:
    """Caption and the image's number of every sample."""
    numbers = {_png(index): index for index in range(6)}
    return [(sample.caption, numbers[bytes(sample.image or b"")]) for sample in _read(source, **changes)]


def _refused(source: Path | str, **changes: Any) -> str:
    with pytest.raises(TrainingError) as error:
        _read(source, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def _tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


# --- hidden files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", ["._0.png", ".cache/0.png", "__MACOSX/0.png", "a/.thumbnails/b/0.png", ".png/0.png"])
def test_hidden_files_of_a_folder_do_not_count(tmp_path: Path, hidden: str) -> None:
    (tmp_path / "1.png").write_bytes(_png(1))
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / hidden).write_bytes(b"not an image")
    assert _found(tmp_path) == [("one", 1)]
    assert len(read_images(tmp_path)) == 1


@pytest.mark.parametrize("hidden", ["._0.tar", ".ipynb_checkpoints/0.tar", "__MACOSX/._0.parquet"])
def test_hidden_shards_of_a_folder_do_not_count(tmp_path: Path, hidden: str) -> None:
    _tar(tmp_path / "0.tar", {"1.png": _png(1), "1.txt": b"one"})
    (tmp_path / hidden).parent.mkdir(exist_ok=True)
    (tmp_path / hidden).write_bytes(b"not a shard")
    assert _found(tmp_path) == [("one", 1)]


def test_hidden_members_of_a_shard_do_not_count(tmp_path: Path) -> None:
    hidden = dict.fromkeys(("._1.png", "__MACOSX/._1.png", ".DS_Store", "./.hidden/2.png"), b"nothing")
    shard = _tar(tmp_path / "0.tar", hidden | {"./1.png": _png(1), "./1.txt": b"one"})
    assert _found(shard) == [("one", 1)]
    assert len(read_images(shard)) == 1


# --- webdataset ------------------------------------------------------------------------------------------------------

SHARDS: dict[str, dict[str, bytes]] = {
    "text first": {"0.txt": b"zero", "0.png": _png(0), "1.txt": b"one", "1.png": _png(1)},
    "images, then captions": {"0.png": _png(0), "1.png": _png(1), "1.txt": b"one", "0.txt": b"zero"},
    "json": {"0.png": _png(0), "0.json": b'{"caption": "zero", "id": 3}', "1.json": b'{"prompt": "one"}', "1.png": _png(1)},
    "json that is a text": {"0.png": _png(0), "0.json": b'"zero"', "1.png": _png(1), "1.json": b'"one"'},
    "json with another caption": {
        **{"0.png": _png(0), "0.txt": b"zero", "0.json": b'{"caption": "other"}'},
        **{"1.json": b"[1]", "1.txt": b"one", "1.png": _png(1)},
    },
    "more members": {
        **{"0.mask.png": _png(4), "0.png": _png(0), "0.txt": b"zero", "0.cls": b"3", "0.npy": b"x"},
        **{"1.long.txt": b"long", "1.txt": b"one", "1.PNG": _png(1), "1.depth.jpg": b"x"},
    },
    "folders": {"a/0.png": _png(0), "b/0.png": _png(1), "a/0.txt": b"zero", "b/0.txt": b"one", "index.json": b"[]"},
}


@pytest.mark.parametrize("kind", list(SHARDS))
def test_samples_of_shards_in_every_arrangement(tmp_path: Path, kind: str) -> None:
    shard = _tar(tmp_path / "0.tar", SHARDS[kind])
    assert _found(shard) == [("zero", 0), ("one", 1)]
    evaluated = read_images(shard)
    assert [prompt and prompt.text for prompt in evaluated.prompts] == ["zero", "one"]
    assert evaluated.pixels[:, 0, 0, 0].tolist() == [0, 40]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.TGZ", "x.tar.zst"])
def test_compressed_shards_are_refused_by_name_alone_and_next_to_others(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "below"
    folder.mkdir()
    _tar(tmp_path / "0.tar", {"0.png": _png(0), "0.txt": b"zero"})
    (folder / name).write_bytes(b"packed")
    for source in (folder / name, folder, tmp_path):
        assert f"'{source}': {name} is compressed; unpack it, shards are read as .tar" in _refused(source)
        with pytest.raises(EvaluationError, match=f"{name} is compressed; unpack it, shards are read as"):
            read_images(source)
    (folder / name).rename(folder / "notes.gz")
    assert _found(tmp_path) == [("zero", 0)]


def test_a_caption_within_a_json_member(tmp_path: Path) -> None:
    record = json.dumps({"captions": {"en": ["no", "zero"]}}).encode()
    shard = _tar(tmp_path / "0.tar", {"0.png": _png(0), "0.json": record})
    assert _found(shard, caption_column="captions.en.1") == [("zero", 0)]
    assert "0.json has no text 'captions.fr'" in _refused(shard, caption_column="captions.fr")


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"0.json": b'{"title": "zero"}'}, "0.json has none of text, caption, prompt"),
        ({"0.json": b"{"}, "0.json is not valid JSON"),
        ({"0.json": b'{"caption": 3}'}, "'caption' holds int, where text is needed"),
        ({"0.json": b'{"text": ["zero"]}'}, "'text' holds list, where text is needed"),
        ({"0.jpg": b"x", "0.txt": b"zero"}, "it has several images: 0.jpg, 0.png"),
        ({"0.cls": b"1"}, "it has no .txt or .json member"),
    ],
)
def test_a_sample_that_cannot_be_understood_is_counted_with_its_reason(
    tmp_path: Path, members: dict[str, bytes], why: str
) -> None:
    message = _refused(_tar(tmp_path / "0.tar", {"0.png": _png(0), **members}))
    assert "1 of 1 samples cannot be used" in message
    assert why in message


# --- metadata files --------------------------------------------------------------------------------------------------


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.with_suffix(".jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)))


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.with_suffix(".csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))


WRITERS: list[Callable[[Path, list[dict[str, Any]]], None]] = [_jsonl, _csv, _parquet]
CAPTION = 'a "red",\u2028quoted\ncaption'


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_of_every_kind_and_in_folders_below(
    tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], None], column: str
) -> None:
    (tmp_path / "train" / "deep").mkdir(parents=True)
    for index, name in enumerate(("0.png", "train/1.png", "train/deep/2.png")):
        (tmp_path / name).write_bytes(_png(index))
    write(tmp_path / "metadata", [{"file_name": "0.png", column: CAPTION, "extra": 1.5}])
    write(tmp_path / "train" / "metadata", [{"file_name": n, column: f"caption {n}"} for n in ("deep/2.png", "1.png")])
    assert _found(tmp_path) == [(CAPTION, 0), ("caption 1.png", 1), ("caption deep/2.png", 2)]
    assert [prompt and prompt.text for prompt in read_images(tmp_path).prompts] == [s.caption for s in _read(tmp_path)]


@pytest.mark.parametrize("name", ["./a/0.png", "a\\0.png", "a//0.png"])
def test_metadata_names_files_as_other_tools_write_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(_png(0))
    _csv(tmp_path / "metadata", [{"file_name": name, "text": "zero"}])
    assert _found(tmp_path) == [("zero", 0)]


@pytest.mark.parametrize("write", [_jsonl, _parquet])
def test_nested_columns_of_metadata(tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], None]) -> None:
    (tmp_path / "0.png").write_bytes(_png(0))
    write(tmp_path / "metadata", [{"file_name": "0.png", "meta": {"captions": ["zero", "nought"]}}])
    assert _found(tmp_path, caption_column="meta.captions.1") == [("nought", 0)]


@pytest.mark.parametrize(
    ("write", "rows", "why"),
    [
        (_jsonl, [{"file_name": "0.png", "caption": 3}], "metadata.jsonl:1: caption: Input should be a valid string"),
        (_parquet, [{"file_name": "0.png", "text": ["a"]}], "metadata.parquet, row 1: text: Input should be a valid string"),
        (_csv, [{"image": "0.png", "text": "zero"}], "metadata.csv:2: file_name: Field required"),
        (_csv, [{"file_name": "0.png", "text": "zero", "seed": "many"}], "metadata.csv:2: seed: Input should be a valid integer"),
        (_csv, [{"file_name": "0.png", "text": ""}], "0.png has no caption: no line in metadata.csv names it"),
        (_jsonl, [{"file_name": n, "text": "zero"} for n in ("0.png", "9.png")], "its metadata names 9.png"),
        (_jsonl, [{"file_name": n, "text": "zero"} for n in ("0.png", "./0.png")], "metadata.jsonl:2: 0.png has a row already"),
    ],
)
def test_bad_metadata_is_named(
    tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], None], rows: list[dict[str, Any]], why: str
) -> None:
    (tmp_path / "0.png").write_bytes(_png(0))
    write(tmp_path / "metadata", rows)
    assert why in _refused(tmp_path)


def test_two_metadata_files_of_one_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(_png(0))
    for write in (_csv, _jsonl):
        write(tmp_path / "metadata", [{"file_name": "0.png", "text": "zero"}])
    assert "has metadata.csv and metadata.jsonl; keep one of them" in _refused(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,zero,more\n")
    assert "metadata.csv:2: the line: it has another number of columns than the first" in _refused(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    assert "metadata.parquet: cannot read: " in _refused(tmp_path)


# --- tables ----------------------------------------------------------------------------------------------------------

STRUCT = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
IMAGES = [{"bytes": _png(index), "path": f"{index}.png"} for index in range(2)]
FILES = [_png(0), _png(1)]
TABLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # columns, recipe
    "structs": ({"image": pyarrow.array(IMAGES, STRUCT), "caption": ["zero", "one"]}, {}),
    "bytes": ({"image": FILES, "text": ["zero", "one"], "label": [1, 2]}, {}),
    "large types": (
        {"image": pyarrow.array(FILES, pyarrow.large_binary()), "text": pyarrow.array(["zero", "one"], pyarrow.large_string())},
        {},
    ),
    "a dictionary of captions": ({"image": FILES, "prompt": pyarrow.array(["zero", "one"]).dictionary_encode()}, {}),
    "webdataset's columns": ({"jpg": IMAGES, "json": [{"caption": "zero", "id": 1}, {"caption": "one", "id": 2}]}, {}),
    "other names": (
        {"picture": FILES, "title.en": ["zero", "one"], "text": ["no", "no"]},
        {"image_column": "picture", "caption_column": "title.en"},
    ),
    "nested": (
        {"sample": [{"view": image, "captions": ["no", text]} for image, text in zip(IMAGES, ("zero", "one"), strict=True)]},
        {"image_column": "sample.view", "caption_column": "sample.captions.1"},
    ),
}


@pytest.mark.parametrize("kind", list(TABLES))
def test_tables_with_columns_of_every_kind(tmp_path: Path, kind: str) -> None:
    columns, recipe = TABLES[kind]
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "0.parquet")
    assert _found(tmp_path, **recipe) == [("zero", 0), ("one", 1)]


@pytest.mark.parametrize(
    ("columns", "recipe", "why"),
    [
        ({"image": [[1, 2]], "text": ["a"]}, {}, "column 'image' holds list<element: int64>, where image files are needed"),
        ({"image": ["0.png"], "text": ["a"]}, {}, "column 'image' holds string, where image files are needed"),
        ({"image": [b"x"], "text": [3]}, {}, "column 'text' holds int64, where text is needed"),
        ({"image": [b"x"], "caption": [["a"]]}, {}, 'where text is needed; data.caption_column = "caption.0" takes the first'),
        ({"image": [b"x"], "title": ["a"]}, {}, "has columns image, title; it needs 'image' and one of text, caption, prompt"),
        ({"image": [b"x"], "text": ["a"]}, {"image_column": "photo"}, "data.image_column 'photo': there is no such column"),
        ({"image": [b"x"], "text": ["a"]}, {"caption_column": "text.en"}, "data.caption_column 'text.en': there is no such"),
    ],
)
def test_columns_of_other_types_are_refused_by_name(
    tmp_path: Path, columns: dict[str, Any], recipe: dict[str, Any], why: str
) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "0.parquet")
    assert why in _refused(tmp_path / "0.parquet", **recipe)


# --- save_to_disk ----------------------------------------------------------------------------------------------------


def _saved(folder: Path, indices: tuple[int, ...] = (0, 1)) -> Path:
    """As `datasets.Dataset.save_to_disk` writes it, an arrow stream a shard; one image lies in a file of its own."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(indices):05}.arrow" for number in range(len(indices))]
    for name, index in zip(names, indices, strict=True):
        (folder / f"{index}.png").write_bytes(_png(index))
        image = {"bytes": _png(index), "path": None} if index else {"bytes": None, "path": f"{index}.png"}
        table = pyarrow.table({"image": pyarrow.array([image], STRUCT), "text": [f"caption {index}"]})
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    _saved(tmp_path / "whole")
    (tmp_path / "whole" / "cache-1234.arrow").write_bytes(b"what `datasets` leaves, which state.json does not name")
    assert _found(tmp_path / "whole") == [("caption 0", 0), ("caption 1", 1)]
    assert _found(tmp_path / "whole" / "data-00001-of-00002.arrow") == [("caption 1", 1)]


def test_of_a_saved_dictionary_of_splits_train_is_taken(tmp_path: Path) -> None:
    _saved(tmp_path / "train", (2, 3))
    _saved(tmp_path / "test")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert _found(tmp_path) == [("caption 2", 2), ("caption 3", 3)]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert _found(tmp_path) == [("caption 0", 0), ("caption 1", 1)]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "validation"]}')
    assert "has the splits test, validation; give the folder of one of them" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("state.json", "{", "its save_to_disk files are damaged"),
        ("state.json", '{"_data_files": 3}', "its save_to_disk files are damaged"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow is damaged"),
        ("state.json", '{"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}', "flatten_indices()"),
        ("data-00000-of-00002.arrow", "no arrow", "data-00000-of-00002.arrow is damaged"),
    ],
)
def test_damaged_folders_of_save_to_disk(tmp_path: Path, name: str, content: str, why: str) -> None:
    (_saved(tmp_path / "saved") / name).write_text(content)
    assert why in _refused(tmp_path / "saved")


# --- remote ----------------------------------------------------------------------------------------------------------


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a web server for `tmp_path`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_remote_shards_and_tables(tmp_path: Path, address: str) -> None:
    for index in (0, 1):
        _tar(tmp_path / f"part-{index:03}.tar", {f"{index}.png": _png(index), f"{index}.txt": f"caption {index}".encode()})
    _parquet(tmp_path / "two", [{"image": _png(2), "text": "caption 2"}])
    assert _found(f"{address}/part-{{000..001}}.tar") == [("caption 0", 0), ("caption 1", 1)]
    assert _found(f"{address}/two.parquet?token=1") == [("caption 2", 2)]
    assert _read(f"{address}/part-001.tar")[0].where == f"{address}/part-001.tar/1.png"


def test_a_pattern_finds_remote_shards(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for index in (1, 0):
        shard = _tar(tmp_path / "0.tar", {f"{index}.png": _png(index), f"{index}.txt": f"caption {index}".encode()})
        memory.pipe(f"/bucket/{index}.tar", shard.read_bytes())
    memory.pipe("/bucket/._0.tar", b"hidden")
    assert _found("memory://bucket/*.tar") == [("caption 0", 0), ("caption 1", 1)]
    assert "there is no such shard" in _refused("memory://bucket/*.parquet")


def test_a_few_damaged_remote_shards_are_counted(tmp_path: Path, address: str, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(25):
        _tar(tmp_path / f"{index:02}.tar", {"0.png": _png(0), "0.txt": b"zero"})
    (tmp_path / "03.tar").write_bytes((tmp_path / "03.tar").read_bytes()[:700])
    assert len(_read(f"{address}/{{00..24}}.tar")) == 24
    assert "/03.tar is damaged" in caplog.text
    (tmp_path / "07.tar").unlink()
    assert "07.tar is damaged (404, message='File not found'" in _refused(f"{address}/07.tar")
    message = _refused(f"{address}/{{00..24}}.tar")
    assert "2 of 25 files cannot be used, more than 5%; the first: http://127.0.0.1" in message


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the data set owner/set, and the private owner/secret, on a local hub."""
    from huggingface_hub import HfFileSystem, constants

    folder = tmp_path / "set"
    folder.mkdir()
    with running(Hub({"owner/set": folder, "owner/secret": folder}, private="owner/secret")) as hub:
        for name, value in (
            ("ENDPOINT", hub.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_TOKEN_PATH", str(tmp_path / "token")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        HfFileSystem.clear_instance_cache()
        yield folder
    HfFileSystem.clear_instance_cache()


def test_shards_and_tables_of_a_data_set_on_the_hub(dataset: Path) -> None:
    for index in (0, 1):
        _tar(dataset / f"part-{index:03}.tar", {f"{index}.png": _png(index), f"{index}.txt": f"caption {index}".encode()})
    _parquet(dataset / "two", [{"image": _png(2), "text": "caption 2"}])
    here = "hf://datasets/owner/set"
    assert _found(f"{here}/part-{{000..001}}.tar") == [("caption 0", 0), ("caption 1", 1)]
    assert _found(f"{here}/*.tar") == [("caption 0", 0), ("caption 1", 1)]
    assert _found(f"{here}@main/two.parquet") == [("caption 2", 2)]
    assert _read(f"{here}/*.tar")[1].where == f"{here}/part-001.tar/1.png"
    assert "there is no such shard" in _refused(f"{here}/*.arrow")
    assert f"{here}/none.tar is damaged (there is no such file)" in _refused(f"{here}/none.tar")
    assert "hf://datasets/owner/secret/part-000.tar" in _refused("hf://datasets/owner/secret/part-000.tar")


def test_shards_and_tables_of_an_s3_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]' s3fs")
    s3fs, boto3 = pytest.importorskip("s3fs"), pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "made-up")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://{}:{}".format(*server.get_host_and_port()))
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        _parquet(tmp_path / "two", [{"image": _png(2), "text": "caption 2"}])
        for index in (0, 1):
            _tar(tmp_path / f"part-{index:03}.tar", {f"{index}.png": _png(index), f"{index}.txt": f"caption {index}".encode()})
        (tmp_path / "._0.tar").write_bytes(b"hidden")
        for path in tmp_path.iterdir():
            client.upload_file(str(path), "bucket", f"set/{path.name}")
        here = "s3://bucket/set"
        assert _found(f"{here}/part-{{000..001}}.tar") == [("caption 0", 0), ("caption 1", 1)]
        assert _found(f"{here}/*.tar") == [("caption 0", 0), ("caption 1", 1)]
        assert _found(f"{here}/two.parquet") == [("caption 2", 2)]
        assert f"{here}/none.tar is damaged (there is no such file)" in _refused(f"{here}/none.tar")
        assert "there is no such shard" in _refused("s3://none/*.tar")
    finally:
        server.stop()
    assert "Could not connect to the endpoint" in _refused(f"{here}/part-000.tar")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    assert "Unable to locate credentials" in _refused(f"{here}/part-000.tar")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("http://127.0.0.1:9/0.tar", "http://127.0.0.1:9/0.tar is damaged (Cannot connect to host"),
        ("https://example.com/data", "is no shard; remote shards end in .tar, .parquet, .arrow"),
        ("s3://bucket/{5..2}.tar", "the range {5..2} must rise"),
        ("nowhere://bucket/0.tar", "nowhere"),
    ],
)
def test_remote_sources_that_cannot_be_read(source: str, why: str) -> None:
    assert why in _refused(source)


# --- images that go with a sample's own ------------------------------------------------------------------------------


def _with_sources(source: Path, called: str = "source", **changes: Any) -> list[tuple[str, int, int]]:
    """Caption, and the numbers of the image and of its source, of every sample."""
    numbers, damage = {_png(index): index for index in range(6)}, Damage(str(source))
    recipe = DataRecipe.model_validate({"source": str(source), "further_images": {"source": called}, **changes})
    samples = list(read_samples(recipe, Size(8, 8), 0, damage, ["source"]))
    damage.check()
    return [(s.caption, numbers[bytes(s.image or b"")], numbers[s.further["source"]]) for s in samples]


def test_further_images_of_a_folder_lie_next_to_the_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    for index, name in enumerate(("0.png", "0.source.png", "a/1.png", "a/1.source.JPG", "a/1.depth.png", "a/2.old.png")):
        (tmp_path / name).write_bytes(_png(index))
    (tmp_path / "0.txt").write_text("zero")
    (tmp_path / "a" / "1.json").write_text('{"caption": "one"}')
    (tmp_path / "a" / "2.old.txt").write_text("a sample whose name has a dot")
    with pytest.raises(TrainingError, match=r"2\.old\.png has no source image: nothing is called 'source' there"):
        _with_sources(tmp_path)
    (tmp_path / "a" / "2.old.png").unlink()
    with caplog.at_level("INFO"):
        assert _with_sources(tmp_path) == [("zero", 0, 1), ("one", 2, 3)]
    assert "1 images such as a/1.depth.png go with a sample, and this run does not read them" in caplog.text
    assert [sample.caption for sample in _read(tmp_path)] == ["zero", "one"]  # a run that reads none of them
    _jsonl(tmp_path / "metadata", [{"file_name": "0.png", "text": "named"}])
    assert _with_sources(tmp_path)[0] == ("named", 0, 1)
    _jsonl(tmp_path / "metadata", [{"file_name": name, "text": "named"} for name in ("0.png", "0.source.png")])
    assert _with_sources(tmp_path)[0] == ("named", 0, 1)  # metadata may name the further images too
    (tmp_path / "0.source.png").rename(tmp_path / "0.Source.png")
    (tmp_path / "metadata.jsonl").unlink()
    assert _with_sources(tmp_path)[0] == ("zero", 0, 1)
    (tmp_path / "0.source.jpg").write_bytes(_png(3))
    with pytest.raises(TrainingError, match=r"0\.png: it has several source images: 0\.Source\.png, 0\.source\.jpg"):
        _with_sources(tmp_path)


def test_further_images_of_a_shard_are_members_of_the_sample(tmp_path: Path) -> None:
    plain = {"0.png": _png(0), "0.source.png": _png(1), "0.depth.png": _png(2), "0.txt": b"zero"}
    assert _with_sources(_tar(tmp_path / "0.tar", plain)) == [("zero", 0, 1)]
    # As published: neither of the images is plain.
    both = {"0.Before.png": _png(1), "0.after.png": _png(0), "0.json": b'{"prompt": "zero"}'}
    assert _with_sources(_tar(tmp_path / "0.tar", both), "Before") == [("zero", 0, 1)]
    for members, why in (
        ({"0.png": _png(0), "0.txt": b"zero"}, "0.png has no source image: nothing is called 'source' there"),
        ({**plain, "0.source.jpg": _png(3)}, "it has several source images: 0.source.png, 0.source.jpg"),
    ):
        with pytest.raises(TrainingError, match=why):
            _with_sources(_tar(tmp_path / "0.tar", members))


def test_further_images_of_a_table_have_columns_of_their_own(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": _png(0)}, "source": {"bytes": _png(1)}, "text": "zero"}]
    _parquet(tmp_path / "0", rows)
    assert _with_sources(tmp_path / "0.parquet") == [("zero", 0, 1)]
    published = [{"input_image": _png(1), "edited_image": _png(0), "edit_prompt": "zero"}]
    _parquet(tmp_path / "0", published)
    columns = {"image_column": "edited_image", "caption_column": "edit_prompt"}
    assert _with_sources(tmp_path / "0.parquet", "input_image", **columns) == [("zero", 0, 1)]
    for bad, why in (
        (
            [{"image": _png(0), "text": "zero"}],
            "no column 'source' with source images: image, text; name it in",
        ),
        ([{"image": _png(0), "source": "x", "text": "zero"}], "column 'source' holds string, where image files are needed"),
        ([{"image": _png(0), "source": None, "text": "a"}] * 2, "column 'source' holds null, where image files are needed"),
        ([{**rows[0], "source": {"bytes": None}}], "row 1 has no source image: nothing is called 'source' there, or it holds no"),
    ):
        _parquet(tmp_path / "0", bad)
        with pytest.raises(TrainingError, match=why):
            _with_sources(tmp_path / "0.parquet")
