"""`flashdiff evaluate`: what it measures moves the right way, and the same images give the same numbers."""

import itertools
import json
import re
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from flashdiff import cli
from flashdiff.components import Components
from flashdiff.distill.saved_student import open_checkpoint
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ConfigError, EvaluationError
from flashdiff.evaluation.command import EvaluateOptions, _select
from flashdiff.evaluation.evaluate import Evaluator, Measurement, Subject, measure
from flashdiff.evaluation.features import attribute_reader, feature_extractor, second_extractor, text_scorer
from flashdiff.evaluation.images import ImageSet, Prompt, attributes_of, read_images, read_prompts, real_images
from flashdiff.evaluation.metrics import share
from flashdiff.zoo.images import rendered
from flashdiff.zoo.world import KINDS, describe, render

PROMPTS = read_prompts("avatars", 150)


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    pixels, _ = rendered(tmp_path_factory.mktemp("renders"), tuple(KINDS), 0, 600, 64)
    reference = ImageSet("reference", pixels, (None,) * len(pixels))
    return Evaluator(feature_extractor("avatars"), text_scorer("avatars"), reference, second_extractor("avatars"))


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return real_images(PROMPTS, 2, 64)


@pytest.fixture(scope="module")
def floor(real: ImageSet, evaluator: Evaluator) -> Measurement:
    return measure(Subject(real), evaluator)[0]


def _changed(images: ImageSet, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Subject:
    return Subject(ImageSet("changed", np.stack([change(image) for image in images.pixels]), images.prompts))


def _blurred(radius: float) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    return lambda image: np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _noisy(deviation: float) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return lambda image: (image + rng.normal(0, deviation, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("damage", [(_blurred(0.9), _blurred(1.5), _blurred(3)), (_noisy(25), _noisy(45), _noisy(90))])
@pytest.mark.slow
def test_distances_are_lowest_for_real_images_and_grow_with_damage(
    damage: tuple[Callable[[NDArray[np.uint8]], NDArray[np.uint8]], ...], real: ImageSet, floor: Measurement, evaluator: Evaluator
) -> None:
    measured = [floor, *(measure(_changed(real, change), evaluator)[0] for change in damage)]
    assert all(a.fid.value < b.fid.value for a, b in itertools.pairwise(measured))
    assert all(a.second_fid.value < b.second_fid.value for a, b in itertools.pairwise(measured))
    assert all(a.kid.value < b.kid.value for a, b in itertools.pairwise(measured))
    assert measured[-1].attributes["small"].value < measured[0].attributes["small"].value


@pytest.mark.slow
def test_a_narrowed_background_shows_in_the_distances(real: ImageSet, floor: Measurement, evaluator: Evaluator) -> None:
    asked = [attributes_of(prompt)["background"] for prompt in real.prompts if prompt]
    kept = np.flatnonzero([word in ("blue", "navy") for word in asked])
    narrow = measure(Subject(real.part(kept, "narrow")), evaluator)[0]
    same_size = measure(Subject(real.part(np.arange(len(kept)), "same size")), evaluator)[0]
    assert narrow.kid.value > 2 * same_size.kid.value
    assert narrow.fid.value > same_size.fid.value > floor.fid.value  # fewer images, a larger distance: the bias


@pytest.mark.slow
def test_text_scores_tell_a_prompt_from_anothers(floor: Measurement) -> None:
    assert floor.text is not None
    assert floor.text_shuffled is not None
    assert floor.text.low > floor.text_shuffled + 30


@pytest.mark.slow
def test_the_probe_reads_real_renders(floor: Measurement) -> None:
    assert floor.attributes["kind"].value > 0.99
    assert floor.attributes["kind"] == share(floor.attributes["kind"].value, len(PROMPTS))  # two images each, one trial
    assert floor.attributes["large"].value > 0.9
    assert floor.attributes["small"].value > 0.7


def test_the_probe_sees_what_is_missing() -> None:
    bare = [seed for seed in range(200) if not {"ring", "moons"} & describe("planets", seed).phrases.keys()][:8]
    read = attribute_reader()(np.stack([render("planets", seed, 64)[0] for seed in bare]))
    assert read["kind"] == ["planet"] * 8
    assert (read["ring"] + read["moons"]).count("none") >= 15


@pytest.mark.slow
def test_copies_of_the_reference_are_near_and_one_image_has_no_diversity(evaluator: Evaluator, floor: Measurement) -> None:
    copies = ImageSet("copies", evaluator.reference.pixels[:40], (Prompt("x"),) * 40)
    assert measure(Subject(copies), evaluator)[0].nearest.value < 0.01 * floor.nearest.value
    same = ImageSet("same", np.repeat(evaluator.reference.pixels[:1], 40, axis=0), (Prompt("x"),) * 40)
    assert floor.diversity is not None
    diversity = measure(Subject(same), evaluator)[0].diversity
    assert diversity is not None
    assert diversity.value < 0.01 * floor.diversity.value


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve random pictures with captions."""
    target = tmp_path / "pictures"
    target.mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(target / f"{index}.png")
        (target / f"{index}.txt").write_text(f"a dog {index // 2}")
    return target


@pytest.mark.slow
def test_a_model_a_bundle_and_their_images_give_the_same_numbers(
    tiny_base: Path, student_bundle: Path, flash_lora: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n\na cow\n")
    common = ["--reference", str(folder), "--features", "avatars", "--text", "avatars"]
    model = [
        "evaluate",
        str(tiny_base),
        "--prompts",
        str(prompts),
        "--lora",
        str(flash_lora),
        "--steps",
        "2,1",
        "--out",
        str(tmp_path / "out"),
    ]
    teacher = ["--teacher", str(tiny_base), "--teacher-steps", "3", "--guidance", "2", "--json", str(tmp_path / "model.json")]
    assert cli.main([*model, *teacher, *common]) == 0
    table = capsys.readouterr().out
    assert "| tiny + flash, 2 steps | 6 |" in table
    (warning,) = json.loads((tmp_path / "model.json").read_text())["warnings"][:1]
    assert re.findall(r"\d+", warning) == ["6", "6", "128", "2560"]  # images, those of the reference, features, images wanted
    assert warning in table
    assert table.count("| real |") == 1
    rows = {row["name"]: row for row in json.loads((tmp_path / "model.json").read_text())["rows"]}
    assert list(rows) == ["real", "tiny + flash, 2 steps", "tiny + flash, 1 step", "tiny, 3 steps"]
    assert (tmp_path / "out" / "report.md").read_text().strip() == table.strip()
    for sheet in ("tiny, 3 steps", "tiny + flash, 1 step-nearest"):
        with Image.open(tmp_path / "out" / "sheets" / f"{sheet}.png") as drawn:
            assert drawn.width > 32

    images = tmp_path / "out" / "images" / "tiny + flash, 2 steps"
    assert cli.main(["evaluate", str(images), *common, "--json", str(tmp_path / "folder.json")]) == 0
    again = json.loads((tmp_path / "folder.json").read_text())["rows"][1]
    for row in (again, rows["tiny + flash, 2 steps"]):
        row.pop("name")
        row.pop("latent_mean")
        row.pop("latent_std")
    assert again == rows["tiny + flash, 2 steps"]

    bundle_command = ["evaluate", str(student_bundle), "--steps", "2", "--prompts", str(prompts)]
    assert cli.main([*bundle_command, *common, "--json", str(tmp_path / "bundle.json")]) == 0
    bundle = json.loads((tmp_path / "bundle.json").read_text())["rows"][1]
    assert bundle["fid"]["value"] == pytest.approx(again["fid"]["value"], rel=1e-2)


def test_guidance_is_the_teachers_and_by_default_what_the_flash_lora_was_taught_at(
    tiny_base: Path, student_bundle: Path, flash_lora: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")

    def opened(path: Path) -> Components:
        return open_checkpoint(path) if path.suffix == ".pt" else open_bundle(path)

    def guidance(subject: Path, loras: tuple[tuple[str, float], ...], given: float | None, teacher: Path | None) -> list[float]:
        name = str(teacher) if teacher else None
        options = EvaluateOptions(subject=str(subject), loras=loras, teacher=name, guidance=given, prompts=str(prompts))
        return [components.spec.sampler.guidance for _, components, _ in _select(options, opened, print).models]

    low, high = json.loads((flash_lora / "flash.json").read_text())["guidance"]
    student = (tiny_base, ((str(flash_lora), 1.0),))
    (family,) = guidance(tiny_base, (), None, None)
    assert guidance(*student, None, tiny_base) == [1.0, (low + high) / 2]
    assert guidance(*student, 2.0, tiny_base) == [1.0, 2.0]
    assert guidance(student_bundle, (), 2.0, tiny_base) == [1.0, 2.0]
    assert guidance(student_bundle, (), None, tiny_base) == [1.0, family]  # a bundle does not record the guidance of its training
    assert (low + high) / 2 != family
    saved = sorted((flash_lora / "training" / "checkpoints").iterdir())[-1]
    assert guidance(saved, (), None, tiny_base) == [1.0, (low + high) / 2]
    assert guidance(saved, (), 2.0, tiny_base) == [1.0, 2.0]
    with pytest.raises(ConfigError, match="is a bundle"):
        guidance(student_bundle, (), 2.0, None)


def test_one_name_is_given_once_and_shuffled_prompts_are_others(
    tiny_base: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ["evaluate", str(tiny_base), "--teacher", str(tiny_base), "--steps", "1", "--teacher-steps", "1", "--seeds", "17"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")
    common = ["--prompts", str(prompts), "--reference", str(folder), "--features", "avatars", "--text", "avatars"]
    assert cli.main([*same, *common, "--json", str(tmp_path / "same.json"), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    rows = json.loads((tmp_path / "same.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["real", "tiny, 1 step", "tiny, 1 step (again)"]
    assert rows[1]["fid"] == rows[2]["fid"]
    assert rows[1]["images"] == 17
    assert rows[1]["text_shuffled"] is None  # one prompt has no other


def test_shards_and_folders_hold_the_same_images(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for path in sorted(folder.iterdir()):
            shard.add(path, arcname=path.name)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shard.tar").rename(tmp_path / "shards" / "000.tar")
    whole = read_images(folder)
    for source in (tmp_path / "shards", tmp_path / "shards" / "000.tar"):
        packed = read_images(source)
        np.testing.assert_array_equal(packed.pixels, whole.pixels)
        assert packed.prompts == whole.prompts
    assert whole.groups.max() == 5
    for source in (folder, tmp_path / "shards"):  # 0, 1, 10, 11, 2, ... by name
        some = read_images(source, 3)
        np.testing.assert_array_equal(some.pixels, whole.pixels[[0, 5, 11]])


def test_the_current_folder_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert read_images(Path()).name == "pictures"


def test_a_damaged_picture_or_shard_is_named(folder: Path, tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w:gz") as packed:
        for path in sorted(folder.glob("*.png")):
            packed.add(path, arcname=path.name)
    shard.write_bytes(shard.read_bytes()[:700])  # tarfile: EOFError
    with pytest.raises(EvaluationError, match=r"shard\.tar: not a readable tar file"):
        read_images(shard)
    png = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(png[:33] + b"\0\0\0\0" + png[37:])  # pillow: SyntaxError, "broken PNG file"
    with pytest.raises(EvaluationError, match=r"0\.png is not a readable image"):
        read_images(folder)


class _Inception(torch.nn.Module):
    """Has the shape of the real network: `layers`, from a picture to 2048 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AvgPool2d(99), torch.nn.Flatten(), torch.nn.Linear(27, 2048))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def test_inception_comes_from_a_local_file_through_clean_fid(tmp_path: Path) -> None:
    pytest.importorskip("cleanfid", reason="pip install --no-deps clean-fid==0.1.35")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(_Inception()).save(tmp_path / "inception-2015-12-05.pt")
    extractor = feature_extractor(f"inception:{tmp_path}")
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), dtype=np.uint8)
    assert extractor(images).shape == (3, 2048)
    assert extractor.dimension == 2048
    assert "299x299" in extractor.resize


def test_clip_comes_from_a_local_directory(tmp_path: Path, tiny_base: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, **heads, "eos_token_id": len(tokenizer) - 1, "max_position_embeddings": 16},
        vision_config={**vision, **heads},
        projection_dim=16,
    )
    network = CLIPModel(config).eval()
    network.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer).save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (3, 40, 48, 3), dtype=np.uint8)
    texts = ["a dog", "a cat", "a very long prompt that does not fit"]
    scores = text_scorer(f"clip:{tmp_path}")(images, texts)
    processor = CLIPProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        one = processor(text=texts[1:2], images=[Image.fromarray(images[1])], return_tensors="pt")
        cosine = network(**one).logits_per_image / network.logit_scale.exp()
    assert scores.shape == (3,)
    assert scores[1] == pytest.approx(100 * cosine.item(), abs=1e-3)


def test_wrong_input_is_one_line(tmp_path: Path, folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, mixed, broken = (tmp_path / name for name in ("empty", "mixed", "broken"))
    for target in (empty, mixed, broken):
        target.mkdir()
    for index, size in enumerate((32, 48)):
        Image.new("RGB", (size, 32)).save(mixed / f"{index}.png")
    (broken / "a.png").write_bytes(b"not a picture")
    (empty / "old").mkdir()
    one, lines = tmp_path / "one", tmp_path / "lines"
    for target, line in ((one, '{"file_name": "0.png"}'), (lines, '{"file_name": "0.png", "text": "x", "scene": ["dragon", 3]}')):
        target.mkdir()
        Image.new("RGB", (32, 32)).save(target / "0.png")
        (target / "metadata.jsonl").write_text(line + "\n")
    prompts, long = tmp_path / "prompts.txt", tmp_path / "long.txt"
    prompts.write_text("a dog\n")
    long.write_text("a dog\n" + "word " * 60 + "\n")
    reference = ["--reference", folder, "--features", "avatars"]
    cases: list[tuple[list[object], str]] = [
        ([empty], "no images"),
        ([mixed], "mixed sizes, 0.png is 32x32 and 1.png is 48x32"),
        ([broken], "a.png is not a readable image"),
        (["nothing"], "no base model 'nothing'"),
        (["avatars", "--steps", "many"], "--steps 'many'"),
        (["avatars", "--steps", "1000"], "this model takes 1 to 100"),
        (["avatars", "--count", "0"], "--count 0"),
        (["avatars", "--prompts", tmp_path / "none.txt", *reference], "nor a readable text file"),
        (["avatars", "--prompts", prompts], "name a --reference too"),
        (["avatars", "--features", "resnet"], "choose avatars, inception[:FOLDER] or dino[:MODEL]"),
        (["avatars", "--features", "avatars:other"], "--features avatars:other: choose avatars, inc"),
        (["avatars", "--text", f"clip:{tmp_path}"], "no CLIP model"),
        ([folder, "--steps", "2", *reference], "--steps is for models"),
        ([folder, "--variant", "fp16", *reference], "--variant fp16: it is for a base, and "),
        (["avatars", "--variant", "fp16"], "--variant fp16: "),
        (["avatars", "--revision", "main"], "--revision main: it is for a base on the hub, owner/name, and avatars is none"),
        (["avatars", "--config", tiny_base], "it is for a base that is a single file, and avatars is none"),
        (["avatars", "--vae", "nothing"], "--vae nothing: there is no such folder"),
        (["avatars", "--sampler", "scm"], "--sampler scm: this model predicts"),
        (["avatars", "--out", empty], "exists already"),
        (["avatars", "--reference", empty, "--features", "avatars"], "no images"),
        (["avatars", "--prompts", long, *reference], "tokens, at most 32 fit"),
        ([one, *reference], "one: 1 image cannot be measured as a set"),
        ([lines, *reference], "metadata.jsonl:1: scene: Value error, a scene is one of critters"),
        (
            [folder, "--guidance", "3", "--teacher", tiny_base, "--reference-count", "2", *reference],
            "the reference holds 2 images",
        ),
    ]
    for arguments, said in cases:
        few = ["--count", "2"] if arguments[0] == "avatars" and "--count" not in arguments else []
        assert cli.main(["evaluate", *(str(argument) for argument in arguments), *few]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("flashdiff: error: "), arguments
        assert said in error, arguments


def test_inception_that_cannot_be_had_says_where_to_put_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cleanfid", reason="pip install --no-deps clean-fid==0.1.35")
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"nonsense")
    assert cli.main(["evaluate", "avatars", "--features", f"inception:{tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "put the file there" in error
    assert error.count("\n") == 1


def _tiny_clip(folder: Path) -> Any:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)
    network = CLIPModel(config).eval()
    network.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return network


def test_the_aesthetic_predictor_reads_clips_image_embedding(tmp_path: Path) -> None:
    """LAION's: linear layers and dropouts in turn, on the embedding of unit length."""
    network, images = _tiny_clip(tmp_path), np.random.default_rng(0).integers(0, 255, (3, 40, 48, 3), dtype=np.uint8)
    widths = (16, 8, 6, 4, 2, 1)
    dropouts = (torch.nn.Dropout(0.2), torch.nn.Dropout(0.2), torch.nn.Dropout(0.1))
    linear = [torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    layers = torch.nn.Sequential(
        linear[0], dropouts[0], linear[1], dropouts[1], linear[2], dropouts[2], linear[3], linear[4]
    ).eval()
    torch.save({f"layers.{name}": values for name, values in layers.state_dict().items()}, tmp_path / "aesthetic-model.pth")
    found = text_scorer(f"aesthetic:{tmp_path}")(images, ["", "", ""])
    from transformers import CLIPImageProcessor

    pixels = CLIPImageProcessor.from_pretrained(tmp_path)(images=[Image.fromarray(images[1])], return_tensors="pt")
    with torch.no_grad():
        embedding = network.visual_projection(network.vision_model(**pixels).pooler_output)
        expected = layers(embedding / embedding.norm())
    assert found[1] == pytest.approx(expected.item(), abs=1e-5)
    (tmp_path / "aesthetic-model.pth").unlink()
    with pytest.raises(
        EvaluationError, match=r"--text aesthetic: cannot read the predictor and its CLIP .* aesthetic-model\.pth: "
    ):
        text_scorer(f"aesthetic:{tmp_path}")


def test_a_clip_in_half_precision_computes_in_float32(tmp_path: Path, tiny_base: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    _tiny_clip(tmp_path)
    CLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")
    CLIPProcessor(CLIPImageProcessor.from_pretrained(tmp_path), tokenizer).save_pretrained(tmp_path)
    assert text_scorer(f"clip:{tmp_path}")(np.zeros((2, 32, 32, 3), np.uint8), ["a dog", "a cat"]).dtype == np.float32


def test_dino_comes_from_a_local_directory(tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (3, 40, 48, 3), dtype=np.uint8)
    extractor = feature_extractor(f"dino:{tmp_path}")
    with torch.no_grad():
        expected = network(**processor(images=[Image.fromarray(images[2])], return_tensors="pt")).last_hidden_state[0, 0]
    assert extractor.dimension == 32
    _tiny_clip(tmp_path / "clip")
    with pytest.raises(EvaluationError, match=r"--features dino: no DINOv2 model '.*clip', .* \(it is a clip\)"):
        feature_extractor(f"dino:{tmp_path / 'clip'}")
    np.testing.assert_allclose(extractor(images)[2], expected, atol=1e-5)


def test_the_numbers_may_lie_in_the_folder_of_the_results(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = ["evaluate", str(folder), "--reference", str(folder), "--features", "avatars", "--out", str(out)]
    assert cli.main([*command, "--json", str(out / "numbers.json")]) == 0
    assert {"report.md", "numbers.json"} <= {path.name for path in out.iterdir()}


def test_images_without_captions_have_no_part_in_the_text_score(evaluator: Evaluator) -> None:
    pixels = evaluator.reference.pixels[:6]
    all_said = ImageSet("all", pixels[:5], tuple(Prompt(f"a {word} planet") for word in ("red", "blue", "green", "pink", "teal")))
    some = ImageSet("some", pixels, (*all_said.prompts, None))
    assert measure(Subject(some), evaluator)[0].text.value == pytest.approx(measure(Subject(all_said), evaluator)[0].text.value)


def test_the_kernel_distance_of_two_prompts_has_no_interval(evaluator: Evaluator) -> None:
    two = ImageSet("two", evaluator.reference.pixels[:4], (Prompt("a"), Prompt("a"), Prompt("b"), Prompt("b")))
    kid = measure(Subject(two), evaluator)[0].kid
    assert kid is not None
    assert (kid.low, kid.high) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guidance", "3"), "--guidance without --teacher is for models; leave it out"),
        (("--sampler", "ddim"), "--sampler or an option of its group is for models; leave it out"),
        (("--count", "2"), "--count is for models; leave it out"),
        (("--seeds", "7"), "--seeds is for models; leave it out"),
        (("--prompts", "avatars-held-out"), "--prompts is for models; leave it out"),
    ],
)
def test_a_folder_of_images_takes_no_options_of_models(
    options: tuple[str, str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(folder), *options]) == 2
    assert message in capsys.readouterr().err
