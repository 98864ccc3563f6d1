"""The shipped T2I-adapters, their recipe on a toy scale, and the control images that they read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter
from numpy.typing import NDArray
from PIL import Image

from flashdiff.components import Components
from flashdiff.controls import DENOISER, ControlRequest
from flashdiff.errors import ModelError, TrainingError
from flashdiff.families import ZOO, family_of, find_base, load_base
from flashdiff.families.control import RECORD, check_control, find_control, read_control_info, with_controls
from flashdiff.families.files import base_hash
from flashdiff.generate import generate
from flashdiff.lora_files import FLASH
from flashdiff.tasks import check_order
from flashdiff.zoo import adapters, control_images
from flashdiff.zoo.control_images import CONTROLS, control_image, edges, silhouette
from flashdiff.zoo.fit import StageRecipe

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


@CONTROL
def test_control_images_are_a_function_of_the_picture(control: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    kept = picture.copy()
    drawn = control_image(control, picture)
    assert np.array_equal(drawn, control_image(control, kept))
    assert np.array_equal(picture, kept)
    assert (drawn.shape, drawn.dtype, set(np.unique(drawn))) == ((64, 48, 3), np.uint8, {0, 255})

    Image.fromarray(picture).save(tmp_path / "picture.png")
    monkeypatch.setattr("sys.argv", ["control_images", control, str(tmp_path / "picture.png"), str(tmp_path / "control.png")])
    control_images.main()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "control.png")), drawn)


@CONTROL
def test_the_shipped_adapters_load_in_stock_diffusers_and_name_their_base(control: str) -> None:
    folder, base = find_control(control, f"avatars-{control}"), find_base("avatars")
    info = read_control_info(folder)
    assert info
    assert (info.control, info.base, info.base_hash) == (control, "avatars", base_hash(base))
    assert info.base_hash[:12] in (folder / "README.md").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 0.6e6
    stock = T2IAdapter.from_pretrained(folder)
    features = stock(torch.rand(1, 1, 64, 64))
    assert [tuple(values.shape) for values in features] == [(1, 64, 8, 8), (1, 128, 8, 8)]
    family = family_of(base)
    assert check_control(control, folder, family, base, family.read_spec(base)) == "T2IAdapter"


@pytest.fixture(scope="module")
def steered() -> tuple[Components, Components]:
    """The embedded model, plain and with its adapters."""
    family, model = load_base("avatars")
    return model, with_controls(family, model, {control: ZOO / f"avatars-{control}" for control in CONTROLS})


def _images(model: Components, **request: Any) -> NDArray[np.uint8]:
    (images,) = generate(model, [check_order(model.spec, prompt="a red monster", seed=3, steps=2, **request)])
    return np.asarray(images[0])


def test_scale_0_equals_the_plain_model_and_1_does_not(steered: tuple[Components, Components]) -> None:
    plain, controlled = steered
    assert DENOISER in {part.name for part in controlled.spec.parts}
    before = _images(plain)
    image = control_image("edges", before)
    for control in CONTROLS:
        given = [ControlRequest(name=control, image=image[:, ::-1], scale=scale) for scale in (0.0, 1.0)]
        assert np.abs(_images(controlled, controls=given[:1]).astype(int) - before).max() <= 1
        assert np.abs(_images(controlled, controls=given[1:]).astype(int) - before).max() > 30


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
def test_the_recipe_trains_and_writes_an_adapter(control: str, tmp_path: Path) -> None:
    toy = StageRecipe(batch_size=2, images=4, learning_rate=0.5)
    adapters.train(control, tmp_path, toy, pictures=6)
    written = T2IAdapter.from_pretrained(tmp_path / f"avatars-{control}")
    info = read_control_info(tmp_path / f"avatars-{control}")
    assert info
    assert info.base_hash == base_hash(find_base("avatars"))
    unet = load_base("avatars")[1].network
    before = adapters.make_adapter(unet, adapters.SEEDS[control]).state_dict()
    changes = [(values - before[name]).abs().max() for name, values in written.state_dict().items()]
    assert min(changes) > 1e-4  # every tensor learns; half precision alone moves none of them so far
    with pytest.raises(TrainingError, match="holds a finished adapter"):
        adapters.train(control, tmp_path, toy, pictures=6)
