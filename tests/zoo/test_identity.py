"""The shipped IP-Adapter, its recipe on a toy scale, and the pairs of renders that it learns from."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image

from flashdiff.components import Components
from flashdiff.errors import ModelError, TrainingError
from flashdiff.evaluation.identity import judge
from flashdiff.families import ZOO, family_of, find_base
from flashdiff.families.files import base_hash
from flashdiff.families.ip_adapter import FILE, RECORD, check_adapter, find_adapter, with_adapter
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise
from flashdiff.references import ReferenceRequest
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order
from flashdiff.zoo import identity
from flashdiff.zoo.fit import StageRecipe
from flashdiff.zoo.images import rendered_pairs
from flashdiff.zoo.initial import load_parts
from flashdiff.zoo.world import KINDS, attribute_labels, describe, figure, render, short_caption

PROMPT, SEED, STEPS = "a monster on a blue background", 3, 4
MONSTER = 30_000_000  # of no training


def test_pairs_have_one_figure_on_different_backgrounds(tmp_path: Path) -> None:
    pairs = rendered_pairs(tmp_path, tuple(KINDS), 0, 6, 64)
    assert pairs.images.shape == (12, 64, 64, 3)
    for number, of_figure in enumerate(pairs.figures):
        first, second = pairs.scenes[number], pairs.scenes[number + 6]
        assert of_figure == figure(first.kind, first.seed)
        assert second.background != first.background
        assert {**second.attributes, "background": ""} == {**first.attributes, "background": ""}
        assert describe(second.kind, second.seed, second.background) == second
        assert not np.array_equal(pairs.images[number], pairs.images[number + 6])
    kept = rendered_pairs(tmp_path, tuple(KINDS), 0, 6, 64)
    assert np.array_equal(kept.images, pairs.images)
    assert kept.figures == pairs.figures


def test_labels_are_places_among_the_values_that_vary() -> None:
    figures = [{"top": "horns", "ink": "black"}, {"top": "none", "ink": "black"}, {"ring": "thin"}, {"ring": "bold"}]
    values = identity.values_of(figures)
    assert values == {"ring": ["bold", "thin"], "top": ["horns", "none"]}
    labels = identity.labels_of([*figures, {"top": "unseen"}], values)
    assert {name: of.tolist() for name, of in labels.items()} == {"ring": [-1, -1, 1, 0, -1], "top": [0, 1, -1, -1, -1]}


@pytest.fixture(scope="module")
def referred() -> tuple[Components, Components]:
    """The embedded model, plain and with its adapter."""
    family, model = load_fused("avatars", (), SamplingOptions(sampler="ddim", guidance=5.0))
    return model, with_adapter(family, model, find_adapter("avatars-identity", None))


def test_an_adapter_of_another_base_is_refused_with_both_hashes(tmp_path: Path) -> None:
    base, folder = find_base("avatars"), shutil.copytree(ZOO / "avatars-identity", tmp_path / "adapter")
    family, found = family_of(base), find_adapter(str(folder / FILE), None)
    spec, record = family.read_spec(base), json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "base_hash": "f" * 64, "base_prints": {}}))
    hashes = rf"'avatars' with hash f{{12}}, but avatars has hash {base_hash(base)[:12]} \(the adapter is \w{{12}}\)"
    with pytest.raises(ModelError, match=rf"another base: {hashes}"):
        check_adapter(found, family, base, spec)
    (folder / RECORD).unlink()
    assert check_adapter(found, family, base, spec)  # as published adapters are: by its shapes


def test_a_misspelt_adapter_lists_those_that_ship() -> None:
    with pytest.raises(ModelError, match=r"avatars-identit: there is no such file; .* 'avatars-identity', or owner/name/file"):
        find_adapter("avatars-identit", None)


@pytest.fixture(scope="module")
def monster() -> NDArray[np.uint8]:
    return render("critters", MONSTER, 64)[0]


def test_the_shipped_adapter_is_small_and_found_by_name() -> None:
    found, base = find_adapter("avatars-identity", None), find_base("avatars")
    family = family_of(base)
    kind = check_adapter(found, family, base, family.read_spec(base))
    assert (kind.name, kind.tokens, kind.side) == ("plain", (4, 128), 64)
    assert sum(path.stat().st_size for path in (ZOO / "avatars-identity").rglob("*") if path.suffix == ".safetensors") < 3e6


def test_the_shipped_adapter_is_read_as_in_stock_diffusers(
    referred: tuple[Components, Components], monster: NDArray[np.uint8]
) -> None:
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(find_base("avatars"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    ours, found = referred[1], find_adapter("avatars-identity", None)
    pipeline.load_ip_adapter(found.file.parent, subfolder="", weight_name=found.file.name)
    pipeline.set_ip_adapter_scale(0.8)
    expected = pipeline(
        PROMPT, ip_adapter_image=Image.fromarray(monster), latents=torch.from_numpy(image_noise(SEED, 0, (8, 16, 16)))[None],
        num_inference_steps=STEPS, guidance_scale=5.0, height=64, width=64, output_type="latent",
    ).images[0]  # fmt: skip
    reference = ReferenceRequest(image=monster, scale=0.8)
    order = check_order(ours.spec, prompt=PROMPT, seed=SEED, steps=STEPS, reference=reference)
    ((row, _),) = generate_rows(ours, [order])[0]
    np.testing.assert_allclose(row.latents, expected.numpy(), atol=1e-4, rtol=0)


def _images(model: Components, **request: Any) -> NDArray[np.uint8]:
    """Of every kind's figure on a blue background, 6 steps."""
    prompts = [short_caption(describe(kind, MONSTER, "blue")) for kind in KINDS]
    orders = [
        check_order(model.spec, prompt=prompt, seed=SEED, steps=6, **{name: of[number] for name, of in request.items()})
        for number, prompt in enumerate(prompts)
    ]
    return np.stack([images[0] for images in generate(model, orders)])


def test_a_reference_shows_at_scale_1_and_not_at_0(referred: tuple[Components, Components]) -> None:
    plain, ours = referred
    figures = [render(kind, MONSTER, 64)[0] for kind in KINDS]
    before = _images(plain)
    none, whole = (
        _images(ours, reference=[ReferenceRequest(image=figure, scale=scale) for figure in figures]) for scale in (0.0, 1.0)
    )
    assert np.abs(none.astype(int) - before).max() <= 1
    wanted = attribute_labels([describe(kind, MONSTER) for kind in KINDS])
    shown = [
        sum(int((judge(made).words[name] == wanted[name])[wanted[name] >= 0].sum()) for name in ("color", "top", "eyes", "mouth"))
        for made in (none, whole)
    ]
    assert shown[1] >= shown[0] + 4  # of 18


@pytest.mark.slow
def test_the_recipe_trains_and_writes_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_HELD_BACK", 6)
    toy = StageRecipe(batch_size=2, images=4, learning_rate=0.5)
    identity.train(tmp_path, toy, toy, figures=6)
    written = find_adapter(str(tmp_path / identity.NAME / identity.FILE), None)
    base = find_base("avatars")
    family = family_of(base)
    assert check_adapter(written, family, base, family.read_spec(base)).name == "plain"
    before = identity.Adapter(load_parts(base).unet, 256).state_dict()
    values = safetensors.torch.load_file(written.file)
    assert set(values) == set(before)
    assert min((values[name].float() - start).abs().max() for name, start in before.items()) > 1e-4  # every tensor learns
    with pytest.raises(TrainingError, match="holds a finished adapter"):
        identity.train(tmp_path, toy, toy, figures=6)
