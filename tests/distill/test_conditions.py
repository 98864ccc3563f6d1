"""Distilling models that read images: what they read is that of a request, the same in every role, and the whole program runs."""

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import Once
from diffusers import T2IAdapter
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from recipes import CAPTIONS, paired_folder, tiny_recipe
from safetensors.torch import load_file
from tiny import (
    make_tiny_controlnet,
    make_tiny_flux,
    make_tiny_flux_controlnet,
    make_tiny_flux_fill,
    make_tiny_flux_ip_adapter,
    make_tiny_flux_kontext,
    make_tiny_image_encoder,
    make_tiny_ip_adapter,
    make_tiny_sd15,
    make_tiny_sdxl,
    make_tiny_upscaler,
)
from torch import Tensor

from flashdiff.components import Size
from flashdiff.config import parse_record
from flashdiff.distill import loop, network, previews, step
from flashdiff.distill.bases import hashes_of_networks, load_trained_base
from flashdiff.distill.batch import MicroBatch
from flashdiff.distill.branches import Branches
from flashdiff.distill.conditions import ImageConditions, check_conditions
from flashdiff.distill.config import Recipe
from flashdiff.distill.data import load_dataset
from flashdiff.distill.dry_run import dry_run
from flashdiff.distill.loop import distill
from flashdiff.distill.network import add_lora, predict_x0, run_network
from flashdiff.distill.objective import Objective
from flashdiff.distill.processes import Draws
from flashdiff.distill.saved_student import open_checkpoint
from flashdiff.distill.step import Pool, SharedPools, make_pool, span_at, student_x0
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ConfigError, TrainingError
from flashdiff.families.base import TorchModel
from flashdiff.generate import generate, prepare, unconditional_of
from flashdiff.lora import add_adapter, load_fused
from flashdiff.lora_files import FLASH, WEIGHTS
from flashdiff.parts import Condition
from flashdiff.prediction import to_x0
from flashdiff.rows import denoise_rows, start_rows
from flashdiff.tasks import check_order

ALL = {"updates": 2, "mode_weights": (1, 1, 1, 1), "adversarial": 0.1, "distribution_matching": 0.3}
CLASSES = {
    "inpainting": ("StableDiffusionInpaintPipeline", make_tiny_sd15, 9),
    "inpainting-sdxl": ("StableDiffusionXLInpaintPipeline", make_tiny_sdxl, 9),
    "edit": ("StableDiffusionInstructPix2PixPipeline", make_tiny_sd15, 8),
    "edit-sdxl": ("StableDiffusionXLInstructPix2PixPipeline", make_tiny_sdxl, 8),
}
CASES = (*CLASSES, "fill", "kontext", "controlnet", "adapter", "reference", "steered-inpainting", "upscaler", "flux-reference")
GUIDED_BY_INPUT = ("fill", "kontext", "flux-control", "flux-reference")
STOCK = {
    **{name: pipeline for name, (pipeline, _, _) in CLASSES.items()},
    "fill": "FluxFillPipeline",
    "kontext": "FluxKontextPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
    "flux-reference": "FluxPipeline",
    "steered-inpainting": "StableDiffusionInpaintPipeline",
}


def _trained(folder: Path, name: str) -> Path:
    pipeline, make, channels = CLASSES[name]
    base = make(folder / name, in_channels=channels)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    return base


def _make_all(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in CLASSES:
        _trained(folder, name)
    make_tiny_flux_fill(folder / "fill")
    make_tiny_flux_kontext(folder / "kontext")
    make_tiny_upscaler(folder / "upscaler")
    plain = make_tiny_sd15(folder / "plain")
    make_tiny_controlnet(folder / "canny", plain)
    torch.manual_seed(3)
    T2IAdapter(3, [32, 64], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter").save_pretrained(folder / "t2i")
    make_tiny_flux(folder / "flux")
    make_tiny_flux_controlnet(folder / "flux-edges")
    make_tiny_image_encoder(folder / "ip" / "image_encoder")
    make_tiny_ip_adapter(folder / "ip" / "ip.safetensors", plain)
    make_tiny_flux_ip_adapter(folder / "ip" / "flux.safetensors", folder / "flux")
    paired_folder(folder / "paired")


@pytest.fixture(scope="session")
def bases(once: Once) -> Path:
    return once("conditions", _make_all)


def _recipe(bases: Path, name: str, **changes: Any) -> Recipe:
    canny = {"name": "canny", "scale": 0.8}
    added: dict[str, dict[str, Any]] = {
        "controlnet": {"controls": [{**canny, "network": str(bases / "canny")}]},
        "adapter": {"controls": [{**canny, "network": str(bases / "t2i")}]},
        "steered-inpainting": {"controls": [{**canny, "network": str(bases / "t2i")}]},
        "flux-control": {"controls": [{**canny, "network": str(bases / "flux-edges")}]},
        "reference": {"reference": {"adapter": str(bases / "ip" / "ip.safetensors"), "scale": 0.7, "image": "further"}},
        "flux-reference": {"reference": {"adapter": str(bases / "ip" / "flux.safetensors"), "scale": 0.7}},
    }
    places = {"steered-inpainting": "inpainting", "flux-control": "flux", "flux-reference": "flux"}
    places |= dict.fromkeys(("controlnet", "adapter", "reference"), "plain")
    settings = {
        "data": {"source": str(bases / "paired")},
        "phases": [ALL],
        "loss": {"distribution_matching": {"fake_score": "lora", "critic_updates": 1}},
        "lora": {"rank": 2, "alpha": 4},
        "learning_rate": 0.05,
        "checkpoint_every": 1,
    }
    return tiny_recipe(bases / places.get(name, name), **{**settings, **added.get(name, {}), **changes})


def _loaded(recipe: Recipe) -> tuple[TorchModel, ImageConditions]:
    _, model = load_trained_base(recipe)
    return model, ImageConditions(model, recipe)


# --- training and serving give the network the same ------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, "flux-control"])
def test_the_teachers_guided_output_is_that_of_a_served_step(bases: Path, name: str) -> None:
    """Of the same images, prompt, latents and time: what enters the network, its branches and their weights."""
    recipe = _recipe(bases, name)
    model, images = _loaded(recipe)
    size, prompt = model.spec.sizes[0], "a red dog"
    data = load_dataset(recipe.data, model, batch_size=2, seed=0, wanted=images.wanted)
    pixels, guidance, seed = data.pixels(3), 3.0, (5, 7)
    spec = model.spec.model_copy(update={"sampler": model.spec.sampler.model_copy(update={"guidance": guidance})})
    if name in GUIDED_BY_INPUT:
        spec = model.spec
    served = ServedModel(model, spec)
    rng = np.random.default_rng(seed)
    given = images.request(pixels, size, rng)
    order = check_order(spec, prompt=prompt, seed=int(rng.integers(2**64, dtype=np.uint64)), steps=3, **given)
    prepared = {key: prepare(model, part.part, [part.value])[0] for key, part in order.task.preparations(spec, order).items()}
    (row,) = start_rows(spec, order, prepared, unconditional_of(served))
    latents, time = torch.from_numpy(row.latents)[None], torch.tensor([row.times[0]])
    denoise_rows(served, [row])

    made = {key: values[None] for key, values in images.of(pixels, size, seed).items()}
    conditioning = {**model.encode_ids(model.tokenizer([prompt])), **made}
    branches = images.branches(model.unconditional(), model.device)
    assert branches.count == row.slots
    with torch.no_grad():
        output = branches.output(
            lambda x, t, given: run_network(model, x, t, given), latents, time, conditioning, torch.tensor([guidance])
        )
        alpha, sigma = (torch.tensor(levels[:1]).view(1, 1, 1, 1) for levels in (row.trajectory.alphas, row.trajectory.sigmas))
        x0 = to_x0(spec.prediction, output, latents, alpha, sigma)
    assert row.x0 is not None
    np.testing.assert_allclose(x0[0].numpy(), row.x0, atol=2e-4 * float(x0.abs().max()))


class ServedModel:
    """The model, sampled as `spec` says."""

    def __init__(self, model: TorchModel, spec: Any) -> None:
        self.spec, self.max_batch, self.parallel_decode = spec, 8, False
        self.tokenize, self.call = model.tokenize, model.call


def test_pixels_of_controls_survive_the_pool_as_bytes() -> None:
    values = torch.arange(256, dtype=torch.uint8).float() / 127.5 - 1
    kept = step._as_bytes(values)
    assert kept.dtype == torch.uint8
    assert torch.equal(step._as_values(kept), values)
    assert torch.equal(step._as_values(values), values)


def test_an_edits_guidance_weighs_three_branches(bases: Path) -> None:
    recipe = _recipe(bases, "edit", image_guidance=2.5)
    model, images = _loaded(recipe)
    branches = images.branches(model.unconditional(), model.device)
    x, texts = torch.randn(1, 4, 8, 8), model.encode_ids(model.tokenizer(["a dog"]))
    empty = model.unconditional() or {}
    image = torch.randn(1, 4, 8, 8)
    conditioning, time = {**texts, "image_latents": image}, torch.tensor([499])

    def evaluated(text: Mapping[str, Tensor], given: Tensor) -> Tensor:
        return run_network(model, x, time, {**text, "image_latents": given})

    with torch.no_grad():
        both, alone, neither = evaluated(texts, image), evaluated(empty, image), evaluated(empty, torch.zeros_like(image))
        wanted = neither + 2.5 * (alone - neither) + 7.0 * (both - alone)
        found = branches.output(lambda *given: run_network(model, *given), x, time, conditioning, torch.tensor([7.0]))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, alone, atol=1e-3)
    assert not torch.allclose(alone, neither, atol=1e-3)


def test_without_guidance_by_text_and_image_an_edit_is_one_evaluation(bases: Path) -> None:
    calls: list[int] = []

    def counting(x: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        calls.append(len(x))
        return x

    for image_guidance, rows in ((1.0, 1), (1.5, 3)):
        model, images = _loaded(_recipe(bases, "edit", image_guidance=image_guidance))
        branches = images.branches(model.unconditional(), model.device)
        texts = {**(model.unconditional() or {}), "image_latents": torch.ones(1, 4, 8, 8)}
        branches.output(counting, torch.zeros(1, 4, 8, 8), torch.tensor([9]), texts, torch.tensor([1.0]))
        assert calls.pop() == branches.evaluations(1.0) == rows
        assert branches.evaluations(3.0) == 3


# --- every role gets the same conditions -----------------------------------------------------------------------------


@contextmanager
def _recorded(model: TorchModel, patch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Tensor]]]]:
    """The role and the conditioning of every evaluation."""
    calls: list[tuple[str, dict[str, Tensor]]] = []
    within: list[str] = []
    layer = next(module for module in model.network.modules() if isinstance(module, BaseTunerLayer))
    part = network.trained_part(model.spec)

    def naming(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def named(*given: Any, **others: Any) -> Any:
            within.append(name)
            try:
                return act(*given, **others)
            finally:
                within.pop()

        return named

    patch.setattr(network.Tap, "__call__", naming("discriminator", network.Tap.__call__))
    patch.setattr(step, "roll_out", naming("roll-out", step.roll_out))

    def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
        role = "teacher" if layer.disable_adapters else layer.active_adapters[0]
        calls.append(((within or [role])[-1], dict(zip(part.inputs[2:], inputs[2:], strict=True))))

    handle = model.module(part.name).register_forward_pre_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["inpainting", "edit", "adapter", "reference", "kontext", "upscaler"])
def test_teacher_student_fake_score_discriminator_and_roll_out_read_the_same(
    bases: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = {**ALL, "updates": 2, "backward_simulation": 1.0, "mode_weights": (1, 1, 1, 0)}
    recipe = _recipe(bases, name, phases=[phase])
    family, model = load_trained_base(recipe)
    images = ImageConditions(model, recipe)
    data = load_dataset(recipe.data, model, batch_size=2, seed=0, wanted=images.wanted)
    add_lora(model, family, recipe.lora, seed=0)
    objective = Objective(model, family, recipe, images)
    with _recorded(model, monkeypatch) as calls:
        pool = make_pool(model, objective.branches, data, recipe, span_at(recipe, 0), images=images)
        ((solved, chosen),) = [pool.batch(0, seed=0)]
        everything = torch.arange(len(solved.items))
        targets = solved.targets(everything, data, model.device, pool.variance)
        batch = MicroBatch(targets, student_x0(model, targets), Draws(torch.Generator().manual_seed(0), len(everything)))
        objective.losses(batch, recipe.phases[0])
        objective.train_opponents([batch.detached()])
    assert {role for role, _ in calls} == {"teacher", "student", "fake_score", "discriminator", "roll-out"}
    assert len(chosen) == 2

    text = next(iter(model.spec.text_part.outputs))
    samples = targets.conditioning
    contrasts = [{key: value for key, value in other.items() if key in images.names} for other in objective.branches.contrasts]
    found: dict[str, set[int]] = {}
    for role, given in calls:
        for row in range(len(given[text])):
            own = {key: given[key][row] for key in images.names}
            matches = [
                index
                for index in range(len(samples[text]))
                if torch.equal(given[text][row], samples[text][index])
                and all(torch.equal(own[key], samples[key][index]) for key in images.names)
            ]
            if matches:
                found.setdefault(role, set()).update(matches)
                continue
            # A branch of the teacher's guidance: without the prompt, and with the images of a sample but for what it drops.
            assert role == "teacher"
            assert any(
                all(
                    torch.equal(own[key], other.get(key, samples[key][index : index + 1]).expand_as(own[key][None])[0])
                    for key in images.names
                )
                for other in contrasts
                for index in range(len(samples[text]))
            )
    whole = set(range(len(samples[text])))
    assert {role: seen for role, seen in found.items() if role != "roll-out"} == dict.fromkeys(
        ("teacher", "student", "fake_score", "discriminator"), whole
    )
    assert found["roll-out"] <= whole
    differing = [key for key in images.names if samples[key].ndim > 1]
    assert all(not torch.equal(samples[key][0], samples[key][1]) for key in differing)


def _made_of_two_samples(recipe: Recipe) -> tuple[step.Solved, dict[str, Tensor]]:
    """A pool in which each of two samples is used twice, and what it has when it is made again."""
    model, images = _loaded(recipe)
    add_adapter(model, ("to_q",), rank=1, alpha=1, seed=0)
    data = load_dataset(recipe.data, model, batch_size=2, seed=0, wanted=images.wanted)
    branches = images.branches(model.unconditional(), model.device)
    (solved,), (again,) = (make_pool(model, branches, data, recipe, span_at(recipe, 0), images=images).solved for _ in range(2))
    return solved, dict(again.images)


def _as_folder(folder: Path, _: Path) -> Path:
    return folder


def _as_shard(folder: Path, place: Path) -> Path:
    with tarfile.open(place / "shard.tar", "w") as shard:
        for path in sorted(folder.iterdir()):
            shard.add(path, path.name)
    return place / "shard.tar"


def _as_table(folder: Path, place: Path) -> Path:
    columns = {"image": "{}.png", "mask": "{}.mask.png"}
    rows: dict[str, list[Any]] = {
        column: [{"bytes": (folder / name.format(index)).read_bytes()} for index in range(len(CAPTIONS))]
        for column, name in columns.items()
    }
    pyarrow.parquet.write_table(pyarrow.table({**rows, "text": list(CAPTIONS)}), place / "table.parquet")
    return place / "table.parquet"


@pytest.mark.parametrize("kept_as", [_as_folder, _as_shard, _as_table])
@pytest.mark.parametrize("name", ["inpainting", "fill"])
def test_masks_of_the_data_are_cropped_with_their_images_and_stand_in_for_drawn_ones(
    bases: Path, name: str, kept_as: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    source = kept_as(bases / "paired", tmp_path)
    recipe = _recipe(bases, name, data={"source": str(source)}, masks={"image": "further"})
    model, images = _loaded(recipe)
    assert images.described() == "its own image, its mask image"
    pixels = load_dataset(recipe.data, model, batch_size=1, seed=0, wanted=images.wanted).pixels(0)
    wanted = np.zeros((32, 32), dtype=np.float32)
    wanted[4:20, 4:20] = 1  # the white box, 5 pixels cut off at its left, at 32 pixels for 40
    factor = model.spec.latent_factor
    for seed in range(2):
        found = images.of(pixels, Size(32, 32), (seed, 0))["mask"].numpy()
        if name == "inpainting":
            assert np.array_equal(found[0], wanted[::factor, ::factor])
        else:
            cells = 32 // factor
            whole = found.reshape(factor, factor, cells, cells).transpose(2, 0, 3, 1).reshape(32, 32)
            assert np.array_equal(whole, wanted)


@pytest.mark.parametrize(
    ("box", "said"),
    [
        (None, "0.png has no mask image: nothing is called 'mask' there, or it holds no bytes"),
        ((0, 0, 0, 0), "0.png: its mask image cannot be used (mask: 'all black' is not allowed; it must be white where"),
        ((12, 0, 14, 40), "0.png: its mask image cannot be used (mask: 'thin lines' is not allowed; its white parts must be wid"),
    ],
)
def test_a_mask_that_is_not_there_or_covers_nothing_is_refused_by_its_sample(
    bases: Path, tmp_path: Path, box: tuple[int, int, int, int] | None, said: str
) -> None:
    def spoil(path: Path) -> None:
        path.unlink()
        if box:
            mask = Image.new("L", (50, 40))
            mask.paste(255, box)
            mask.save(path)

    message = _spoiled(bases, tmp_path, spoil, "mask", "inpainting", masks={"image": "further"})
    assert "1 of 1 samples cannot be used, more than 5%" in message
    assert said in message
    again = _refused(bases, "inpainting", tmp_path, data={"source": str(tmp_path / "spoiled")}, masks={"image": "further"})
    assert again == message  # nothing of it is in the cache


def test_noise_and_its_level_are_drawn_anew_for_every_use_of_an_image(bases: Path) -> None:
    data = {"source": str(bases / "paired"), "images": 2}
    solved, again = _made_of_two_samples(_recipe(bases, "upscaler", data=data))
    assert set(solved.images) == set(again) == {"low_res_image", "noise_level"}
    assert all(torch.equal(solved.images[key], again[key]) for key in again)
    levels = solved.images["noise_level"]
    assert levels.dtype == torch.int64
    assert len(set(levels.tolist())) == 4
    assert 0 <= levels.min() <= levels.max() <= 350
    other, _ = _made_of_two_samples(_recipe(bases, "upscaler", data=data, seed=1))
    assert other.images["noise_level"].tolist() != levels.tolist()
    solved, _ = _made_of_two_samples(_recipe(bases, "upscaler", data=data, noise_level=(7, 7)))
    assert solved.images["noise_level"].tolist() == [7] * 4
    uses = [solved.images["low_res_image"][solved.items == item] for item in set(solved.items.tolist())]
    assert all(not torch.equal(noisy[0], noisy[1]) for noisy in uses)


def test_an_upscaler_reads_the_samples_own_image_four_times_smaller(bases: Path) -> None:
    """Cropped as the sample and scaled by Lanczos: the noise of level 0 is all that is added."""
    recipe = _recipe(bases, "upscaler", noise_level=(0, 0))
    model, images = _loaded(recipe)
    pixels = load_dataset(recipe.data, model, batch_size=1, seed=0, wanted=images.wanted).pixels(2)
    with Image.open(bases / "paired" / "2.png") as picture:
        wanted = np.asarray(picture.resize((8, 8), Image.Resampling.LANCZOS, box=(5, 0, 45, 40)))
    assert np.array_equal(pixels["image"], wanted)
    made = images.of(pixels, Size(32, 32), (0, 0))["low_res_image"]
    schedule = model.spec.condition("low_res_image").noised
    assert schedule
    alphas, sigmas = schedule.levels([0])
    noise = (made.numpy() - alphas[0] * (wanted.transpose(2, 0, 1) / 127.5 - 1)) / sigmas[0]
    assert abs(noise.std() - 1) < 0.2


def test_masks_are_drawn_anew_for_every_use_of_an_image(bases: Path) -> None:
    data = {"source": str(bases / "paired"), "images": 2}
    solved, again = _made_of_two_samples(_recipe(bases, "inpainting", data=data))
    uses = [solved.images["mask"][solved.items == item] for item in set(solved.items.tolist())]
    assert [len(masks) for masks in uses] == [2, 2]
    assert all(not torch.equal(masks[0], masks[1]) for masks in uses)
    assert set(solved.images) == {"mask", "masked_image_latents"}
    assert all(torch.equal(solved.images[key], again[key]) for key in solved.images)


# --- the whole program -----------------------------------------------------------------------------------------------


def _check_a_run(bases: Path, name: str, tmp_path: Path, patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Two updates; killed and resumed alike; published, and loaded by the stock pipeline of the task."""
    recipe = _recipe(bases, name, **changes)
    distill(recipe, tmp_path / "whole", pools=tmp_path / "pools")
    learn = loop.Student.learn

    def learn_until_killed(student: loop.Student, loss: float) -> None:
        if student.update == 1:
            raise KeyboardInterrupt
        learn(student, loss)

    patch.setattr(loop.Student, "learn", learn_until_killed)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "broken")
    patch.undo()
    distill(recipe, tmp_path / "broken", pools=tmp_path / "pools")  # the first run's, where it saved them
    whole, broken = (load_file(tmp_path / run / WEIGHTS) for run in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    logs = [(tmp_path / run / "training" / "log.jsonl").read_text() for run in ("whole", "broken")]
    assert logs[0] == logs[1]

    _, student = load_fused(recipe.base, [(tmp_path / "whole", 1.0)], None)
    assert student.spec.sampler.kind == "flash"
    pipeline: Any = getattr(diffusers, STOCK.get(name, "StableDiffusionPipeline")).from_pretrained(recipe.base)
    own = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    before = {key: value.clone() for key, value in own.state_dict().items()}
    pipeline.load_lora_weights(tmp_path / "whole", weight_name=WEIGHTS)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = (pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).state_dict()
    ours = student.network.state_dict()
    changed = 0
    for key, value in fused.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-4)
        changed += not torch.equal(value, before[key])
    assert changed > 3


SAID = {
    "inpainting": "image=image, mask_image=mask",
    "edit": "num_inference_steps=4, image=image",
    "upscaler": "num_inference_steps=4, image=image, guidance_scale=0",
    "fill": "sigmas=[1.0, 0.75, 0.5, 0.25], image=image, mask_image=mask",
    "adapter": "--control canny=",
    "reference": "--reference ",
}
"""A part of the card."""


@pytest.mark.parametrize("name", ["inpainting"])
def test_a_base_that_reads_images_trains_resumes_publishes_and_loads(
    bases: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_a_run(bases, name, tmp_path, monkeypatch)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert STOCK.get(name, "StableDiffusionPipeline") in card
    assert SAID.get(name, "") in card
    if name == "inpainting":
        assert 'mask = load_image("mask.png")' in card
        assert "strength=1.0" in card
        assert "evaluate BUNDLE --task inpainting --steps" in card
    assert not (tmp_path / "whole" / "comfyui.json").exists()


@pytest.mark.parametrize("name", ["inpainting", "adapter", "upscaler"])
def test_previews_show_the_task(bases: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "TEACHER_STEPS", 2)
    seen: list[Any] = []
    check = previews.check_order
    monkeypatch.setattr(previews, "check_order", lambda *given, **more: (seen.append(check(*given, **more)), seen[-1])[1])
    phase = {"updates": 1, "mode_weights": (1, 0, 0, 0)}
    distill(_recipe(bases, name, phases=[phase], preview_prompts=("a dog", "a cat")), tmp_path / "out")
    sheet = np.array(Image.open(tmp_path / "out" / "training" / "previews" / "000001.png"))
    assert sheet.shape == (4 * 32, 2 * 32, 3)
    wanted = {"inpainting": "inpainting", "adapter": "text_to_image", "upscaler": "super_resolution"}
    assert {order.task.name for order in seen} == {wanted[name]}
    assert all(set(order.controls) == ({"canny"} if name == "adapter" else set()) for order in seen)
    if name == "inpainting":  # what no mask covers is the sample's own, in every row
        kept = ~(seen[0].inputs["mask"] > 0)
        assert all(np.array_equal(sheet[32 * row : 32 * row + 32, :32][kept], seen[0].inputs["image"][kept]) for row in range(4))


def test_without_a_sample_of_the_bases_size_an_upscaler_has_no_previews(
    bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(2):
        Image.new("RGB", (60, 30), (index, 200, 90)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("wide")
    data = {"source": str(tmp_path), "buckets": True}
    phase = {"updates": 1, "mode_weights": (1, 0, 0, 0)}
    distill(_recipe(bases, "upscaler", data=data, phases=[phase], preview_prompts=("a dog",)), tmp_path / "out")
    assert "there are no previews: no sample has 32x32, the size that they are drawn at" in caplog.text
    assert not (tmp_path / "out" / "training" / "previews").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES[1:])
def test_every_kind_of_base_does_so(bases: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_a_base_that_reads_images_trains_resumes_publishes_and_loads(bases, name, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_run_that_draws_on_the_student_does_so(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_a_run(bases, "steered-inpainting", tmp_path, monkeypatch, phases=[{**ALL, "backward_simulation": 0.5}])


@pytest.mark.slow
def test_a_run_with_masks_of_the_data_does_so(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_a_run(bases, "inpainting", tmp_path, monkeypatch, masks={"image": "further"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inpainting", "adapter"])
def test_gradient_checkpoints_change_no_loss(bases: Path, name: str, tmp_path: Path) -> None:
    logs = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        distill(_recipe(bases, name, gradient_checkpointing=checkpointing), out)
        logs.append([json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()])
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-6)


@pytest.mark.slow
def test_a_student_for_inpainting_is_built_and_served(bases: Path, tmp_path: Path) -> None:
    distill(_recipe(bases, "inpainting"), tmp_path / "lora")
    base = str(bases / "inpainting")
    options = BuildOptions(
        base=base, out=tmp_path / "bundle", backend="torch", batch_sizes=(1,), loras=((str(tmp_path / "lora"), 1.0),)
    )
    build_engine(options, print)
    engine = open_bundle(tmp_path / "bundle")
    _, model = load_fused(base, [(tmp_path / "lora", 1.0)], None)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros_like(pixels)
    mask[:, :16] = 255
    orders = [check_order(one.spec, prompt="a dog", steps=2, inputs={"image": pixels, "mask": mask}) for one in (engine, model)]
    served, wanted = (generate(one, [order])[0][0] for one, order in zip((engine, model), orders, strict=True))
    assert np.abs(served.astype(int) - wanted).max() <= 1
    assert (served[:, 16:] == pixels[:, 16:]).all()


@pytest.mark.slow
def test_a_dry_run_says_what_is_read_and_counts_the_branches(bases: Path) -> None:
    edit = "\n".join(dry_run(_recipe(bases, "edit")))
    assert "reads    of every sample its source image\n" in edit
    assert "7.5 evaluations of the teacher's ODE" in edit
    reference = _recipe(bases, "reference", reference={"adapter": str(bases / "ip" / "ip.safetensors")})
    for recipe, said in (
        (_recipe(bases, "inpainting"), "its own image, a drawn mask"),
        (_recipe(bases, "upscaler"), "its own image made 4 times smaller, noise of a level from 0 to 350"),
        (_recipe(bases, "inpainting", masks={"image": "further"}), "its own image, its mask image"),
        (_recipe(bases, "adapter"), "its canny image at scale 0.8"),
        (_recipe(bases, "steered-inpainting"), "its own image, its canny image at scale 0.8, a drawn mask"),
        (_recipe(bases, "reference"), "its reference image as reference at scale 0.7"),
        (reference, "its own image as reference at scale 1"),
    ):
        assert _loaded(recipe)[1].described() == said


# --- what is refused -------------------------------------------------------------------------------------------------


def _refused(bases: Path, name: str, tmp_path: Path, **changes: Any) -> str:
    with pytest.raises((ConfigError, TrainingError)) as error:
        distill(_recipe(bases, name, **changes), tmp_path / "out")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_prompts_alone_and_renders_without_the_images_are_refused(bases: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    said = _refused(bases, "inpainting", tmp_path, data={"source": str(prompts)})
    assert "holds prompts alone, and 'inpainting' reads images (image): give images with captions" in said
    assert "prompts alone, and 'plain' reads images (canny)" in _refused(
        bases, "adapter", tmp_path, data={"source": str(prompts)}
    )
    said = _refused(bases, "edit", tmp_path, data={"source": "avatars"})
    assert "data.source 'avatars' has no source images: give a folder, shards or a table with them" in said


def test_keys_that_mean_nothing_to_the_base_are_refused(bases: Path, tmp_path: Path) -> None:
    assert "masks: 'edit' was not trained for inpainting; leave it out" in _refused(bases, "edit", tmp_path, masks={"box": 1})
    for name in ("inpainting", "kontext", "adapter"):
        said = _refused(bases, name, tmp_path, image_guidance=2.0)
        assert "image_guidance = 2.0: '" in said
        assert "is not guided by an image; leave it out" in said
    said = _refused(bases, "edit", tmp_path, noise_level=(0, 20))
    assert said == "noise_level = [0, 20]: 'edit' was not trained for super-resolution; leave it out"
    said = _refused(bases, "upscaler", tmp_path, noise_level=(0, 351))
    assert said == "noise_level = [0, 351]: 'upscaler' has the levels 0 to 350"
    data = {"source": str(bases / "paired"), "further_images": {"depth": "d"}}
    said = _refused(bases, "adapter", tmp_path, data=data)
    assert said == "data.further_images: this run reads no further image 'depth'; it reads canny"
    assert "no further image 'depth'; it reads none" in _refused(bases, "inpainting", tmp_path, data=data)
    canny = {"controls": [{"name": "canny", "network": str(bases / "t2i")}]}
    said = _refused(bases, "edit", tmp_path, data={**data, "further_images": {"canny": "Source"}}, **canny)
    assert said.startswith(
        "data.further_images calls two images 'source'; give each a name of its own (this run reads source and"
    )


def test_networks_that_are_not_there_or_do_not_fit_are_refused_by_the_recipes_keys(bases: Path, tmp_path: Path) -> None:
    nowhere = [{"name": "canny", "network": "nowhere"}]
    assert _refused(bases, "adapter", tmp_path, controls=nowhere).startswith("controls: canny=nowhere: there is no such folder")
    said = _refused(bases, "edit-sdxl", tmp_path, controls=[{"name": "canny", "network": str(bases / "canny")}])
    assert said.startswith("controls: canny=")
    assert "was made for another base" in said
    said = _refused(bases, "reference", tmp_path, reference={"adapter": "nowhere.safetensors"})
    assert said.startswith("reference.adapter: nowhere.safetensors: there is no such file")
    alone = Path(shutil.copy(bases / "ip" / "ip.safetensors", tmp_path / "alone.safetensors"))
    said = _refused(bases, "reference", tmp_path, reference={"adapter": str(alone)})
    assert said.endswith("name the image encoder's folder in reference.encoder")
    said = _refused(bases, "upscaler", tmp_path, reference={"adapter": str(bases / "ip" / "ip.safetensors")})
    assert "models of the family sd-upscaler take no IP-Adapter" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"masks": {"box": 0, "ellipse": 0, "strokes": 0, "half": 0, "full": 0}}, "masks needs a kind that is drawn: box, "),
        ({"masks": {"boxes": 1}}, "unknown key 'masks.boxes', did you mean 'box'"),
        ({"masks": {"image": "further", "box": 1}}, "masks.box: no masks are drawn where masks.image is 'further'; leave it out"),
        ({"masks": {"image": "further", "half": 0.2}}, "masks.half: no masks are drawn where masks.image is 'further'; leave"),
        ({"masks": {"image": "data"}}, "'masks.image' = 'data': input should be 'drawn' or 'further'"),
        ({"masks": {"box": -1}}, "'masks.box' = -1: input should be greater than or equal to 0"),
        ({"noise_level": [20, 10]}, "noise_level must be two rising levels from 0 on, not (20, 10)"),
        ({"noise_level": [-1, 10]}, "noise_level must be two rising levels from 0 on, not (-1, 10)"),
        ({"noise_level": [0.5, 10]}, "'noise_level.0' = 0.5: input should be a valid integer"),
        ({"image_guidance": 0}, "'image_guidance' = 0: input should be greater than 0"),
        ({"controls": [{"name": "Canny!", "network": "x"}]}, "'controls.0.name' = 'Canny!': string should match pattern"),
        ({"controls": [{"name": "source", "network": "x"}]}, "controls.name 'source' is what data call other images"),
        ({"controls": 2 * [{"name": "canny", "network": "x"}]}, "controls.name 'canny' is given twice"),
        ({"controls": [{"name": "canny", "network": "x", "scale": 3}]}, "'controls.0.scale' = 3: input should be less than"),
        ({"controls": [{"name": "canny"}]}, "'controls.0.network' is missing"),
        (
            {"data": {"source": "x", "further_images": {"source": "a", "canny": "a"}}},
            "data.further_images calls two images 'a'; give each a name of its own",
        ),
        ({"data": {"source": "x", "further_images": {"source": "a", "canny": "A"}}}, "data.further_images calls two images 'a'"),
        ({"reference": {"adapter": ""}}, "'reference.adapter' = '': string should have at least 1 character"),
        ({"reference": {"adapter": "x", "image": "other"}}, "'reference.image' = 'other': input should be 'own' or 'further'"),
    ],
    ids=str,
)
def test_bad_values_are_refused_in_one_line(bases: Path, changes: dict[str, Any], said: str) -> None:
    values = {**_recipe(bases, "inpainting").model_dump(mode="json"), **changes}
    with pytest.raises(ConfigError) as error:
        parse_record(values, Recipe, source="r.toml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_recipes_without_the_keys_keep_their_hash(tiny_base: Path) -> None:
    drawn, further = (tiny_recipe(tiny_base, masks=masks) for masks in ({"box": 1}, {"image": "further"}))
    assert "image" not in drawn.model_dump(mode="json")["masks"]
    assert further.model_dump(mode="json")["masks"] == {"image": "further"}
    assert all(parse_record(recipe.model_dump(mode="json"), Recipe, source="") == recipe for recipe in (drawn, further))
    dumped = tiny_recipe(tiny_base).model_dump(mode="json")
    assert not {"masks", "image_guidance", "noise_level", "controls", "reference"} & set(dumped)
    assert "further_images" not in dumped["data"]


def test_targets_are_not_shared_once_a_network_of_the_recipe_has_changed(bases: Path, tmp_path: Path) -> None:
    network, adapter = shutil.copytree(bases / "t2i", tmp_path / "t2i"), shutil.copytree(bases / "ip", tmp_path / "ip")
    controls = [{"name": "canny", "network": str(network)}]
    recipe = _recipe(bases, "reference", controls=controls, reference={"adapter": str(adapter / "ip.safetensors")})
    made: list[Pool] = []

    def shared() -> None:
        make = lambda: (made.append(Pool([], 1)), made[-1])[1]  # noqa: E731
        SharedPools(tmp_path / "pools", recipe, [*hashes_of_networks(recipe).values()]).pool(span_at(recipe, 0), make)

    for changed in (network / "config.json", adapter / "ip.safetensors", adapter / "image_encoder" / "config.json"):
        shared()
        count = len(made)
        shared()
        assert len(made) == count
        changed.write_bytes(changed.read_bytes() + b" ")
        shared()
        assert len(made) == count + 1
    assert hashes_of_networks(_recipe(bases, "edit")) == {}


def test_a_run_does_not_resume_with_another_network_at_the_same_path(bases: Path, tmp_path: Path) -> None:
    network, adapter = shutil.copytree(bases / "t2i", tmp_path / "t2i"), shutil.copytree(bases / "ip", tmp_path / "ip")
    base = shutil.copytree(bases / "plain", tmp_path / "plain")
    changes = {
        "controls": [{"name": "canny", "network": str(network)}],
        "reference": {"adapter": str(adapter / "ip.safetensors")},
    }
    recipe = _recipe(bases, "adapter", **changes, phases=[{"updates": 1, "mode_weights": (1, 1, 1, 1)}])
    recipe = recipe.model_copy(update={"base": str(base)})
    distill(recipe, tmp_path / "out")
    (tmp_path / "out" / FLASH).unlink()  # as if it had been killed before it published
    weights = "diffusion_pytorch_model.safetensors"
    for key, file in (
        ("base", base / "unet" / weights),
        ("controls.canny", network / weights),
        ("reference.adapter", adapter / "ip.safetensors"),
        ("reference.encoder", adapter / "image_encoder" / "model.safetensors"),
    ):
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(TrainingError) as error:
            distill(recipe, tmp_path / "out")
        assert str(error.value).startswith(
            f"{key}: its files are not those that the run in {tmp_path / 'out' / 'training'} began"
        )
        file.write_bytes(before)
    assert distill(recipe, tmp_path / "out")
    saved = tmp_path / "out" / "training" / "checkpoints" / "000001.pt"
    assert open_checkpoint(saved).spec.sampler.kind == "flash"


def _spoiled(
    bases: Path, tmp_path: Path, spoil: Callable[[Path], object], kind: str = "source", name: str = "edit", **changes: Any
) -> str:
    folder = shutil.copytree(bases / "paired", tmp_path / "spoiled")
    for path in folder.glob("[1-5]*"):
        path.unlink()
    spoil(folder / f"0.{kind}.png")
    return _refused(bases, name, tmp_path, data={"source": str(folder)}, **changes)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "0.png has no source image: nothing is called 'source' there, or it holds no bytes"),
        (lambda path: path.write_bytes(b""), "0.png has no source image: nothing is called 'source' there, or it holds no bytes"),
        (
            lambda path: path.write_bytes(b"no image"),
            "0.png: its source image is not readable (8 bytes: they must be a whole PNG",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "0.png: its source image is not readable ("),
        (
            lambda path: Image.new("RGB", (50, 41)).save(path),
            "0.png: its source image has 50x41 pixels, the sample's own 50x40; they must have one size",
        ),
    ],
    ids=["none", "empty", "no image", "cut off", "another size"],
)
def test_a_sample_without_a_fitting_source_is_counted_with_its_reason(
    bases: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    message = _spoiled(bases, tmp_path, spoil)
    assert "1 of 1 samples cannot be used, more than 5%" in message
    assert said in message


def test_pixels_are_cropped_with_the_image_they_belong_to(bases: Path, tmp_path: Path) -> None:
    """A gradient in both: after cropping, both are the same pixels."""
    folder = tmp_path / "same"
    folder.mkdir()
    ramp: NDArray[np.uint8] = np.linspace(0, 255, 50 * 40 * 3).reshape(40, 50, 3).astype(np.uint8)
    for name in ("0.png", "0.canny.png", "0.reference.png"):
        Image.fromarray(ramp).save(folder / name)
    (folder / "0.txt").write_text("a ramp")
    recipe = _recipe(bases, "steered-inpainting", data={"source": str(folder)})
    model, images = _loaded(recipe)
    found = load_dataset(recipe.data, model, batch_size=1, seed=0, wanted=images.wanted).pixels(0)
    assert set(found) == {"image", "canny"}
    assert np.array_equal(found["image"], found["canny"])
    assert found["image"].shape == (32, 32, 3)
    recipe = _recipe(bases, "reference", data={"source": str(folder)})
    model, images = _loaded(recipe)
    (own,) = load_dataset(recipe.data, model, batch_size=1, seed=0, wanted=images.wanted).pixels(0).values()
    assert own.shape == (16, 16, 3)  # as the image encoder reads it


def test_aspect_buckets_have_conditions_of_their_size(bases: Path, tmp_path: Path) -> None:
    for index in range(2):
        for name in ("", ".source"):
            Image.new("RGB", (60, 30), (index, 200, 90)).save(tmp_path / f"{index}{name}.png")
        (tmp_path / f"{index}.txt").write_text("wide")
    recipe = _recipe(bases, "edit", data={"source": str(tmp_path), "buckets": True})
    model, images = _loaded(recipe)
    add_adapter(model, ("to_q",), rank=1, alpha=1, seed=0)
    data = load_dataset(recipe.data, model, batch_size=2, seed=0, wanted=images.wanted)
    (size,) = data.sizes
    assert size != Size(32, 32)
    pool = make_pool(model, images.branches(model.unconditional(), model.device), data, recipe, span_at(recipe, 0), images=images)
    (solved,) = pool.solved
    assert solved.images["image_latents"].shape[1:] == solved.z0.shape[1:]
    assert torch.isfinite(solved.x0).all()


def test_a_base_that_reads_something_else_is_refused(bases: Path) -> None:
    model, _ = _loaded(_recipe(bases, "inpainting"))
    other = Condition(name="depth", enters="concat", channels=3)
    spec = model.spec.model_copy(update={"conditions": (*model.spec.conditions, other)})
    with pytest.raises(TrainingError, match="'inpainting' takes depth, which training samples do not have; it can be"):
        check_conditions(spec)


def test_plain_bases_have_no_conditions_of_images(tiny_base: Path) -> None:
    recipe = tiny_recipe(tiny_base)
    model, images = _loaded(recipe)
    assert (images.wanted, images.names, images.described()) == ({}, (), "")
    assert isinstance(images.branches(None, model.device), Branches)
    x0 = predict_x0(model, torch.randn(1, 4, 8, 8), torch.tensor([9]), model.encode_ids(model.tokenizer(["x"])))
    assert x0.shape == (1, 4, 8, 8)
