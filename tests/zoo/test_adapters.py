"""The shipped T2I-adapters and the ControlNet, their recipe on a toy scale, and the control images that they read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline, T2IAdapter
from numpy.typing import NDArray
from PIL import Image

from flashdiff.components import Components
from flashdiff.controls import DENOISER, ControlRequest
from flashdiff.errors import ModelError, TrainingError
from flashdiff.evaluation.images import read_prompts, real_images
from flashdiff.families import ZOO, family_of, find_base, load_base
from flashdiff.families.control import RECORD, ControlInfo, check_control, find_control, with_controls
from flashdiff.families.files import base_hash
from flashdiff.generate import generate
from flashdiff.lora import load_fused
from flashdiff.lora_files import FLASH
from flashdiff.noise import image_noise
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order
from flashdiff.zoo import adapters, control_images
from flashdiff.zoo.control_images import CONTROLS, TILE, edges, silhouette, tile
from flashdiff.zoo.fit import StageRecipe

PROMPT, SEED = "a red monster", 3
CONTROL = pytest.mark.parametrize("control", list(CONTROLS))


def _square(inside: int = 200) -> NDArray[np.uint8]:
    """A square of 12 pixels in the middle of 32 grey ones, with a hole of the background's colour and a speck next to it."""
    picture = np.full((32, 32, 3), 60, np.uint8)
    picture[10:22, 10:22] = inside
    picture[14:18, 14:18] = 60
    picture[4, 4] = 250
    return picture


def test_a_silhouette_has_no_holes_and_no_specks() -> None:
    figure = silhouette(_square())
    expected = np.zeros((32, 32), np.bool_)
    expected[10:22, 10:22] = True
    corners = np.ix_([10, 21], [10, 21])
    expected[corners] = figure[corners]  # the median rounds them off
    assert np.array_equal(figure, expected)
    assert not silhouette(_square(inside=70)).any()  # as faint as a shadow


def test_edges_are_a_pixel_wide_where_levels_change() -> None:
    picture = np.full((32, 32, 3), 60, np.uint8)
    picture[:, 16:] = (60, 60, 200)  # a step in one channel alone
    found = edges(picture)
    assert found.sum() == 32
    assert found[:, 15].all()
    assert np.array_equal(edges(picture.transpose(1, 0, 2)), found.T)
    assert not edges(np.where(picture == 200, np.uint8(90), picture)).any()


def test_a_tile_keeps_colors_and_loses_what_half_the_size_does_not_hold() -> None:
    flat = np.full((8, 12, 3), (10, 100, 250), np.uint8)
    assert np.array_equal(tile(flat), flat)
    assert np.array_equal(tile(flat, noise=np.full((4, 6, 3), 20, np.float32)), flat + np.array([20, 20, 5], np.uint8))
    stripes = np.broadcast_to(np.array([0, 200], np.uint8)[np.arange(16) % 2][None, :, None], (16, 16, 3))
    assert np.ptp(tile(stripes)[:, 4:12].astype(int)) < 30
    box = tile(stripes, Image.Resampling.BOX, Image.Resampling.NEAREST)
    assert (box == 100).all()


def test_training_varies_the_small_picture_by_its_generator_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    first, again = ([adapters.varied_tile(picture, rng) for _ in range(40)] for rng in map(np.random.default_rng, (1, 1)))
    assert np.array_equal(first, again)
    clean = {tile(picture, shrink, enlarge).tobytes() for shrink in Image.Resampling for enlarge in Image.Resampling}
    without_noise = sum(image.tobytes() in clean for image in first)
    assert 20 < without_noise < 40
    assert len({image.tobytes() for image in first}) == 6 + 40 - without_noise


@CONTROL
def test_control_images_are_a_function_of_the_picture(control: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    kept = picture.copy()
    drawn = CONTROLS[control](picture)
    assert np.array_equal(drawn, CONTROLS[control](kept))
    assert np.array_equal(picture, kept)
    assert (drawn.shape, drawn.dtype) == ((64, 48, 3), np.uint8)
    assert control == TILE or set(np.unique(drawn)) == {0, 255}

    Image.fromarray(picture).save(tmp_path / "picture.png")
    monkeypatch.setattr("sys.argv", ["control_images", control, str(tmp_path / "picture.png"), str(tmp_path / "control.png")])
    control_images.main()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "control.png")), drawn)


@CONTROL
def test_the_shipped_networks_load_in_stock_diffusers_and_name_their_base(control: str) -> None:
    folder, base = find_control(control, f"avatars-{control}"), find_base("avatars")
    info = ControlInfo.read(folder / RECORD)
    assert info
    assert (info.control, info.base, info.base_hash) == (control, "avatars", base_hash(base))
    assert info.base_hash[:12] in (folder / "README.md").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < (2e6 if control == TILE else 0.6e6)
    if control == TILE:
        stock = ControlNetModel.from_pretrained(folder)
        residuals, _ = stock(torch.zeros(1, 8, 16, 16), 500, torch.zeros(1, 1, 128), torch.rand(1, 3, 64, 64), return_dict=False)
        shapes = [(1, 64, 16, 16), (1, 64, 16, 16), (1, 64, 8, 8), (1, 128, 8, 8)]
    else:
        stock = T2IAdapter.from_pretrained(folder)
        residuals, shapes = stock(torch.rand(1, 1, 64, 64)), [(1, 64, 8, 8), (1, 128, 8, 8)]
    assert [tuple(values.shape) for values in residuals] == shapes
    family = family_of(base)
    assert check_control(control, folder, family, base, family.read_spec(base)) == type(stock).__name__


@pytest.fixture(scope="module")
def steered() -> tuple[Components, Components]:
    """The embedded model, plain and with its adapters."""
    family, model = load_base("avatars")
    return model, with_controls(family, model, {control: ZOO / f"avatars-{control}" for control in CONTROLS})


def _images(model: Components, **request: Any) -> NDArray[np.uint8]:
    (images,) = generate(model, [check_order(model.spec, prompt=PROMPT, seed=SEED, steps=2, **request)])
    return np.asarray(images[0])


def test_scale_0_equals_the_plain_model_and_1_does_not(steered: tuple[Components, Components]) -> None:
    plain, controlled = steered
    assert DENOISER in {part.name for part in controlled.spec.parts}
    before = _images(plain)
    image = CONTROLS["edges"](before)
    for control in CONTROLS:
        given = [ControlRequest(name=control, image=image[:, ::-1], scale=scale) for scale in (0.0, 1.0)]
        assert np.abs(_images(controlled, controls=given[:1]).astype(int) - before).max() <= 1
        assert np.abs(_images(controlled, controls=given[1:]).astype(int) - before).max() > 30


def test_the_student_enlarges_small_pictures_better_than_the_bicubic_filter() -> None:
    family, student = load_fused("avatars", [(ZOO / "avatars-flash", 1)], None)
    model = with_controls(family, student, {TILE: ZOO / "avatars-tile"})
    prompts = read_prompts("avatars", 12)
    originals = real_images(prompts, 1, 64).pixels
    tiles = [tile(picture) for picture in originals]
    orders = [
        check_order(
            model.spec, prompt=prompt.text, seed=seed, steps=4, inputs={"image": image}, parameters={"strength": 0.25},
            controls=[ControlRequest(name=TILE, image=image)],
        )
        for seed, (prompt, image) in enumerate(zip(prompts, tiles, strict=True))
    ]  # fmt: skip
    made = [images[0] for images in generate(model, orders)]
    by_filter, by_model = (
        [((picture.astype(float) - original) ** 2).mean() for picture, original in zip(pictures, originals, strict=True)]
        for pictures in (tiles, made)
    )
    gain = 10 * np.log10(np.divide(by_filter, by_model))
    assert gain.mean() > 1.5  # dB; 1.8 on the second edition, more than 2 on the first, on which the network was trained


def test_the_controlnet_steers_as_in_the_stock_pipeline() -> None:
    family, base = load_fused("avatars", (), SamplingOptions(sampler="ddim", guidance=1.5))
    model = with_controls(family, base, {TILE: ZOO / "avatars-tile"})
    image = CONTROLS[TILE](np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    ours = _images(model, controls=[ControlRequest(name=TILE, image=image)])

    network = ControlNetModel.from_pretrained(ZOO / "avatars-tile")
    stock = StableDiffusionControlNetPipeline.from_pretrained(ZOO / "avatars", controlnet=network)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, timestep_spacing="trailing")
    theirs = stock(
        PROMPT, Image.fromarray(image), height=64, width=64, num_inference_steps=2, guidance_scale=1.5, output_type="np",
        latents=torch.from_numpy(image_noise(SEED, 0, (8, 16, 16)))[None],
    ).images[0]  # fmt: skip
    np.testing.assert_allclose(ours, 255 * theirs, atol=0.51)


def test_an_adapter_of_another_base_is_refused_with_both_hashes(tmp_path: Path) -> None:
    base, folder = find_base("avatars"), tmp_path / "adapter"
    shutil.copytree(ZOO / "avatars-edges", folder)
    family = family_of(base)
    spec = family.read_spec(base)
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "base_hash": "f" * 64}))
    assert check_control("edges", folder, family, base, spec)  # the same weights in another precision
    (folder / RECORD).write_text(json.dumps({**record, "base_hash": "f" * 64, "base_prints": {}}))
    with pytest.raises(
        ModelError, match=rf"another base: 'avatars' with hash f{{12}}, but avatars has hash {base_hash(base)[:12]}"
    ):
        check_control("edges", folder, family, base, spec)
    (folder / RECORD).write_text(json.dumps({**record, "base_prints": {}}))
    student = shutil.copytree(base, tmp_path / "student")
    info = json.loads((ZOO / "avatars-flash" / FLASH).read_text())
    (student / FLASH).write_text(json.dumps(info))
    assert base_hash(student) != base_hash(base)
    assert check_control("edges", folder, family, student, spec)  # a student that is a whole model takes what its base takes
    (student / FLASH).write_text(json.dumps({**info, "base_hash": "f" * 64}))
    with pytest.raises(ModelError, match="was made for another base"):
        check_control("edges", folder, family, student, spec)
    (folder / RECORD).write_text("[1")
    with pytest.raises(ModelError, match=rf"{RECORD} is damaged"):
        check_control("edges", folder, family, base, spec)


@pytest.mark.slow
@CONTROL
def test_the_recipe_trains_and_writes_a_network(control: str, tmp_path: Path) -> None:
    toy = StageRecipe(batch_size=2, images=4, learning_rate=0.5)
    recipe = adapters.RECIPES[control]
    recipe = replace(recipe, stage=toy, embedding=toy if recipe.embedding else None)
    adapters.train(control, tmp_path, recipe, pictures=6)
    form = ControlNetModel if control == TILE else T2IAdapter
    written = form.from_pretrained(tmp_path / f"avatars-{control}")
    info = ControlInfo.read(tmp_path / f"avatars-{control}" / RECORD)
    assert info
    assert info.base_hash == base_hash(find_base("avatars"))
    before = recipe.make(load_base("avatars")[1].network, recipe.seed).state_dict()
    changes = [(values - before[name]).abs().max() for name, values in written.state_dict().items()]
    assert min(changes) > 1e-4  # every tensor learns; half precision alone moves none of them so far
    with pytest.raises(TrainingError, match="holds a finished network"):
        adapters.train(control, tmp_path, recipe, pictures=6)
