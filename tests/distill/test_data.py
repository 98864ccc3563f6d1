"""What training may be fed, what it says of bad input, and the order in which samples come."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from recipes import CAPTIONS, image_folder

from flashdiff.components import Size
from flashdiff.distill import data
from flashdiff.distill.config import DataRecipe
from flashdiff.distill.data import Dataset, Item, aspect_sizes, load_dataset, nearest_size
from flashdiff.errors import TrainingError
from flashdiff.families import load_base
from flashdiff.families.base import TorchModel


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> TorchModel:
    return load_base(str(tiny_base))[1]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _load(model: TorchModel, source: Path, **changes: Any) -> Dataset:
    recipe = DataRecipe.model_validate({"source": str(source), **changes})
    return load_dataset(recipe, model, batch_size=2, seed=0)


def _png(index: int, size: tuple[int, int] = (50, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (40 * index, 255 - 40 * index, 128)).save(file, "png")
    return file.getvalue()


def _listed(path: Path) -> Path:
    path.mkdir()
    lines = [json.dumps({"file_name": f"{index}.png", "text": caption}) for index, caption in enumerate(CAPTIONS)]
    for index in range(len(CAPTIONS)):
        (path / f"{index}.png").write_bytes(_png(index))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def _shard(path: Path, captions: tuple[str, ...] = CAPTIONS) -> Path:
    with tarfile.open(path, "w") as shard:
        for index, caption in enumerate(captions):
            for name, content in ((f"{index}.png", _png(index)), (f"{index}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def _parquet(path: Path, captions: tuple[str | None, ...] = CAPTIONS) -> Path:
    images = [{"bytes": _png(index), "path": None} for index in range(len(captions))]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": captions}), path)
    return path


def test_every_kind_of_source_gives_the_same_tensors(model: TorchModel, tmp_path: Path) -> None:
    sources = [
        image_folder(tmp_path / "a"),
        _listed(tmp_path / "b"),
        _shard(tmp_path / "c.tar"),
        _parquet(tmp_path / "d.parquet"),
    ]
    first, *others = (_load(model, source) for source in sources)
    assert len(first) == len(CAPTIONS)
    order = range(len(CAPTIONS))
    direct = model.encode_ids(model.tokenizer(CAPTIONS))
    torch.testing.assert_close(first.conditioning(order)["encoder_hidden_states"], direct["encoder_hidden_states"])
    assert first.latents(order).shape == (6, 4, 8, 8)
    assert first.latents(order).std(dim=0).max() > 0  # the pictures differ
    for other in others:
        assert torch.equal(other.latents(order), first.latents(order))


def test_a_folder_of_shards_is_read_as_one_and_no_further_than_asked(model: TorchModel, tmp_path: Path) -> None:
    _shard(tmp_path / "0.tar", CAPTIONS[:3])
    _parquet(tmp_path / "1.parquet", CAPTIONS[3:])
    assert len(_load(model, tmp_path)) == 6
    assert len(_load(model, tmp_path, images=4)) == 4


def test_nothing_is_encoded_twice_and_a_damaged_cache_file_is_made_anew(
    model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image_folder(tmp_path / "images")
    before = _load(model, source)
    encoded: list[Path] = []
    write = data._write
    monkeypatch.setattr(data, "_write", lambda path, tensors: (encoded.append(path), write(path, tensors)))
    _load(model, source)
    assert encoded == []
    broken = before.items[2].latents
    assert broken
    wanted = before.latents([2])
    broken.write_bytes(broken.read_bytes()[:-7])  # as a crash of the whole machine leaves it
    (source / "4.txt").write_text("something else")
    after = _load(model, source)
    assert encoded == [broken, after.items[4].prompt]
    assert torch.equal(after.latents([2]), wanted)


def test_images_of_one_batch_share_the_nearest_of_several_sizes(model: TorchModel, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images")
    for index in (1, 4):
        (source / f"{index}.png").write_bytes(_png(index, (30, 60)))
    found = _load(model, source, buckets=True)
    assert found.sizes == [Size(24, 40), Size(32, 32)]
    for number in range(12):
        size, chosen = found.batch(number)
        assert found.latents(chosen).shape == (2, 4, size.height // 4, size.width // 4)


@pytest.mark.parametrize("side", [512, 1024])
def test_aspect_sizes_keep_the_area_and_are_whole_steps(side: int) -> None:
    sizes = aspect_sizes(Size(side, side), 8)
    assert Size(side, side) in sizes
    for width, height in sizes:
        assert 0.85 < width * height / side**2 < 1.15
        assert width % (side // 8) == height % (side // 8) == 0
        assert max(width, height) <= 2 * min(width, height)
    assert nearest_size(sizes, 300, 300) == Size(side, side)
    wide = nearest_size(sizes, 1600, 900)
    assert wide.width > wide.height


def test_an_epoch_holds_every_item_and_the_order_is_a_function_of_seed_and_number() -> None:
    sizes = [Size(32, 32)] * 7 + [Size(48, 24)] * 4
    items = [(size, Item(Path(str(index)), None)) for index, size in enumerate(sizes)]
    made = [Dataset(items, batch_size=2, seed=seed) for seed in (3, 3, 4)]
    assert made[0].batches_per_epoch == 6
    epochs = [[made[0].batch(number) for number in range(6 * epoch, 6 * epoch + 6)] for epoch in range(2)]
    for epoch in epochs:
        assert set(np.concatenate([chosen for _, chosen in epoch]).tolist()) == set(range(11))
        assert all(sizes[index] == size for size, chosen in epoch for index in chosen)
    assert [chosen.tolist() for _, chosen in epochs[0]] != [chosen.tolist() for _, chosen in epochs[1]]
    for number in (8, 0, 5):  # in any order: a resumed run starts in the middle
        assert made[1].batch(number)[1].tolist() == made[0].batch(number)[1].tolist()
    assert any(made[2].batch(number)[1].tolist() != made[0].batch(number)[1].tolist() for number in range(6))


def test_a_few_damaged_samples_are_skipped_and_counted(
    model: TorchModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _shard(tmp_path / "many.tar", tuple(f"{CAPTIONS[index % 6]} {index}" for index in range(40)))
    folder = tmp_path / "out"
    with tarfile.open(source) as shard:
        shard.extractall(folder, filter="data")
    (folder / "3.png").write_bytes(_png(3)[:60])
    (folder / "9.txt").write_text(" ")
    with caplog.at_level("INFO"):
        assert len(_load(model, folder)) == 38
    assert "2 samples skipped" in caplog.text


def test_one_damaged_shard_of_many_is_skipped_once_and_counted(
    model: TorchModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "many").mkdir()
    for number in range(20):
        _shard(tmp_path / "many" / f"{number:02}.tar", (f"a dog {number}",))
    first = tmp_path / "many" / "00.tar"
    first.write_bytes(first.read_bytes()[:700])
    with caplog.at_level("INFO"):
        assert len(_load(model, tmp_path / "many")) == 19
    assert caplog.text.count("00.tar is damaged") == 1
    assert ", 1 files skipped" in caplog.text
    (tmp_path / "many" / "01.tar").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"2 of 20 files cannot be used, more than 5%; the first: .*00\.tar is damaged"):
        _load(model, tmp_path / "many")


def test_bad_data_is_named_in_one_line(model: TorchModel, tmp_path: Path) -> None:
    def refused(source: Path) -> str:
        with pytest.raises(TrainingError) as error:
            _load(model, source)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "neither 'avatars' nor a folder" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no images or prompts" in refused(tmp_path / "empty")
    (tmp_path / "prompts.txt").write_text("\n \n")
    assert "holds no images or prompts" in refused(tmp_path / "prompts.txt")

    folder = image_folder(tmp_path / "images")
    (folder / "3.txt").unlink()
    assert "1 of 6 samples cannot be used" in refused(folder)
    assert "3.png has no caption: 3.txt is missing" in refused(folder)
    (folder / "3.txt").write_bytes(b"\xff\xfe\x00")
    assert "3.png: its caption is not UTF-8 text" in refused(folder)
    (folder / "3.txt").write_text("x")
    (folder / "3.png").write_bytes(b"not a picture")
    assert "3.png is not a readable image" in refused(folder)

    listed = _listed(tmp_path / "listed")
    whole = (listed / "metadata.jsonl").read_text().splitlines()
    (listed / "metadata.jsonl").write_text("\n".join([whole[0], '{"file_name": "1.png", "text": ""}', *whole[2:]]))
    assert "metadata.jsonl:2: text:" in refused(listed)
    (listed / "metadata.jsonl").write_text("\n".join(whole[1:]))
    assert "0.png has no caption: no line in metadata.jsonl names it" in refused(listed)

    assert "d.parquet, row 2 has no caption: column 'caption' is empty" in refused(
        _parquet(tmp_path / "d.parquet", ("a", None, "c"))
    )
    pyarrow.parquet.write_table(pyarrow.table({"picture": [b"1"], "text": ["a"]}), tmp_path / "e.parquet")
    assert "e.parquet has columns picture, text; it needs 'image'" in refused(tmp_path / "e.parquet")
    (tmp_path / "f.parquet").write_bytes(b"PAR1 nonsense")
    assert "1 of 1 files cannot be used, more than 5%; the first: " in refused(tmp_path / "f.parquet")
    shard = _shard(tmp_path / "g.tar")
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "g.tar is damaged" in refused(shard)
