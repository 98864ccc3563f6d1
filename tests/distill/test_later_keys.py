"""Keys that mend what an audit found: what each changes, and that recipes without them stay as they were."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from pydantic import ValidationError
from recipes import image_folder, killed_at, tiny_recipe
from safetensors.torch import load_file
from tiny import FAMILIES, open_stock
from torch import Tensor

from flashdiff import checkpoint, cli
from flashdiff.config import load_recipe, parse_record
from flashdiff.distill import loop, objective, previews, processes, step
from flashdiff.distill.batch import MicroBatch, Targets
from flashdiff.distill.checkpoints import checkpoint_path, checkpoints
from flashdiff.distill.conditions import ImageConditions
from flashdiff.distill.config import DataRecipe, Recipe, bundled_recipe
from flashdiff.distill.data import load_dataset
from flashdiff.distill.dry_run import dry_run
from flashdiff.distill.held_out import HeldOut
from flashdiff.distill.loop import distill
from flashdiff.distill.losses.distillation import whitened_loss
from flashdiff.distill.network import Tap, as_teacher, checkpoint_gradients, predict_x0
from flashdiff.distill.objective import Objective
from flashdiff.distill.processes import Draws
from flashdiff.distill.saved_student import open_checkpoint
from flashdiff.distill.sources import Damage, read_samples
from flashdiff.distill.speed import SPEED, Speed, summary
from flashdiff.distill.step import span_at, teacher_of
from flashdiff.distill.student import Student, _schedule
from flashdiff.errors import ConfigError, TrainingError
from flashdiff.families import load_base
from flashdiff.families.base import TorchModel
from flashdiff.generate import generate
from flashdiff.lora import add_adapter, load_fused, read_flash_info
from flashdiff.lora_files import FLASH, KOHYA, WEIGHTS
from flashdiff.prediction import rescaled
from flashdiff.tasks import check_order

ONE = [{"updates": 1, "mode_weights": (1, 1, 1, 1)}]


@pytest.fixture
def model(tiny_base: Path) -> TorchModel:
    _, model = load_base(str(tiny_base))
    add_adapter(model, ("to_q", "to_k", "to_v", "to_out.0"), rank=2, alpha=4, seed=0)
    return model


def _batch(model: TorchModel, times: tuple[int, int] = (999, 499)) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    z0, x_t, x0, student = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(4))
    conditioning = model.encode_ids(model.tokenizer(["a dog", "a cat"]))
    targets = Targets(z0, x_t, torch.tensor(times), conditioning, x0, torch.tensor([1.0, 4.0, 0.25, 1.0]))
    return MicroBatch(targets, student.requires_grad_(), Draws(torch.Generator().manual_seed(1), 2))


def _log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_keys_at_their_defaults_leave_a_recipe_and_its_hash_as_they_were(tiny_base: Path) -> None:
    plain = tiny_recipe(tiny_base)
    spelled = tiny_recipe(
        tiny_base,
        learning_rate_decay=0.7,
        guidance_rescale=0.0,
        negative_prompt="",
        skip_limit=0,
        loss={"distillation": {"kind": "l2"}, "adversarial": {"taps": ()}, "distribution_matching": {"first_step": True}},
    )
    assert spelled.content_hash == plain.content_hash
    assert not {"learning_rate_decay", "pool_batches", "target_batch", "init_from"} & set(plain.model_dump())
    assert plain.model_dump()["loss"]["distillation"] == "l2"
    changed = tiny_recipe(tiny_base, learning_rate_decay=0.0, loss={"distillation": {"kind": "lpips", "crop": 4}})
    assert changed.content_hash != plain.content_hash
    assert Recipe.model_validate_json(changed.model_dump_json()) == changed


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "sd3"])
def test_the_papers_recipes_keep_their_learning_rate(name: str) -> None:
    recipe = load_recipe(bundled_recipe(f"{name}.toml"), Recipe)
    assert {_schedule(update, recipe) for update in (0, recipe.updates // 2, recipe.updates - 1)} == {1.0}


def test_the_learning_rate_falls_over_the_share_that_the_recipe_says(tiny_base: Path) -> None:
    recipe = tiny_recipe(tiny_base, phases=[{**ONE[0], "updates": 100}], learning_rate_decay=0.5)
    assert [_schedule(update, recipe) for update in (0, 50, 75)] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate_decay", "1.5", "'learning_rate_decay' = 1.5: input should be less than or equal to 1"),
        ("pool_batches", "0", "'pool_batches' = 0: input should be greater than or equal to 1"),
        ("target_batch", "0", "'target_batch' = 0: input should be greater than or equal to 1"),
        ("skip_limit", "-1", "'skip_limit' = -1: input should be greater than or equal to 0"),
        ("guidance_rescale", "2", "'guidance_rescale' = 2: input should be less than or equal to 1"),
        ("loss.distillation", "'l3'", r"'loss\.distillation\.kind' = 'l3': input should be 'l2', 'pseudo_huber', "),
        ("loss.distillation.crop", "8", r"loss\.distillation\.crop is for decoded and lpips, not for 'l2'; leave it out"),
        ("loss.adversarial.taps", "[2]", r"'loss\.adversarial\.taps\.0' = 2: input should be less than or equal to 1"),
        ("loss.distribution_matching.guidance", "[5, 3]", r"guidance must be two rising positive numbers up to 100, not"),
    ],
)
def test_senseless_values_are_refused_by_name(key: str, value: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"base = 'b'\nguidance = [2.0, 4.0]\nbatch_size = 2\nlearning_rate = 1e-3\n{key} = {value}\ndata = {{ source = 's' }}\n"
        "grid = { solver_steps = 4 }\nlora = { rank = 2, alpha = 4 }\nphases = [{ updates = 4, mode_weights = [1, 1, 1, 1] }]\n"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe, Recipe)
    assert "\n" not in str(caught.value)


# --- targets ---------------------------------------------------------------------------------------------------------


def test_pools_are_as_large_as_the_recipe_says(tiny_base: Path) -> None:
    recipe = tiny_recipe(tiny_base, phases=[{**ONE[0], "updates": 300}], pool_batches=64, target_uses=2)
    span = span_at(recipe, 130)
    assert (span.index, span.first_batch, span.batches, span.first, span.end) == (1, 64, 64, 128, 256)
    assert span_at(tiny_recipe(tiny_base, phases=[{**ONE[0], "updates": 3000}], target_uses=2), 600).batches == 256


def test_the_teacher_solves_as_many_samples_at_once_as_the_recipe_says_to_the_same_targets(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []
    target = step._target
    monkeypatch.setattr(step, "_target", lambda *inputs: (pieces.append(len(inputs[3])), target(*inputs))[1])
    losses = []
    for number in (None, 4):
        distill(tiny_recipe(tiny_base, target_batch=number), tmp_path / str(number))
        losses.append([line["loss"] for line in _log(tmp_path / str(number))])
    assert pieces == [2] * 4 + [4] * 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_rescaled_guidance_is_that_of_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided, conditional = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8) / 3
    torch.testing.assert_close(rescaled(guided, conditional, 0.7), rescale_noise_cfg(guided, conditional, 0.7))


@pytest.mark.parametrize("changes", [{"guidance_rescale": 0.7}, {"negative_prompt": "two birds"}], ids=str)
def test_the_teachers_guidance_changes_the_targets(changes: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    for name, settings in (("plain", {}), ("changed", changes)):
        distill(tiny_recipe(tiny_base, phases=ONE, **settings), tmp_path / name, pools=tmp_path / "pools")
    plain, changed = (_log(tmp_path / name)[0]["loss"] for name in ("plain", "changed"))
    assert abs(plain / changed - 1) > 1e-3
    assert len(list((tmp_path / "pools").iterdir())) == 2  # neither takes the other's


@pytest.mark.parametrize(("guidance", "contrast"), [((2.0, 4.0), "two birds"), ((0.0, 1.0), "")])
def test_the_teacher_of_previews_is_guided_against_the_negative_prompt(
    guidance: tuple[float, float], contrast: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "TEACHER_STEPS", 2)
    seen: list[Any] = []
    monkeypatch.setattr(previews, "check_order", lambda *given, **more: seen.append(check_order(*given, **more)) or seen[-1])
    changes = {"guidance": guidance, "negative_prompt": "two birds", "preview_prompts": ("a dog",)}
    distill(tiny_recipe(tiny_base, phases=ONE, **changes), tmp_path / "out")
    assert [(order.steps, order.negative_prompt) for order in seen] == [(2, contrast), (4, ""), (2, ""), (1, "")]


def test_keys_of_guidance_that_cannot_act_are_refused(
    model: TorchModel, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _ = load_base(str(tiny_base))
    with pytest.raises(ConfigError, match=r"^negative_prompt: 'a dog.* is not allowed; it has .* at most \d+ fit; shorten"):
        Objective(model, family, tiny_recipe(tiny_base, negative_prompt="a dog " * 200))
    keeping = model.spec.model_copy(update={"sampler": model.spec.sampler.model_copy(update={"keeps_norm": True})})
    monkeypatch.setattr(model, "spec", keeping)
    with pytest.raises(ConfigError, match=r"^guidance_rescale = 0\.7: this model's guided outputs keep the lengths"):
        Objective(model, family, tiny_recipe(tiny_base, guidance_rescale=0.7))
    base = FAMILIES["flux"](tmp_path / "flux")
    family, model = load_base(str(base))
    for changes in ({"guidance_rescale": 0.7}, {"negative_prompt": "a dog"}):
        ((key, value),) = changes.items()
        with pytest.raises(ConfigError, match=f"^{key} = {value!r}: this network takes its guidance as an input; leave it out"):
            Objective(model, family, tiny_recipe(base, **changes))


def test_a_negative_prompt_stands_where_the_empty_one_did_and_is_no_zeros(tmp_path: Path) -> None:
    _, model = load_base(str(FAMILIES["sdxl"](tmp_path / "sdxl")))
    plain, negative = model.unconditional(), model.unconditional("a dog")
    assert plain
    assert negative
    said = model.encode_ids(model.tokenizer(["a dog"]))
    assert any(not values.any() for values in plain.values())
    assert all(torch.equal(negative[name], said[name]) for name in said)


def test_captions_lie_in_json_files_next_to_the_images(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    for text in sorted(folder.glob("*.txt")):
        text.with_suffix(".json").write_text(json.dumps({"caption": text.read_text(), "title": "t"}))
        text.unlink()
    found = [sample.caption for sample in read_samples(DataRecipe(source=str(folder)), (32, 32), 0, Damage("x"))]  # type: ignore[arg-type]
    assert found[:2] == ["a dog", "a cat"]
    titled = DataRecipe(source=str(folder), caption_column="title")
    assert {sample.caption for sample in read_samples(titled, (32, 32), 0, Damage("x"))} == {"t"}  # type: ignore[arg-type]


# --- losses ----------------------------------------------------------------------------------------------------------


def test_a_whitened_error_counts_every_channel_by_its_own_variance() -> None:
    student, teacher, variance = torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3), torch.tensor([4.0, 0.25])
    student[:, 0], student[:, 1] = 2.0, 0.5  # one deviation each
    assert whitened_loss(student, teacher, variance).item() == pytest.approx(1.0)
    drawn = torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    pool = step.Pool([SimpleNamespace(x0=drawn * torch.tensor([2.0, 0.5]).view(1, 2, 1, 1))], 2)  # type: ignore[list-item]
    assert pool.variance.tolist() == pytest.approx([4.0, 0.25], rel=0.1)


def _distillation(model: TorchModel, tiny_base: Path, batch: MicroBatch, **settings: Any) -> Tensor:
    recipe = tiny_recipe(tiny_base, phases=ONE, loss={"distillation": settings})
    return Objective(model, load_base(str(tiny_base))[0], recipe).losses(batch, recipe.phases[0])["distillation"]


def test_a_decoded_loss_compares_images_of_the_cells_in_the_middle(model: TorchModel, tiny_base: Path) -> None:
    batch = _batch(model)
    loss = _distillation(model, tiny_base, batch, kind="decoded", crop=4)
    (gradient,) = torch.autograd.grad(loss, batch.x0)
    assert gradient[:, :, 2:6, 2:6].abs().max() > 0
    assert not gradient[:, :, :2].any()
    assert not gradient[:, :, :, 6:].any()
    same = MicroBatch(batch.targets, batch.targets.x0, batch.draws)
    assert _distillation(model, tiny_base, same, kind="decoded").item() < 1e-6
    own = _distillation(model, tiny_base, batch, kind="decoded")
    other = _distillation(model, tiny_base, batch, kind="decoded", decoder=str(tiny_base / "vae"))
    torch.testing.assert_close(own, other)
    with pytest.raises(ConfigError, match=r"loss\.distillation\.decoder: nowhere: there is no such folder"):
        _distillation(model, tiny_base, batch, kind="decoded", decoder="nowhere")


class _Distance(torch.nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().flatten(1).mean(dim=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_lpips_is_a_torchscript_file_or_the_packages(
    model: TorchModel, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, file = _batch(model), tmp_path / "lpips.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lpips", None)
        with pytest.raises(ConfigError, match=r"loss\.distillation 'lpips' needs 'lpips', which is not installed"):
            _distillation(model, tiny_base, batch, kind="lpips")

    def offline(**_: Any) -> None:
        raise OSError("no route to the host")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=offline))
    with pytest.raises(ConfigError, match=r"'lpips': the package lpips cannot load VGG \(.*no route to the host\); name a Torch"):
        _distillation(model, tiny_base, batch, kind="lpips")
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda **settings: _Distance()))
    of_package = _distillation(model, tiny_base, batch, kind="lpips")
    torch.jit.script(_Distance()).save(str(file))
    of_file = _distillation(model, tiny_base, batch, kind="lpips", network=str(file))
    torch.testing.assert_close(of_file, of_package)
    with torch.no_grad():
        images = [model.decoder(latents).clamp(-1, 1) for latents in (batch.x0, batch.targets.x0)]
    torch.testing.assert_close(of_file.detach(), (images[0] - images[1]).abs().mean())
    torch.jit.trace(lambda image: image.mean(), torch.zeros(1, 3, 64, 64)).save(str(file))
    with pytest.raises(ConfigError, match=r"no TorchScript file that maps two batches of images to distances"):
        _distillation(model, tiny_base, batch, kind="lpips", network=str(file))
    file.write_bytes(b"no network")
    with pytest.raises(ConfigError, match=r"loss\.distillation\.network '.*lpips\.pt': no TorchScript file"):
        _distillation(model, tiny_base, batch, kind="lpips", network=str(file))


@pytest.mark.parametrize("first_step", [True, False])
def test_matching_leaves_samples_from_pure_noise_alone_where_roles_are_separate(
    first_step: bool, model: TorchModel, tiny_base: Path
) -> None:
    phase = {**ONE[0], "distillation": 0, "distribution_matching": 1}
    recipe = tiny_recipe(tiny_base, phases=[phase], loss={"distribution_matching": {"first_step": first_step}})
    built, batch = Objective(model, load_base(str(tiny_base))[0], recipe), _batch(model)
    (gradient,) = torch.autograd.grad(built.losses(batch, recipe.phases[0])["distribution_matching"], batch.x0)
    assert gradient[1].abs().max() > 0
    assert bool(gradient[0].any()) == first_step


def test_matching_has_its_own_guidance(model: TorchModel, tiny_base: Path) -> None:
    phase = {**ONE[0], "distillation": 0, "distribution_matching": 1}
    found = []
    for guidance, own in (((2.0, 4.0), None), ((9.0, 9.0), (2.0, 4.0)), ((9.0, 9.0), None)):
        recipe = tiny_recipe(tiny_base, phases=[phase], guidance=guidance, loss={"distribution_matching": {"guidance": own}})
        built, batch = Objective(model, load_base(str(tiny_base))[0], recipe), _batch(model)
        found.append(built.losses(batch, recipe.phases[0])["distribution_matching"].item())
    assert found[0] == found[1] != found[2]


def test_matching_rescales_its_guidance_as_targets_do(model: TorchModel, tiny_base: Path) -> None:
    phase = {**ONE[0], "distillation": 0, "distribution_matching": 1}
    found = []
    for share in (0.0, 0.7):
        recipe = tiny_recipe(tiny_base, phases=[phase], guidance=(9.0, 9.0), guidance_rescale=share)
        built, batch = Objective(model, load_base(str(tiny_base))[0], recipe), _batch(model)
        found.append(built.losses(batch, recipe.phases[0])["distribution_matching"].item())
    assert abs(found[0] / found[1] - 1) > 1e-3


def test_what_guides_and_decodes_is_where_a_sharded_base_will_compute(
    model: TorchModel, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective.processes, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(objective, "shard_base", lambda _: None)
    settings = {"kind": "decoded", "decoder": str(tiny_base / "vae")}
    recipe = tiny_recipe(tiny_base, phases=ONE, shard_base=True, loss={"distillation": settings})
    built = Objective(model, load_base(str(tiny_base))[0], recipe)
    (contrast,) = built.branches.contrasts
    assert {values.device.type for values in contrast.values()} == {"meta"}
    decode = built._losses["distillation"]._decode  # type: ignore[attr-defined]
    assert {p.device.type for p in decode._decoder.parameters()} == {"meta"}


def test_the_discriminator_trains_before_the_phase_that_uses_it(tiny_base: Path, tmp_path: Path) -> None:
    phases = [{**ONE[0], "updates": 2}, {**ONE[0], "adversarial": 0.1}]
    distill(tiny_recipe(tiny_base, phases=phases), tmp_path / "out")
    lines = _log(tmp_path / "out")
    assert all({"discriminator", "discriminator_accuracy", "gradient_norm"} <= set(line) for line in lines)
    assert ["adversarial" in line for line in lines] == [False, False, True]
    assert all(0 <= line["discriminator_accuracy"] <= 1 for line in lines)


# --- taps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("name", "shares"), [("sd15", ()), ("sd3", (0.0, 0.99)), ("flux", (0.5, 0.99)), ("pixart", (0.5,))])
def test_a_pass_that_stops_at_its_last_tap_gives_the_features_and_gradients_of_a_whole_one(
    name: str, shares: tuple[float, ...], checkpointed: bool, tmp_path: Path
) -> None:
    family, model = load_base(str(FAMILIES[name](tmp_path / name)))
    if checkpointed:
        checkpoint_gradients(model)
    conditioning = model.encode_ids(model.tokenizer(["a dog", "two cats"]))
    latents = torch.randn(2, *model.spec.latent_shape(model.spec.sizes[0]), generator=torch.Generator().manual_seed(0))
    ran: list[int] = []
    model.network.register_forward_hook(lambda *_: ran.append(1))
    found = []
    for whole in (True, False):
        x = latents.clone().requires_grad_()
        features = Tap(model, family, runs_whole=whole, shares=shares)(x, torch.tensor([999, 249]), conditioning)
        (gradient,) = torch.autograd.grad(sum(values.square().mean() for values in features), x)
        found.append([*features, gradient])
    assert len(found[0]) == max(1, len(shares)) + 1
    assert all(values.ndim == 4 for values in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert len(ran) == 1  # the other stopped
    model.network.eval()


def test_a_network_that_is_tapped_in_one_place_refuses_others(tiny_base: Path) -> None:
    family, model = load_base(str(tiny_base))
    with pytest.raises(ConfigError, match=r"loss\.adversarial\.taps: the networks of family sd15 are tapped in one place"):
        Tap(model, family, shares=(0.5,))


def test_each_tap_has_a_head(tmp_path: Path) -> None:
    base = FAMILIES["sd3"](tmp_path / "sd3")
    family, model = load_base(str(base))
    recipe = tiny_recipe(
        base, phases=[{**ONE[0], "adversarial": 1}], loss={"adversarial": {"taps": (0.0, 0.99)}}, lora={"rank": 1, "alpha": 1}
    )
    add_adapter(model, family.lora_targets, rank=1, alpha=1, seed=0)
    built = Objective(model, family, recipe)
    assert len(built._losses["adversarial"].discriminator.heads) == 2  # type: ignore[attr-defined]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_some_updates_that_are_not_finite_are_skipped_and_a_resumed_run_remembers_them(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, broken = loop.student_x0, {1, 3}
    updates: list[int] = []
    learn = loop._learn
    monkeypatch.setattr(loop, "_learn", lambda *inputs: (updates.append(inputs[1].update), learn(*inputs))[1])
    monkeypatch.setattr(loop, "student_x0", lambda *inputs: honest(*inputs) * (float("nan") if updates[-1] in broken else 1))
    recipe = tiny_recipe(tiny_base, skip_limit=2, phases=[{**ONE[0], "updates": 5}])
    distill(recipe, tmp_path / "whole")
    assert [line.get("skipped") for line in _log(tmp_path / "whole")] == [None, 1, None, 2, None]
    assert "skipped" not in (tmp_path / "whole" / "README.md").read_text()

    updates.clear()
    with pytest.raises(TrainingError, match=r"update 3: loss nan"):  # its checkpoint is of update 3, with one skipped
        distill(recipe.model_copy(update={"skip_limit": 1}), tmp_path / "out")
    with pytest.raises(TrainingError, match=r"update 3: loss nan"):  # a run that forgot the first would skip this one
        distill(recipe.model_copy(update={"skip_limit": 1}), tmp_path / "out")
    distill(recipe, tmp_path / "out")
    assert updates == [0, 1, 2, 3, 3, 3, 4]
    assert _log(tmp_path / "out") == _log(tmp_path / "whole")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    state = checkpoint.load_state(checkpoint_path(tmp_path / "out" / "training", 5))
    assert state["student"]["skipped"] == 2


def test_a_run_that_flashdiff_0_2_began_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_base, phases=[{**ONE[0], "updates": 2}, {**ONE[0], "adversarial": 0.1}], checkpoint_every=2)
    recipe = recipe.model_copy(update={"checkpoints_keep": 2})
    distill(recipe, tmp_path / "out")
    wanted = (tmp_path / "out" / WEIGHTS).read_bytes()
    (tmp_path / "out" / FLASH).unlink()
    checkpoint_path(tmp_path / "out" / "training", 3).unlink()
    path = checkpoint_path(tmp_path / "out" / "training", 2)
    state = checkpoint.load_state(path)
    del state["student"]["skipped"]
    heads = state["objective"]["discriminator"]
    state["objective"]["discriminator"] = {name.replace("heads.0.", "head."): values for name, values in heads.items()}
    checkpoint.save_state(path, state)
    distill(recipe, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == wanted


@pytest.mark.slow
def test_a_run_starts_from_another_runs_weights(
    tiny_base: Path, flash_lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = checkpoints(flash_lora / "training")[-1]
    wanted = load_file(flash_lora / WEIGHTS)
    for name, place in (("folder", flash_lora), ("checkpoint", saved)):
        recipe = tiny_recipe(tiny_base, phases=ONE, init_from=str(place), learning_rate=1e-9)
        distill(recipe, tmp_path / name)
        found = load_file(tmp_path / name / WEIGHTS)
        assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in wanted)
    other = tiny_recipe(tiny_base, phases=ONE, init_from=str(saved), lora={"rank": 3, "alpha": 3})
    with pytest.raises(
        ConfigError, match=r"init_from '.*': its '.*' has the shape .*; give a run with the same base, student, lora\.rank"
    ):
        distill(other, tmp_path / "other")
    lora = {"rank": 2, "alpha": 4, "targets": ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")}
    for changes, message in (
        ({"alpha": 2}, r"its lora\.alpha is 4, this run's is 2; set it to 4"),
        ({"dora": True}, r"its '.*lora_magnitude_vector.*' is missing, .* lora\.ranks, lora\.targets and lora\.dora"),
        ({"targets": ("to_q",)}, r"it has '.*', this run's student does not; give a run with the same base, student"),
    ):
        other = tiny_recipe(tiny_base, phases=ONE, init_from=str(saved), lora={**lora, **changes})
        with pytest.raises(ConfigError, match=r"init_from '.*': " + message):
            list(dry_run(other))
    foreign = shutil.copytree(flash_lora, tmp_path / "foreign")
    info = json.loads((foreign / FLASH).read_text())
    state = checkpoint.load_state(saved)
    other_base = checkpoint_path(foreign / "training", 4)
    for prints in (info["base_prints"], dict.fromkeys(info["base_prints"], "0" * 64)):
        changes = {"base_hash": "0" * 64, "base_prints": prints}
        (foreign / FLASH).write_text(json.dumps({**info, **changes}))
        checkpoint.save_state(other_base, {**state, **changes})
        if prints == info["base_prints"]:  # the same base, rounded
            for place in (foreign, other_base):
                caplog.clear()
                assert list(dry_run(tiny_recipe(tiny_base, phases=ONE, init_from=str(place))))
                assert "its base is this one in another precision: both are the same once rounded to float16" in caplog.text
    for place in (foreign, other_base):
        with pytest.raises(ConfigError, match=r"init_from '.*': its base has the hash 000000000000, this one's has"):
            list(dry_run(tiny_recipe(tiny_base, phases=ONE, init_from=str(place))))
    with pytest.raises(ConfigError, match=r"^'.*/000004\.pt': its base has the hash 000000000000"):
        open_checkpoint(other_base)
    with pytest.raises(ConfigError, match=r"init_from 'nowhere': neither a checkpoint \(\.pt\) nor the folder of a run"):
        distill(tiny_recipe(tiny_base, init_from="nowhere"), tmp_path / "none")


def test_checkpoints_are_in_order_beyond_six_digits(tmp_path: Path) -> None:
    for update in (999_500, 1_000_000, 20, 1_000_500):
        path = checkpoint_path(tmp_path, update)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [int(path.stem) for path in checkpoints(tmp_path)] == [20, 999_500, 1_000_000, 1_000_500]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 2, "alpha": 4, "dora": True, "targets": ("to_q", "conv1")},
        {"rank": 1, "alpha": 1, "targets": ("all",)},
        {
            "rank": 2,
            "alpha": 3,
            "dora": True,
            "targets": ("to_q", "to_out.0", "conv1"),
            "ranks": {"attn2.to_q": 5, "to_out.0": 1},
        },
    ],
    ids=["dora", "all", "ranks"],
)
def test_wider_loras_train_and_fuse_in_both_forms(lora: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_base, phases=[{**ONE[0], "updates": 2}], learning_rate=0.05, lora=lora)
    distill(recipe, tmp_path / "out")
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert any("lora_magnitude_vector" in name for name in weights) == bool(lora.get("dora"))
    _, model = load_base(str(tiny_base))
    _, student = load_fused(str(tiny_base), [(tmp_path / "out", 1.0)], None)
    _, kohya = load_fused(str(tiny_base), [(tmp_path / "out" / KOHYA, 1.0)], None)
    drawn = open_stock(StableDiffusionPipeline, tiny_base)
    drawn.load_lora_weights(tmp_path / "out", weight_name=WEIGHTS)
    for name, values in weights.items():
        wanted = next((own for key, own in lora.get("ranks", {}).items() if f".{key}.lora_A." in name), lora["rank"])
        assert ".lora_A." not in name or len(values) == wanted
    if lora["targets"] == ("all",):
        changed = {
            name
            for name, value in student.network.state_dict().items()
            if not torch.equal(value, model.network.state_dict()[name])
        }
        assert {"conv_in.weight", "time_embedding.linear_1.weight"} <= changed
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([999, 249]), model.encode_ids(model.tokenizer(["a dog", "a cat"])))
    inputs = (*inputs[:2], *(inputs[2][name] for name in model.conditioning))
    with torch.no_grad():
        torch.testing.assert_close(kohya.denoiser(*inputs), student.denoiser(*inputs), atol=1e-4, rtol=1e-4)
        stock = drawn.unet(inputs[0], inputs[1], inputs[2]).sample
        torch.testing.assert_close(stock, student.denoiser(*inputs), atol=1e-4, rtol=1e-4)
        assert (student.denoiser(*inputs) - model.denoiser(*inputs)).abs().max() > 1e-4


def test_a_rank_of_no_layer_is_refused(tiny_base: Path) -> None:
    for name in ("attn3.to_q", "o_q", "conv_in"):
        lora = {"rank": 1, "alpha": 1, "targets": ("to_q",), "ranks": {name: 2}}
        with pytest.raises(ConfigError, match=rf"lora\.ranks: no layer that gets a LoRA is called '{name}', nor ends in it"):
            list(dry_run(tiny_recipe(tiny_base, lora=lora)))


def test_two_ranks_of_one_layer_are_refused(tiny_base: Path) -> None:
    for names in (("to_q", "attn1.to_q"), ("attn1.to_q", "to_q")):
        lora = {"rank": 1, "alpha": 1, "ranks": dict.fromkeys(names, 2)}
        with pytest.raises(ValueError, match=r"lora\.ranks: layers that end in 'attn1\.to_q' also end in 'to_q'; give each"):
            tiny_recipe(tiny_base, lora=lora)
    tiny_recipe(tiny_base, lora={"rank": 1, "alpha": 1, "ranks": {"to_q": 2, "add_to_q": 3}})


def test_a_checkpoint_is_the_student_that_would_be_published(tiny_base: Path, flash_lora: Path) -> None:
    saved = checkpoints(flash_lora / "training")[-1]
    student = open_checkpoint(saved)
    _, published = load_fused(str(tiny_base), [(flash_lora, 1.0)], None)
    assert student.spec.sampler == published.spec.sampler
    order = check_order(student.spec, prompt="a dog", steps=2)
    images = [generate(model, [order])[0][0].astype(int) for model in (student, published, load_base(str(tiny_base))[1])]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert (images[0] != images[2]).any()


def test_evaluate_measures_a_checkpoint(flash_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = checkpoints(flash_lora / "training")[-1]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    command = ["evaluate", str(saved), "--steps", "1", "--prompts", str(prompts), "--features", "avatars"]
    command += ["--reference", str(image_folder(tmp_path / "images"))]
    assert cli.main(command) == 0
    assert f"| {saved.name}, 1 step |" in capsys.readouterr().out
    assert cli.main([*command, "--lora", str(flash_lora)]) == 2
    assert "is a checkpoint of a distillation: its run settles" in capsys.readouterr().err
    alone = Path(shutil.copy(saved, tmp_path / "alone.pt"))
    assert cli.main(["evaluate", str(alone), *command[2:]]) == 2
    assert "alone.pt: its run's recipe is not in " in capsys.readouterr().err


def test_a_run_tells_where_its_time_went(flash_lora: Path) -> None:
    lines = [json.loads(line) for line in (flash_lora / "training" / SPEED).read_text().splitlines()]
    assert [line["update"] for line in lines] == [3, 4]
    assert {"targets_s", "updates_s", "checkpoints_s", "samples_per_s", "memory_gib"} <= set(lines[0])
    assert lines[0]["memory_gib"] > 0.05
    speed = Speed(batch_size=6)
    speed.took("targets", 1.0)
    speed.took("updates", 2.0, updates=2)
    assert speed.write(flash_lora.parent, 2)["samples_per_s"] == 4.0


def test_a_part_of_an_update_on_a_gpu_is_timed_from_one_rest_of_the_gpu_to_the_next(
    flash_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, launched = [0.0], [3.0]  # seconds of work that is still under way

    def synchronize(_: torch.device) -> None:
        clock[0] += launched[0]
        launched[0] = 0.0

    monkeypatch.setattr(processes, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr("flashdiff.distill.speed.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    speed = Speed(batch_size=4)
    with speed.within("opponents"):
        launched[0] = 5.0
    assert speed.write(flash_lora.parent, 1)["opponents_s"] == 5.0


# --- the best checkpoint ---------------------------------------------------------------------------------------------


def test_held_out_samples_have_one_size_and_are_not_trained_on(
    tiny_base: Path, model: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(tiny_recipe(tiny_base).data, model, batch_size=2, seed=0)
    rest, apart = data.held_out(2)
    assert len(rest) == 4
    assert len(apart) == 2
    assert sorted([*rest.items, *apart.items], key=str) == sorted(data.items, key=str)
    assert data.held_out(2)[1].items == apart.items
    monkeypatch.setattr(data, "_chosen", None)  # nothing is to be sorted out
    assert data.held_out(0)[0] is data
    assert len(data.held_out(0)[1]) == 0
    monkeypatch.undo()
    with pytest.raises(TrainingError, match=r"keep_best = 6: there are 6 samples of 32x32, and some are needed to train on"):
        data.held_out(6)
    with pytest.raises(ValueError, match=r"keep_best must be a multiple of batch_size \(2\), not 3"):
        tiny_recipe(tiny_base, keep_best=3)
    assert tiny_recipe(tiny_base, keep_best=0).content_hash == tiny_recipe(tiny_base).content_hash


@pytest.mark.slow
def test_the_checkpoint_nearest_to_the_teacher_is_published_too(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = [{"updates": 2, "mode_weights": (1, 1, 1, 1)}, {"updates": 2, "mode_weights": (1, 1, 1, 1), "adversarial": 1}]
    recipe = tiny_recipe(tiny_base, phases=phases, keep_best=2, checkpoint_every=1, learning_rate=0.1, ema_decay=0.0)
    assert recipe.lora
    out = tmp_path / "whole"
    distill(recipe, out)
    found = [line["held_out"] for line in _log(out)]
    nearest = found.index(min(found))
    assert nearest < 3
    best, last = (read_flash_info(folder) for folder in (out / "best", out))
    assert best
    assert last
    assert (best.updates, last.updates) == (nearest + 1, 4)
    assert best.model_copy(update={"updates": 4}) == last
    assert f"on 2 held-out samples: {found[nearest]:.3g}" in (out / "best" / "README.md").read_text()

    monkeypatch.setattr(loop.Student, "learn", killed_at(3, loop.Student.learn))
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "broken")
    monkeypatch.undo()
    distill(recipe, tmp_path / "broken")
    assert _log(tmp_path / "broken") == _log(out)
    for name in (WEIGHTS, f"best/{WEIGHTS}"):
        assert (out / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()

    lines = list(summary(out / "training"))
    assert lines[-1] == f"held out {min(found):.4g} after {nearest + 1} updates, in {out / 'best'}; {found[-1]:.4g} at the end"
    assert any("discriminator accuracy: " in line for line in lines)
    assert "opponents" in lines[0]
    shares = [int(word.removesuffix("%").removesuffix("%,")) for word in lines[0].replace(",", "").split() if word.endswith("%")]
    assert 97 <= sum(shares) <= 103

    other = tiny_recipe(tiny_base, init_from=str(out / "best"), lora={**recipe.lora.model_dump(), "alpha": 2})
    with pytest.raises(ConfigError, match=r"its lora\.alpha is 4, this run's is 2; set it to 4"):
        list(dry_run(other))
    (out / FLASH).unlink()
    (out / "training" / "log.jsonl").write_text("")
    with pytest.raises(
        TrainingError, match=r"log\.jsonl is damaged \(list index out of range\); remove it and the last checkpoint"
    ):
        distill(recipe, out)


def test_the_held_out_distance_is_that_of_the_averaged_student_from_the_teachers_solutions(
    tiny_base: Path, tmp_path: Path, model: TorchModel
) -> None:
    recipe = tiny_recipe(tiny_base, keep_best=4, accumulate=2)
    family, _ = load_base(str(tiny_base))
    images = ImageConditions(model, recipe)
    built, student = Objective(model, family, recipe, images), Student(model, recipe)
    _, apart = load_dataset(recipe.data, model, batch_size=2, seed=0).held_out(4)
    held_out = HeldOut(model, built.branches, apart, recipe, images, tmp_path)
    solved = held_out._solved
    assert solved.times.tolist() == recipe.grid.inference_times(4)
    teacher = teacher_of(model, built.branches, recipe)
    conditioning = apart.conditioning(solved.items)
    with as_teacher(model), torch.no_grad():
        wanted = teacher.solve(solved.x_t, torch.tensor(recipe.grid.mode_indices()), torch.full((4,), 3.0), conditioning)
    torch.testing.assert_close(solved.x0, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for values in student.average.values():
            values += 0.1
        with student.holding(student.average):
            own = predict_x0(model, solved.x_t, solved.times, conditioning)
    distance = held_out.measure(model, student)
    assert distance == pytest.approx((own - wanted).square().mean().item(), rel=1e-4)
    assert held_out.best()["distance"] == distance
    assert all(torch.equal(values, student.average[name]) for name, values in held_out.best()["weights"].items())
    with torch.no_grad():
        for values in student.average.values():
            values += 1
    assert held_out.measure(model, student) > distance
    again = HeldOut(model, built.branches, apart, recipe, images, tmp_path)
    assert again.measure(model, student) > distance
    assert again.best()["distance"] == distance
    (tmp_path / "best.pt").unlink()
    with pytest.raises(TrainingError, match=r"best\.pt is missing, which holds the best student"):
        again.best()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ramp_updates": 9, "phases": [ONE[0], {**ONE[0], "updates": 8}]}, "ramp_updates must not be longer than a later"),
        (
            {"grid": {"solver_steps": 4, "modes": 1}, "phases": [{**ONE[0], "mode_weights": [1], "distribution_matching": 0.1}],
             "loss": {"distribution_matching": {"first_step": False}}},
            "first_step = false leaves a student of one step almost nothing to match",
        ),
        (
            {"data": {"source": "prompts.txt"}, "target": "consistency", "phases": [{**ONE[0], "adversarial": 0.1}]},
            "target = 'consistency' of prompts alone gives the adversarial loss no real samples",
        ),
        ({"data": {"source": "prompts.txt", "buckets": True}}, "data.buckets: 'prompts.txt' has one prompt a line"),
        ({"loss": {"distribution_matching": {"critic_updates": 3}}}, "critic_updates is for fake_score = 'lora'"),
        ({"loss": {"distribution_matching": {"own_step": True, "times": (0.3, 0.5)}}}, "times: own_step settles it"),
        ({"loss": {"adversarial": {"r1_weight": 0, "r1_sigma": 0.2}}}, "r1_sigma does nothing where r1_weight is 0"),
        ({"loss": {"distribution_matching": {"times": (0.9, 0.1)}}}, r"distribution_matching\.times must be two rising"),
    ],
)  # fmt: skip
def test_keys_that_would_do_nothing_are_refused(changes: dict[str, Any], message: str, tiny_base: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_recipe(tiny_base, **changes)


def test_a_fault_in_the_only_phase_is_one_fault(tmp_path: Path) -> None:
    values = tiny_recipe(tmp_path).model_dump()
    with pytest.raises(ConfigError) as caught:
        parse_record({**values, "phases": [{**values["phases"][0], "updates": 0}]}, Recipe, source="recipe")
    assert str(caught.value) == "recipe: 'phases.0.updates' = 0: input should be greater than or equal to 1"
    with pytest.raises(ConfigError, match=r"'phases' = .*: tuple should have at least 1 item"):
        parse_record({**values, "phases": []}, Recipe, source="recipe")
