"""`flashdiff evaluate --task identity` and `swap`: what requests bring, what is measured of their images, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from flashdiff import cli
from flashdiff.components import Size
from flashdiff.errors import ConfigError, EvaluationError, RequestError
from flashdiff.evaluation.evaluate import make_images
from flashdiff.evaluation.identity import (
    FOUND_FIRST,
    INSIDE,
    RANK,
    SHOWN,
    ReferredData,
    attributes_inside,
    check_referred,
    head_box,
    referred_data,
    referred_prompts,
    round_trip,
)
from flashdiff.evaluation.images import ImageSet, attributes_of, read_images, read_prompts, real_images, write_images
from flashdiff.evaluation.tasks import OUTSIDE
from flashdiff.families import family_of, load_base
from flashdiff.families.ip_adapter import find_adapter, with_adapter
from flashdiff.references import referred
from flashdiff.zoo.world import describe, render

KINDS_ONCE = 6


def _data(task: str, count: int = 12, **parameters: float) -> ReferredData:
    prompts = referred_prompts(task, read_prompts("avatars", count))
    return referred_data(task, real_images(prompts, 1, 64), parameters)


def test_prompts_say_a_kind_and_another_background() -> None:
    for own, prompt in zip(plain := read_prompts("avatars", 12), referred_prompts("identity", plain), strict=True):
        assert prompt.scene == own.scene
        assert prompt.background not in (None, attributes_of(own)["background"])
        assert attributes_of(prompt) == {**attributes_of(own), "background": prompt.background}
        assert prompt.text.endswith(f" {prompt.background} background")
        assert len(prompt.text) < len(own.text)


def test_a_swap_is_put_into_the_next_picture_of_its_kind() -> None:
    prompts, data = read_prompts("avatars", 12), _data("swap")
    scenes = [prompt.scene for prompt in prompts]
    for number, given in enumerate(data.inputs):
        kind, seed = scenes[(number + KINDS_ONCE) % 12]
        assert kind == scenes[number][0]
        assert np.array_equal(given["image"], render(kind, seed, 64)[0])
        assert np.array_equal(data.references[number], render(*scenes[number], 64)[0])
        assert data.originals.prompts[number].background == describe(kind, seed).background
        assert np.array_equal(given["mask"][..., 0] > 0, head_box(Size(64, 64)))
    assert head_box(Size(64, 64)).sum() == 40 * 56


def test_the_attributes_that_lie_in_the_box_are_those_of_heads() -> None:
    assert {"top", "eyes"} <= set(attributes_inside("voxel-bot"))
    assert "chest" not in attributes_inside("voxel-bot")
    assert {"top", "glasses"} <= set(attributes_inside("voxel-art"))
    assert "outfit" not in attributes_inside("voxel-art")
    assert "color" not in attributes_inside("critters")


def test_the_figure_itself_is_found_and_another_is_not() -> None:
    data = _data("identity")
    same = data.numbers_of(data.originals)
    assert same[SHOWN].value > 95
    assert same[FOUND_FIRST].value > 90
    assert same[RANK].value < 1.2
    others = ImageSet("others", np.roll(data.originals.pixels, KINDS_ONCE, 0), data.originals.prompts)
    different = data.numbers_of(others)
    assert different[SHOWN].value < 50
    assert different[FOUND_FIRST].value == 0
    assert different[RANK].value >= 2


def test_of_a_swap_the_inside_is_compared_with_the_reference_and_the_outside_with_the_picture() -> None:
    data = _data("swap")
    box = head_box(Size(64, 64))[..., None]
    background_and_figure = [
        np.where(box, own, given["image"]) for own, given in zip(data.originals.pixels, data.inputs, strict=True)
    ]
    pasted = ImageSet("pasted", np.stack(background_and_figure), data.originals.prompts)
    assert data.numbers_of(pasted)[INSIDE].value > 85
    assert data.numbers_of_input[INSIDE].value < 50
    received = data.inputs[0]["image"]
    assert data.of_image(0, received, lambda: received)[OUTSIDE] > 100
    assert data.of_image(0, received, lambda: np.where(box, received, received // 2 + 3))[OUTSIDE] < 20
    assert set(data.numbers_of_input) == {INSIDE}


def test_the_embedded_model_is_measured_with_references() -> None:
    family, model = load_base("avatars")
    components = with_adapter(family, model, find_adapter("avatars-identity", None))
    for task in ("identity", "swap"):
        data = _data(task, 12, scale=0.5)
        assert {request["reference"].scale for request in data.requests} == {0.5}
        check_referred(task, components.spec, "avatars")
        prompts = [prompt for prompt in data.originals.prompts if prompt]
        made = make_images(components, prompts, seeds=1, steps=1, name="made", report=lambda _: None, task=data)
        assert set(made.of_task) == ({SHOWN, FOUND_FIRST, RANK} if task == "identity" else {INSIDE, OUTSIDE})
    decoded = round_trip(components, data.originals)
    assert np.abs(decoded.pixels.astype(int) - data.originals.pixels).mean() < 4


def test_a_rank_counts_figures_whatever_the_number_of_seeds() -> None:
    prompts = referred_prompts("identity", read_prompts("avatars", 6))
    ranks = []
    for seeds in (1, 3):
        data = referred_data("identity", real_images(prompts, seeds, 64), {})
        ranks.append([data.of_image(seeds * n, data.references[seeds * ((n + 1) % 6)], lambda: None)[RANK] for n in range(6)])  # type: ignore[arg-type,return-value]
    assert ranks[0] == ranks[1]
    assert max(ranks[0]) > 1


def test_what_cannot_be_measured_is_refused(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--parameter strength=1: --task swap has scale alone"):
        _data("swap", 12, strength=1.0)
    with pytest.raises(RequestError, match=r"scale: 3\.0 is not allowed; it must be between 0 and 2"):
        _data("identity", 6, scale=3.0)
    spec = family_of(tiny_base).read_spec(tiny_base)
    with pytest.raises(ConfigError, match="--task swap: tiny takes no reference: give a bundle of build-engine --reference"):
        check_referred("swap", spec, "tiny")
    taking = referred(spec, (4, 32), 16)
    check_referred("swap", taking.model_copy(update={"sizes": (Size(64, 64),)}), "tiny")
    with pytest.raises(ConfigError, match="--task identity: tiny makes images of 96x96, and the pictures are drawn with 64x64"):
        check_referred("identity", taking.model_copy(update={"sizes": (Size(96, 96),)}), "tiny")
    with pytest.raises(ConfigError, match="--task swap: a figure goes into another's picture, and a kind has but one"):
        _data("swap", 7)
    assert cli.main(["evaluate", str(tiny_base), "--task", "swap", "--prompts", "p.txt", "--reference", "y"]) == 2
    assert "--prompts p.txt: --task swap is for avatars or avatars-held-out" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tiny_base), "--task", "identity", "--images", "x", "--reference", "y"]) == 2
    assert "the pictures of --task identity are drawn" in capsys.readouterr().err


def test_images_keep_their_background_on_disk(tmp_path: Path) -> None:
    prompts = referred_prompts("identity", read_prompts("avatars", 6))
    images = real_images(prompts, 1, 64)
    write_images(images, tmp_path / "images")
    assert read_images(tmp_path / "images").prompts == tuple(prompts)
    metadata = tmp_path / "images" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace(f'"background": "{prompts[0].background}"', '"background": "plaid"'))
    with pytest.raises(EvaluationError, match="background: Value error, a background is one of"):
        read_images(tmp_path / "images")
