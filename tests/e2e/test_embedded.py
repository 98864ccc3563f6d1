"""The embedded model and its flash LoRA, as shipped: what the images show, read off their pixels."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from orders import from_image

from flashdiff.config import load_recipe
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.engines.build import BuildOptions, build_engine
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.families import find_base
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import find_lora, read_flash_info
from flashdiff.orders import Pixels
from flashdiff.tasks import check_order
from flashdiff.zoo.world import BACKGROUND_COLORS, OBJECT_COLORS

pytestmark = pytest.mark.slow

THINGS = ("monster with a smile", "robot with an antenna", "planet")
COLORS = ("red", "green", "blue", "yellow", "purple")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    out = tmp_path_factory.mktemp("bundle") / "student"
    build_engine(BuildOptions(base="avatars", loras=(("avatars-flash", 1.0),), out=out, batch_sizes=(8,)), print)
    return open_bundle(out)


def _nearest(table: dict[str, str], pixel: Pixels) -> str:
    return min(table, key=lambda word: np.abs(np.array([int(table[word][i : i + 2], 16) for i in (1, 3, 5)]) - pixel).sum())


@pytest.mark.parametrize(("steps", "floor"), [(4, 0.9), (2, 0.9)])
def test_the_student_paints_the_asked_colors(student: Engine, steps: int, floor: float) -> None:
    backgrounds = ("navy", "black", "teal", "purple")
    asked = [
        (color, backgrounds[index % len(backgrounds)], f"a {color} {thing}")
        for index, (color, thing) in enumerate((color, thing) for color in COLORS for thing in THINGS)
    ]
    orders = [
        check_order(student.spec, prompt=f"{text} on a {background} background", seed=seed, steps=steps)
        for seed, (_, background, text) in enumerate(asked)
    ]
    right = 0
    for (color, background, _), images in zip(asked, generate(student, orders), strict=True):
        corner = np.median(images[0][:6, :6].reshape(-1, 3), axis=0)
        # The thing fills the middle; its shade varies, so the nearest colour is voted over a patch.
        votes = [_nearest(OBJECT_COLORS, pixel) for pixel in images[0][24:44:4, 24:44:4].reshape(-1, 3)]
        right += (_nearest(BACKGROUND_COLORS, corner) == background) + (color in votes)
    assert right / (2 * len(asked)) >= floor


def test_an_image_to_start_from_stays_or_takes_the_prompts_color_as_its_strength_says(student: Engine) -> None:
    green = generate(student, [check_order(student.spec, prompt="a green monster on a blue background", seed=4)])[0][0]
    red = check_order(student.spec, prompt="a red monster on a blue background", seed=5)
    for strength, color in ((0.25, "green"), (0.75, "red")):
        image = generate(student, [from_image(red, green, strength)])[0][0]
        votes = [_nearest(OBJECT_COLORS, pixel) for pixel in image[48:60:4, 24:44:4].reshape(-1, 3)]
        assert max(votes, key=votes.count) == color


def test_an_image_enlarged_in_tiles_has_no_seams(student: Engine) -> None:
    robot = generate(student, [check_order(student.spec, prompt="a red robot on a blue background", seed=1)])[0][0]
    order = check_order(
        student.spec, prompt="a red robot on a blue background", seed=9, inputs={"image": robot}, parameters={"upscale": 2.75}
    )
    tiles = [image for _, image in generate_rows(student, [order])[0]]
    pasted = np.zeros((176, 176, 3), dtype=np.uint8)
    for place, tile in zip(order.places, tiles, strict=True):
        top, left = 4 * place.top, 4 * place.left
        pasted[top : top + 64, left : left + 64] = tile
    blended = order.task.whole_images(order, tiles)[0]
    borders = np.isin(np.arange(175) + 1, [56, 64, 112, 120])

    def at_borders(picture: Pixels) -> float:
        """The mean difference of neighbours there, as a multiple of that elsewhere."""
        steps = [np.abs(np.diff(picture.astype(int), axis=axis)).mean((1 - axis, 2)) for axis in (0, 1)]
        return float(np.mean([line[borders].mean() / line[~borders].mean() for line in steps]))

    assert at_borders(blended) < 1.5
    assert at_borders(pasted) > 3


def test_stock_diffusers_loads_and_runs_the_teacher_and_its_flash_lora() -> None:
    import torch
    from diffusers import LCMScheduler, StableDiffusionPipeline

    folder = find_base("avatars")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompt, generator = "a red robot on a blue background", torch.Generator().manual_seed(0)
    teacher = np.asarray(pipeline(prompt, num_inference_steps=20, guidance_scale=3, generator=generator).images[0])
    pipeline.load_lora_weights(folder.parent / "avatars-flash")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    times = [999, 749, 499, 249]
    student = np.asarray(pipeline(prompt, timesteps=times, guidance_scale=0, generator=generator).images[0])
    for image in (teacher, student):
        assert image.shape == (64, 64, 3)
        assert _nearest(BACKGROUND_COLORS, np.median(image[:6, :6].reshape(-1, 3), axis=0)) == "blue"


def test_the_shipped_student_is_what_the_shipped_recipe_makes() -> None:
    recipe, info = load_recipe(bundled_recipe("avatars.toml"), Recipe), read_flash_info(find_lora("avatars-flash"))
    assert info
    assert (info.recipe_hash, info.updates) == (recipe.content_hash, recipe.updates)
    assert info.lora_parameters <= 0.03 * info.network_parameters


def test_the_shipped_files_are_small_and_safe() -> None:
    folder = find_base("avatars")
    files = [path for name in ("avatars", "avatars-flash") for path in (folder.parent / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}
    assert sum(path.stat().st_size for path in files) < 30e6
    assert all(path.stat().st_size < 100 * 2**20 for path in files), Path(folder)


@pytest.mark.parametrize("said", ["published", "is up to date"])
def test_serve_avatars_builds_it_into_the_cache_and_serves_it(student: Engine, said: str) -> None:
    command = [sys.executable, "-m", "flashdiff", "serve", "avatars", "--port", "0", "--http-port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        report = ""
        try:
            while "HTTP on" not in (log := server.stderr.readline()):
                assert log, report
                report += log
            url = "http://127.0.0.1:" + log.rpartition(":")[2].strip()
            (model,) = httpx.get(f"{url}/v1/models").json()["data"]
            assert (model["id"], "<title>flashdiff" in httpx.get(url).text) == ("avatars", True)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        assert f"{os.environ['XDG_CACHE_HOME']}/flashdiff/bundles/avatars" in report
        assert said in report
