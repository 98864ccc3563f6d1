"""Text encoders and networks alone against those of the stock pipelines, for what a whole image would not show."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny import MODELS, STUDENTS, open_stock

from flashdiff.errors import RequestError
from flashdiff.families import load_base

PROMPTS = ["A red dog", "\n two cats <|endoftext|> and much more than thirty-two tokens of text", ""]


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """Our model and the stock pipeline of a tiny base."""
    base = (MODELS | STUDENTS)[request.param](tmp_path / request.param)
    family, model = load_base(str(base))
    return model, open_stock(getattr(diffusers, family.pipeline_class), base)


def _same(ours: torch.Tensor, stock: torch.Tensor) -> None:
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("opened", ["sd2"], indirect=True)
def test_the_text_of_sd2(opened: Any) -> None:
    model, pipeline = opened
    _same(
        model.encode_ids(model.tokenizer(["a dog"]))["encoder_hidden_states"], pipeline.encode_prompt("a dog", "cpu", 1, False)[0]
    )


@pytest.mark.parametrize("opened", ["pixart-sigma"], indirect=True)
def test_the_text_of_pixart_sigma_has_300_tokens(opened: Any) -> None:
    model, pipeline = opened
    ours = model.encode_ids(model.tokenizer(["A red dog"]))
    stock, mask, *_ = pipeline.encode_prompt("A red dog", do_classifier_free_guidance=False)
    assert stock.shape[1] == 300
    _same(ours["encoder_attention_mask"], mask.float())
    _same(ours["encoder_hidden_states"][mask.bool()], stock[mask.bool()])
    with pytest.raises(RequestError, match="at most 300 fit"):
        model.tokenizer(["x" * 300])


@pytest.mark.parametrize("opened", ["sd3", "sd35"], indirect=True)
def test_the_text_of_sd3_with_and_without_t5(opened: Any) -> None:
    model, pipeline = opened
    ours = model.encode_ids(model.tokenizer(["a dog", "two cats"]))
    states, _, pooled, _ = pipeline.encode_prompt(["a dog", "two cats"], None, None, do_classifier_free_guidance=False)
    _same(ours["encoder_hidden_states"], states)
    _same(ours["pooled_projections"], pooled)
    assert ("input_ids_3" in model.spec.text_part.inputs) == (pipeline.text_encoder_3 is not None)


@pytest.mark.parametrize("opened", ["z-image"], indirect=True)
def test_the_text_of_z_image_is_a_turn_of_a_chat(opened: Any) -> None:
    model, pipeline = opened
    ours = model.encode_ids(model.tokenizer(PROMPTS))
    stock, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    for index, states in enumerate(stock):
        is_prompt = ours["encoder_attention_mask"][index].bool()
        _same(ours["encoder_hidden_states"][index][is_prompt], states)
    lengths = [len(states) for states in stock]
    assert min(lengths) <= 32 < max(lengths)


@pytest.mark.parametrize("opened", ["z-image"], indirect=True)
@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (6, 10)])  # tokens that need padding and some that need none
def test_the_network_of_z_image_on_prompts_of_several_lengths(opened: Any, shape: tuple[int, int]) -> None:
    model, pipeline = opened
    conditioning = model.encode_ids(model.tokenizer(PROMPTS))
    latents = torch.randn(len(PROMPTS), 16, *shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([999, 500, 3])
    _, sigmas = model.spec.sampler.schedule.levels(times.tolist())
    text, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    with torch.no_grad():
        ours = model.denoiser(latents, times, *(conditioning[name] for name in model.conditioning))
        stock = pipeline.transformer(list(latents[:, :, None]), 1 - torch.from_numpy(sigmas).float(), text, return_dict=False)[0]
    _same(ours, -torch.stack(stock)[:, :, 0])
    assert ours.std() > 0.01


@pytest.mark.parametrize("opened", ["sana", "sana-sprint"], indirect=True)
def test_the_text_of_sana_follows_an_instruction(opened: Any) -> None:
    model, pipeline = opened
    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    prompts = ["A Red dog", "\n two cats <pad> and more"]
    ours = model.encode_ids(model.tokenizer([*prompts, ""]))
    stock = pipeline.encode_prompt(prompts, complex_human_instruction=instruction)
    mask = ours["encoder_attention_mask"][:2].bool()
    assert stock[0].shape[1] == 300
    assert mask.sum(dim=1).tolist() == [11, 21]
    _same(mask.float(), stock[1].float())
    _same(ours["encoder_hidden_states"][:2][mask], stock[0][mask])
    longest = 300 - 2
    assert model.tokenizer(["x" * longest])["input_ids"][0, -1] != model.spec.tokenizers[0].pad_id
    with pytest.raises(RequestError, match=f"at most {model.spec.prompt_tokens} fit"):
        model.tokenizer(["x" * (longest + 1)])


@pytest.mark.parametrize("opened", ["sana"], indirect=True)
def test_sana_contrasts_with_an_empty_text_without_its_instruction(opened: Any) -> None:
    model, pipeline = opened
    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    ours = model.unconditional()
    _, _, stock, mask = pipeline.encode_prompt(["A dog"], complex_human_instruction=instruction)
    _same(ours["encoder_attention_mask"], mask.float())
    _same(ours["encoder_hidden_states"][mask.bool()], stock[mask.bool()])


@pytest.mark.parametrize("opened", ["sana-4k"], indirect=True)
@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (16, 16)])
def test_the_network_of_sana_with_places(opened: Any, shape: tuple[int, int]) -> None:
    model, pipeline = opened
    conditioning = model.encode_ids(model.tokenizer(PROMPTS))
    latents = torch.randn(len(PROMPTS), 8, *shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([999, 500, 3])
    _, sigmas = model.spec.sampler.schedule.levels(times.tolist())
    with torch.no_grad():
        ours = model.denoiser(latents, times, *(conditioning[name] for name in model.conditioning))
        stock = pipeline.transformer(
            latents,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            timestep=torch.from_numpy(1000 * sigmas).float(),
            return_dict=False,
        )[0]
        unplaced = load_base(str(model.folder))[1]
        unplaced.network.patch_embed.span = 0.0
        without = unplaced.denoiser(latents, times, *(conditioning[name] for name in model.conditioning))
    _same(ours, stock)
    assert (ours - without).abs().max() > 0.01


@pytest.mark.parametrize("opened", ["sana", "sana-sprint"], indirect=True)
def test_the_codec_of_sana(opened: Any) -> None:
    model, pipeline = opened
    scale = pipeline.vae.config.scaling_factor * getattr(pipeline.scheduler.config, "sigma_data", 1.0)
    images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = model.encoder(images)
        _same(latents, pipeline.vae.encode(images).latent * scale)
        _same(model.decoder(latents), pipeline.vae.decode(latents / scale).sample)


@pytest.mark.parametrize("opened", ["qwen-image"], indirect=True)
def test_the_text_of_qwen_image_starts_behind_the_systems_turn(opened: Any) -> None:
    model, pipeline = opened
    ours = model.encode_ids(model.tokenizer(PROMPTS))
    stock, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=512)
    length = mask.shape[1]
    assert ours["encoder_hidden_states"].shape[1] == 512
    assert len(set(mask.sum(dim=1).tolist())) == 3
    _same(ours["encoder_attention_mask"][:, :length], mask.float())
    assert not ours["encoder_attention_mask"][:, length:].any()
    _same(ours["encoder_hidden_states"][:, :length][mask.bool()], stock[mask.bool()])
    with pytest.raises(RequestError, match="at most 546 fit"):
        model.tokenizer(["x" * 546])


@pytest.mark.parametrize("opened", ["qwen-image"], indirect=True)
@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (6, 10)])  # odd and even numbers of tokens along a side
def test_the_network_of_qwen_image_on_prompts_of_several_lengths(opened: Any, shape: tuple[int, int]) -> None:
    model, pipeline = opened
    conditioning = model.encode_ids(model.tokenizer(PROMPTS))
    latents = torch.randn(len(PROMPTS), 16, *shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([999, 500, 3])
    _, sigmas = model.spec.sampler.schedule.levels(times.tolist())
    text, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=512)
    with torch.no_grad():
        ours = model.denoiser(latents, times, *(conditioning[name] for name in model.conditioning))
        stock = pipeline.transformer(
            hidden_states=pipeline._pack_latents(latents, *latents.shape),
            timestep=torch.from_numpy(sigmas).float(),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, shape[0] // 2, shape[1] // 2)]] * len(PROMPTS),
            return_dict=False,
        )[0]
    _same(ours, pipeline._unpack_latents(stock, 4 * shape[0], 4 * shape[1], 4)[:, :, 0])
    assert ours.std() > 0.01


@pytest.mark.parametrize("opened", ["qwen-image"], indirect=True)
def test_the_codec_of_qwen_image_is_a_video_autoencoders_for_one_frame(opened: Any) -> None:
    model, pipeline = opened
    vae = pipeline.vae
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = vae.encode(images[:, :, None]).latent_dist
        _same(model.encoder(images), ((encoded.mode() - mean) / std)[:, :, 0])
        drawn = model.encoder(images, torch.Generator().manual_seed(1))
        latents = encoded.sample(torch.Generator().manual_seed(1))
        _same(drawn, ((latents - mean) / std)[:, :, 0])
        _same(model.decoder(drawn).clamp(-1, 1), vae.decode(latents).sample[:, :, 0])


@pytest.mark.parametrize("opened", ["flux2-klein"], indirect=True)
def test_the_text_of_flux2_klein_is_three_layers_with_their_padding(opened: Any) -> None:
    model, pipeline = opened
    ours = model.encode_ids(model.tokenizer(PROMPTS))
    stock, _ = pipeline.encode_prompt(PROMPTS)
    _same(ours["encoder_hidden_states"], stock)
    with pytest.raises(RequestError, match="at most 512 fit"):
        model.tokenizer(["x" * 512])


@pytest.mark.parametrize("opened", ["flux2-klein"], indirect=True)
@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_the_network_of_flux2_klein(opened: Any, shape: tuple[int, int]) -> None:
    model, pipeline = opened
    text, text_ids = pipeline.encode_prompt(PROMPTS)
    latents = torch.randn(len(PROMPTS), 8, *shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([999, 500, 3])
    _, sigmas = model.spec.sampler.schedule.levels(times.tolist())
    patches = pipeline._patchify_latents(latents)
    with torch.no_grad():
        ours = model.denoiser(latents, times, text)
        stock = pipeline.transformer(
            hidden_states=pipeline._pack_latents(patches),
            timestep=torch.from_numpy(sigmas).float(),
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=pipeline._prepare_latent_ids(patches),
            return_dict=False,
        )[0]
    unpacked = stock.transpose(1, 2).reshape(patches.shape)
    _same(ours, pipeline._unpatchify_latents(unpacked))
    assert ours.std() > 0.01


@pytest.mark.parametrize("opened", ["flux2-klein"], indirect=True)
def test_the_codec_of_flux2_klein_normalises_patches(opened: Any) -> None:
    model, pipeline = opened
    images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = model.encoder(images)
        _same(pipeline._patchify_latents(latents), pipeline._encode_vae_image(images, None))
        _same(model.decoder(latents), pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mode()).sample)
