"""The papers' protocols on a stand-in for COCO: a fixed list, the sizes, and numbers worked out by hand."""

import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashdiff import cli
from flashdiff.errors import ConfigError, EvaluationError
from flashdiff.evaluation import protocols
from flashdiff.evaluation.features import FeatureExtractor, TextScorer, text_scorer
from flashdiff.evaluation.metrics import Moments, frechet_distance
from flashdiff.evaluation.protocols import (
    PROTOCOLS,
    Coco,
    Meter,
    Protocol,
    middle_patch,
    protocol_of,
    protocol_table,
    read_coco,
    resized,
    run_protocol,
)
from flashdiff.families import load_base
from flashdiff.generate import generate
from flashdiff.tasks import check_order

TINY = Protocol(name="tiny-6", prompts=6, size=16)
CAPTIONS = ("a dog", "a cat", "two birds", "a red car", "a tree", "the sea", "a house", "a boat")


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path]:
    """The captions file and the folder of eight images of several sizes."""
    folder, rng = tmp_path / "val2014", np.random.default_rng(0)
    folder.mkdir()
    images, annotations = [], []
    for number, caption in enumerate(CAPTIONS, start=100):
        name = f"COCO_val2014_{number:012}.jpg"
        Image.fromarray(rng.integers(0, 255, (30, 20 + number % 3, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": number, "file_name": name})
        annotations += [{"image_id": number, "id": 2 * number + 1, "caption": "another"}]
        annotations += [{"image_id": number, "id": 2 * number, "caption": f" {caption}\n"}]
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file, folder


def _means(images: Any) -> Any:
    return images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32)


FEATURES = FeatureExtractor("mean colours", 3, "not at all", _means)
LENGTHS = TextScorer("length", lambda images, texts: np.array([len(text) for text in texts], np.float32))


def test_the_list_of_prompts_is_fixed_and_takes_each_images_first_caption(coco: tuple[Path, Path]) -> None:
    found = read_coco(TINY, *coco)
    assert found.captions == ("the sea", "a cat", "a boat", "two birds", "a red car", "a house")
    assert len(found.files) == 8
    file, _ = coco
    values = json.loads(file.read_text())
    file.write_text(json.dumps({name: entries[::-1] for name, entries in values.items()}))
    assert read_coco(TINY, *coco) == found


def test_sizes_are_those_of_the_protocols() -> None:
    assert {(name, of.prompts, of.size) for name, of in PROTOCOLS.items()} == {
        ("coco2014-30k", 30_000, 256),
        ("coco2014-10k", 10_000, 256),
        ("coco2017-5k", 5_000, 512),
    }
    picture = np.arange(320 * 400 * 3, dtype=np.uint32).reshape(320, 400, 3).astype(np.uint8)
    assert resized(picture, 64).shape == (64, 64, 3)
    assert np.array_equal(middle_patch(picture), picture[10:309, 50:349])
    assert middle_patch(picture[:100]).shape == (299, 299, 3)


def test_a_models_row_is_what_its_images_give_by_hand(coco: tuple[Path, Path], tiny_base: Path) -> None:
    _, model = load_base(str(tiny_base))
    data = read_coco(TINY, *coco)
    meter = Meter(protocol=TINY, features=FEATURES, scorers=(LENGTHS,), keep=None, report=lambda _: None)
    (row,) = (report := run_protocol(meter, data, [("tiny", model, 2)])).rows
    orders = [check_order(model.spec, prompt=text, seed=seed, steps=2) for seed, text in enumerate(data.captions)]
    made = [images[0] for images in generate(model, orders)]
    real = [np.asarray(Image.open(file).convert("RGB")) for file in data.files]
    for change, found in ((lambda image: resized(image, 16), row.fid), (middle_patch, row.patch_fid)):
        sides = [Moments.of(_means(np.stack([change(image) for image in images]))) for images in (made, real)]
        assert found == pytest.approx(frechet_distance(*sides), rel=1e-6)
    assert row.scores == {"length": pytest.approx(np.mean([len(text) for text in data.captions]))}
    assert "| tiny | 2 |" in protocol_table(report)


def test_a_killed_run_goes_on_and_another_model_of_the_name_starts_anew(
    coco: tuple[Path, Path], tiny_base: Path, flash_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashdiff.lora import load_fused

    monkeypatch.setattr(protocols, "_CHUNK", 4)
    _, model = load_base(str(tiny_base))
    drawn: list[int] = []
    monkeypatch.setattr(protocols, "generate", lambda model, orders: (drawn.append(len(orders)), generate(model, orders))[1])
    meter = Meter(protocol=TINY, features=FEATURES, scorers=(LENGTHS,), keep=tmp_path / "kept", report=lambda _: None)
    data = read_coco(TINY, *coco)
    first = run_protocol(meter, data, [("tiny", model, 2)])
    assert drawn == [1, 4, 2]
    drawn.clear()
    assert run_protocol(meter, data, [("tiny", model, 2)]) == first
    assert drawn == [1]
    _, student = load_fused(str(tiny_base), [(flash_lora, 1.0)], None)
    assert run_protocol(meter, data, [("tiny", student, 2)]).rows != first.rows


def test_a_damaged_file_of_kept_features_is_measured_again(coco: tuple[Path, Path], tmp_path: Path) -> None:
    meter = Meter(protocol=TINY, features=FEATURES, scorers=(LENGTHS,), keep=tmp_path / "kept", report=lambda _: None)
    data = read_coco(TINY, *coco)
    first = meter.measure_real(data).whole
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(meter.measure_real(data).whole, first)
    other = Meter(protocol=TINY, features=FEATURES, scorers=(), keep=tmp_path / "kept", report=lambda _: None)
    other.measure_real(data)  # scores are none of real images
    assert list((tmp_path / "kept").iterdir()) == [file]


def test_images_of_one_prompt_differ_by_their_mean_cosine_distance(
    coco: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = load_base(str(tiny_base))
    data = read_coco(TINY, *coco)
    meter = Meter(protocol=TINY, features=FEATURES, scorers=(), diversity=FEATURES, keep=tmp_path / "kept", report=lambda _: None)
    found = run_protocol(meter, data, [("tiny", model, 1)])
    distances = []
    for number, text in enumerate(data.captions):
        orders = [check_order(model.spec, prompt=text, seed=number + 6 * again, steps=1) for again in range(5)]
        means = _means(np.stack([images[0] for images in generate(model, orders)]))
        cosines = [a @ b / np.sqrt(a @ a * (b @ b)) for a, b in itertools.combinations(means, 2)]
        distances.append(1 - np.mean(cosines))
    assert found.rows[0].diversity == pytest.approx(100 * np.mean(distances), rel=1e-3)
    assert "| DINO diversity |" in protocol_table(found)
    monkeypatch.setattr(Meter, "_diversity", lambda *_: 0 / 0)
    assert run_protocol(meter, data, [("tiny", model, 1)]) == found  # kept


def test_blank_captions_are_passed_over(coco: tuple[Path, Path]) -> None:
    file, folder = coco
    values = json.loads(file.read_text())
    for entry in values["annotations"]:
        if entry["id"] == 200:  # the first caption of the first image
            entry["caption"] = " \n"
    file.write_text(json.dumps(values))
    assert "another" in read_coco(Protocol(name="all", prompts=8, size=16), file, folder).captions


def test_real_images_that_changed_are_measured_again(coco: tuple[Path, Path], tmp_path: Path) -> None:
    meter = Meter(protocol=TINY, features=FEATURES, scorers=(), keep=tmp_path / "kept", report=lambda _: None)
    data = read_coco(TINY, *coco)
    first = meter.measure_real(data).whole
    assert np.array_equal(meter.measure_real(data).whole, first)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    Image.new("RGB", (40, 40), (9, 9, 9)).save(data.files[2])
    second = meter.measure_real(data).whole
    assert [bool(np.array_equal(*rows)) for rows in zip(first, second, strict=True)] == [number != 2 for number in range(8)]
    shutil.copytree(coco[1], tmp_path / "elsewhere", copy_function=shutil.copy2)
    meter.measure_real(read_coco(TINY, coco[0], tmp_path / "elsewhere"))
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_the_command_writes_the_papers_table(
    coco: tuple[Path, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, TINY.name, TINY)
    file, folder = coco
    command = ["evaluate", str(tiny_base), "--protocol", TINY.name, "--prompts", str(file), "--reference", str(folder)]
    command += ["--steps", "2,1", "--features", "avatars", "--text", "avatars", "--json", str(tmp_path / "numbers.json")]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "| model | steps | FID | patch-FID | avatars dual encoder" in table
    assert "tiny-6: 6 prompts" in table
    assert (tmp_path / "out" / "report.md").read_text() == table
    assert [row["steps"] for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]] == [2, 1]
    for more, message in (
        (["--count", "7"], "--count 7: tiny-6 settles it"),
        (
            ["--scores", "beauty"],
            "--scores beauty: choose avatars, clip[:MODEL], pickscore, aesthetic[:FOLDER], image-reward, hps",
        ),
        (["--scores", "dino,dino"], "--scores dino,dino: give dino once"),
        (["--scores", f"dino:{folder}"], f"--scores dino: no DINOv2 model '{folder}', neither a directory nor on the hub"),
        (["--teacher-steps", "4"], "--teacher-steps 4: it is for --teacher; give one"),
        (["--json", str(folder)], f"--json {folder}: cannot be written: it is a folder"),
        (["--reference", "avatars"], "--protocol tiny-6: give --prompts captions_val20XX.json and --reference FOLDER"),
        (["--protocol", "coco"], "--protocol coco: choose coco2014-30k, coco2014-10k, coco2017-5k, tiny-6"),
        (["--protocol", "coco2017-5k"], "coco2017-5k needs captions of 5000 images, the file has 8"),
    ):
        assert cli.main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_set_that_is_not_whole_is_refused(coco: tuple[Path, Path]) -> None:
    file, folder = coco
    sorted(folder.iterdir())[0].unlink()
    with pytest.raises(
        EvaluationError, match=r"1 of the 8 images that captions_val2014\.json lists are not there, the first: COCO_"
    ):
        read_coco(TINY, file, folder)
    file.write_text('{"images": []}')
    with pytest.raises(EvaluationError, match="no captions file of COCO"):
        read_coco(TINY, file, folder)
    with pytest.raises(ConfigError, match="--protocol nothing: choose coco2014-30k"):
        protocol_of("nothing")


class _Hps(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image_features": self.weight * image, "text_features": text}


def test_preferences_come_from_their_packages_or_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images, texts = np.full((2, 8, 8, 3), 7, np.uint8), ["a", "abc"]
    rate = SimpleNamespace(score=lambda text, picture: len(text) + picture.width)
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: rate))
    assert text_scorer("image-reward")(images, texts).tolist() == [9, 11]
    network, loaded = _Hps(), tmp_path / "HPS_v2.1.pt"
    torch.save({"state_dict": {"weight": torch.tensor(0.5)}}, loaded)
    parts = SimpleNamespace(
        initialize_model=lambda: None,
        model_dict={"model": network, "preprocess_val": lambda picture: torch.tensor([float(picture.width)])},
        get_tokenizer=lambda name: lambda texts: torch.tensor([[float(len(texts[0]))]]),
    )
    for name, module in (
        ("", SimpleNamespace()),
        (".img_score", parts),
        (".utils", SimpleNamespace(hps_version_map={"v2.1": "x"})),
    ):
        monkeypatch.setitem(sys.modules, f"hpsv2{name}", module)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: str(loaded))
    assert text_scorer("hpsv2")(images, texts).tolist() == pytest.approx([400, 1200])  # 100 x 0.5 x width x length
    rate.score = lambda text, picture: 1 / 0
    with pytest.raises(EvaluationError, match=r"--scores image-reward: .* cannot load or run its model \(division by zero\)"):
        text_scorer("image-reward", "--scores")
    for name in ("hpsv2", "hpsv2.img_score"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        EvaluationError, match=r"--text hpsv2 needs 'hpsv2.*', which is not installed: pip install --no-deps hpsv2"
    ):
        text_scorer("hpsv2")
    assert Coco(captions=("a",), files=()).prompts_hash != Coco(captions=("b",), files=()).prompts_hash
