"""`flashdiff evaluate --task`: what requests bring, what is measured of their images, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashdiff import cli
from flashdiff.controls import ControlRequest, check_controls, steered
from flashdiff.errors import ConfigError, RequestError
from flashdiff.evaluation.command import _as_options
from flashdiff.evaluation.images import ImageSet, Prompt
from flashdiff.evaluation.metrics import Interval
from flashdiff.evaluation.tasks import EDGES, OUTSIDE, PSNR, SEAM, SILHOUETTES, SMALL, TaskData, check_task, task_data
from flashdiff.families import family_of

_PROMPTS = tuple(Prompt(f"prompt {number // 2}") for number in range(6))


@pytest.fixture
def originals() -> ImageSet:
    """Six pictures of noise, two a prompt."""
    return ImageSet("real", np.random.default_rng(0).integers(0, 256, (6, 16, 32, 3), dtype=np.uint8), _PROMPTS)


def test_masks_take_turns_and_the_input_row_is_grey_under_them(originals: ImageSet) -> None:
    data = task_data("inpainting", originals, {})
    masks = [given["mask"][..., 0] > 0 for given in data.inputs]
    upper, box, rest = masks[:3]
    assert (upper[:8].all(), upper[8:].any()) == (True, False)
    assert box.sum() == 8 * 16
    assert box[4:12, 8:24].all()
    assert np.array_equal(rest, ~box)
    for number, mask in enumerate(masks):
        assert np.array_equal(data.inputs[number]["image"], originals.pixels[number])
        assert (data.unchanged.pixels[number][mask] == 127).all()
        assert np.array_equal(data.unchanged.pixels[number][~mask], originals.pixels[number][~mask])


def test_images_start_from_those_of_another_prompt(originals: ImageSet) -> None:
    data = task_data("image_to_image", originals, {"strength": 0.5})
    assert np.array_equal(data.unchanged.pixels, originals.pixels[[2, 3, 4, 5, 0, 1]])
    assert data.requests[0]["parameters"] == {"strength": 0.5}
    assert data.of_image(0, originals.pixels[0], originals.pixels[0].copy) == {}
    in_turns = ImageSet("real", originals.pixels[:4], tuple(originals.prompts[place] for place in (0, 2, 0, 2)))
    others = task_data("image_to_image", in_turns, {}).inputs
    assert np.array_equal([given["image"] for given in others], originals.pixels[[1, 0, 3, 2]])
    with pytest.raises(ConfigError, match="give two prompts at least"):
        task_data("image_to_image", originals.part(np.arange(2), "one prompt"), {})


def test_a_seam_and_changes_outside_the_mask_are_measured() -> None:
    levels = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None] * 8, (3, 16, 16, 3))  # a ramp: steps of 8 downwards
    originals = ImageSet("real", np.ascontiguousarray(levels), _PROMPTS[::2])
    data = task_data("inpainting", originals, {})
    kept = _numbers(data, originals.pixels, originals.pixels)
    assert kept[OUTSIDE].value > 100
    assert kept[SEAM].value == 1

    brighter = originals.pixels + np.stack([given["mask"] > 0 for given in data.inputs]).astype(np.uint8) * 40
    seen = _numbers(data, brighter, originals.pixels + 5)
    assert seen[OUTSIDE].value == pytest.approx(20 * np.log10(255 / 5))
    # Downwards the step is 8 - 40 below the mask and 8 + 40 above it, sideways 40 in place of 0.
    ours, theirs = zip(*(_steps(data, number) for number in range(3)), strict=True)
    assert seen[SEAM].value == pytest.approx(sum(ours) / sum(theirs))


def test_a_flat_original_among_others_leaves_the_seam() -> None:
    levels = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None] * 8, (3, 16, 16, 3)).copy()
    levels[0] = 90
    originals = ImageSet("real", levels, _PROMPTS[::2])
    assert _numbers(task_data("inpainting", originals, {}), levels, levels)[SEAM].value == 1


def test_flat_originals_have_no_seam() -> None:
    flat = ImageSet("real", np.full((3, 16, 16, 3), 90, dtype=np.uint8), _PROMPTS[::2])
    assert set(_numbers(task_data("inpainting", flat, {}), flat.pixels, flat.pixels)) == {OUTSIDE}


def _boxes(*left: int) -> ImageSet:
    """Pictures of 32x32 with a box of 12x12 pixels, this far from the left."""
    pixels = np.full((len(left), 32, 32, 3), 60, dtype=np.uint8)
    for picture, x in zip(pixels, left, strict=True):
        picture[8:20, x : x + 12] = 200
    return ImageSet("real", pixels, _PROMPTS[: 2 * len(left) : 2])


def test_controls_are_drawn_from_the_originals_and_images_compared_with_them() -> None:
    originals = _boxes(4, 10, 16)
    data = task_data("control", originals, {"edges": 0.5})
    ((control,),) = {tuple(request["controls"]) for request in data.requests[:1]}
    assert (control.name, control.scale, data.unchanged) == ("edges", 0.5, None)
    outline = control.image[..., 0] > 0
    ring = np.zeros((32, 32), np.bool_)
    ring[7:21, 3:17], ring[9:19, 5:15] = True, False
    assert 40 <= outline.sum() <= 52
    assert not outline[~ring].any()

    equal = _numbers(data, originals.pixels, originals.pixels)
    assert (equal[EDGES].value, equal[SILHOUETTES].value) == (100, 100)
    near, far = (_numbers(data, _boxes(*(x + by for x in (4, 10, 16))).pixels, originals.pixels) for by in (1, 3))
    assert near[EDGES].value == 100  # a pixel off
    assert 40 < far[EDGES].value < 80  # the upper and the lower edges, but for their ends
    # The median takes the corners of a box: 4 of 144 pixels, of which an overlap of 9 columns has 2 and a union all 8.
    assert far[SILHOUETTES].value == pytest.approx(100 * (9 * 12 - 2 - 2) / (15 * 12 - 2 - 2), abs=2)
    blank = _numbers(data, np.full_like(originals.pixels, 60), originals.pixels)
    assert (blank[EDGES].value, blank[SILHOUETTES].value) == (0, 0)


def test_tiles_are_compared_with_their_originals_and_may_be_started_from(originals: ImageSet) -> None:
    data = task_data("control", originals, {"tile": 0.5})
    ((control,),) = {tuple(request["controls"]) for request in data.requests[:1]}
    assert (control.name, control.scale) == ("tile", 0.5)
    assert np.array_equal(control.image, data.unchanged.pixels[0])
    assert np.array_equal(data.unchanged.pixels, task_data("upscaling", originals, {}).unchanged.pixels)
    assert (data.requests[0]["inputs"], data.requests[0]["parameters"]) == ({}, {})
    exact, input_row = _numbers(data, originals.pixels, originals.pixels), data.numbers_of_input
    assert set(exact) == set(input_row) == {PSNR, SMALL, EDGES, SILHOUETTES}
    assert exact[PSNR].value > 100 > input_row[SMALL].value > input_row[PSNR].value
    off_by_five = np.where(originals.pixels < 128, originals.pixels + 5, originals.pixels - 5)
    assert _numbers(data, off_by_five, off_by_five)[PSNR].value == pytest.approx(20 * np.log10(255 / 5))

    started = task_data("control", originals, {"tile": 0.0, "strength": 0.25})
    assert started.requests[0]["parameters"] == {"strength": 0.25}
    assert np.array_equal(started.requests[0]["inputs"]["image"], data.unchanged.pixels[0])


def test_control_is_for_models_that_take_controls(tiny_base: Path) -> None:
    spec = family_of(tiny_base).read_spec(tiny_base)
    with pytest.raises(ConfigError, match="--task control: tiny takes no controls: give a bundle of build-engine --control"):
        check_task("control", spec, "tiny", {"edges": 1.0})
    steerable = steered(spec, ["edges"])
    check_task("control", steerable, "tiny", {"edges": 1.0})
    with pytest.raises(ConfigError, match=r"--parameter silhouettes=0\.5: tiny takes edges"):
        check_task("control", steerable, "tiny", {"edges": 1.0, "silhouettes": 0.5})
    request = ControlRequest(name="edges", image=np.zeros((32, 32, 3), dtype=np.uint8), scale=3.0)
    with pytest.raises(ConfigError, match="--parameter edges=3: it must be between 0 and 2"), _as_options({"edges": 3.0}):
        check_controls(steerable, [request])


def _numbers(data: TaskData, made: Any, decoded: Any) -> dict[str, Interval]:
    of_images = [data.of_image(number, made[number], decoded[number].copy) for number in range(len(made))]
    return data.numbers(of_images, data.originals.groups)


def _steps(data: TaskData, number: int) -> tuple[float, float]:
    """The mean steps across the edge of a mask, of what it makes brighter by 40 and of the ramp, counted one by one."""
    mask = data.inputs[number]["mask"][..., 0] > 0
    ours, theirs = [], []
    for y in range(16):
        for x in range(16):
            for down, right in ((1, 0), (0, 1)):
                if y + down < 16 and x + right < 16 and mask[y, x] != mask[y + down, x + right]:
                    theirs.append(8.0 * down)
                    ours.append(abs(8 * down + 40 * (int(mask[y + down, x + right]) - int(mask[y, x]))))
    return float(np.mean(ours)), float(np.mean(theirs))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four captioned pictures of the tiny model's size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a dog {index}")
    return folder


def test_a_users_images_are_the_originals(tiny_base: Path, photos: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = ["evaluate", str(tiny_base), "--steps", "1", "--images", str(photos), "--reference", str(photos)]
    options = ["--features", "avatars", "--json", str(found)]
    assert cli.main([*command, *options, "--task", "inpainting", "--parameter", "strength=1"]) == 0
    rows = {row["name"]: row for row in json.loads(found.read_text())["rows"]}
    assert list(rows) == ["real", "input", "tiny, 1 step"]
    assert [row["images"] for row in rows.values()] == [4, 4, 4]
    assert rows["real"]["fid"]["value"] < rows["input"]["fid"]["value"]
    assert set(rows["tiny, 1 step"]["of_task"]) == {OUTSIDE, SEAM}
    assert not rows["input"]["of_task"]


def test_wrong_input_is_one_line(tiny_base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    for index in range(2):
        Image.new("RGB", (16, 16)).save(small / f"{index}.png")
        (small / f"{index}.txt").write_text("a dog")
    bare = tmp_path / "bare"
    bare.mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32)).save(bare / f"{index}.png")
    own = ["--reference", str(photos), "--features", "avatars", "--images"]
    cases = [
        (["--images", str(photos)], f"--images {photos}: it is for --task; give one"),
        (["--parameter", "strength=0.5"], "--parameter strength=0.5: it is for --task; give one"),
        (["--task", "super"], "--task super: choose image_to_image, inpainting, edit, upscaling, super_resolution, control"),
        (["--task", "edit", *own, str(photos)], "--task edit: tiny does text_to_image, image_to_image, inpainting, upscaling"),
        (["--task", "inpainting", "--images", str(photos)], "give --reference, a folder of other images"),
        (["--task", "inpainting", *own, str(photos), "--seeds", "3"], "neither --prompts nor --seeds"),
        (["--task", "inpainting", *own, str(bare)], "2 images have no caption"),
        (
            ["--task", "inpainting", *own, str(small)],
            "'16x16' is not allowed; it must have 32x32 pixels; the images",
        ),
        (
            ["--task", "inpainting", *own, str(photos), "--parameter", "strength=2"],
            "--parameter strength=2: it must be above",
        ),
        (
            ["--task", "inpainting", *own, str(photos), "--parameter", "power=1"],
            "--parameter power=1: no task of this model",
        ),
        (["--task", "control", *own, str(photos)], "--task control: name a control and its scale, as --parameter edges=1"),
        (
            ["--task", "control", *own, str(photos), "--parameter", "pose=1"],
            "--parameter pose=1: of --task control, edges, silhouettes, tile can be drawn",
        ),
        (
            ["--task", "control", *own, str(photos), "--parameter", "edges=1", "--parameter", "strength=0.5"],
            "--parameter strength=0.5: of --task control, it is for tile",
        ),
        (["--task", "control", *own, str(photos), "--parameter", "edges=1"], "tiny takes no controls"),
        (["--images", str(photos), "--protocol", "coco2017-5k"], "it is for --task; give one"),
        (["--task", "inpainting", "--protocol", "coco2017-5k"], "measures text to image alone"),
        (["--task", "inpainting", "--prompts", "none.txt", "--reference", str(photos)], "give --images"),
    ]
    for arguments, said in cases:
        assert cli.main(["evaluate", str(tiny_base), *arguments]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("flashdiff: error: "), arguments
        assert said in error, (arguments, error)
    assert cli.main(["evaluate", str(photos), "--task", "inpainting"]) == 2
    assert "is a folder of images; it is for models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tiny_base), "--task", "inpainting", "--parameter", "strength"])


def test_small_images_are_enlarged_and_compared_with_their_originals(originals: ImageSet) -> None:
    for name, scale, parameters in (("upscaling", 2, {"upscale": 2.0}), ("super_resolution", 4, {})):
        data = task_data(name, originals, {})
        assert data.requests[0]["parameters"] == parameters
        assert data.inputs[0]["image"].shape == (16 // scale, 32 // scale, 3)
        assert data.unchanged.pixels.shape == originals.pixels.shape
        exact, input_row = _numbers(data, originals.pixels, originals.pixels), data.numbers_of_input
        assert exact[PSNR].value > 100 > input_row[PSNR].value
        assert exact[SMALL].value > 100 > input_row[SMALL].value
    off_by_five = np.where(originals.pixels < 128, originals.pixels + 5, originals.pixels - 5)
    assert _numbers(data, off_by_five, off_by_five)[PSNR].value == pytest.approx(20 * np.log10(255 / 5))
    assert task_data("upscaling", originals, {"upscale": 1.0}).numbers_of_input[PSNR].value > 100
    assert task_data("super_resolution", originals, {"noise_level": 600}).parameters == {"noise_level": 600}  # a base may know it
    square = ImageSet("real", np.zeros((1, 64, 64, 3), np.uint8), _PROMPTS[:1])
    assert task_data("upscaling", square, {"upscale": 1.6}).inputs[0]["image"].shape == (40, 40, 3)
    for wrong in (0.0, -2.0, float("nan")):
        with pytest.raises(RequestError, match=r"upscale: .* it must be between 1 and 8"):
            task_data("upscaling", originals, {"upscale": wrong})
    with pytest.raises(ConfigError, match=r"--parameter upscale=3: originals of 32x16 cannot be made 3 times smaller"):
        task_data("upscaling", originals, {"upscale": 3.0})
