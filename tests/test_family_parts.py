"""Text encoders and networks alone against those of the stock pipelines, for what a whole image would not show."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny import MODELS, open_stock

from flashdiff.errors import RequestError
from flashdiff.families import load_base

PROMPTS = ["A red dog", "\n two cats <|endoftext|> and much more than thirty-two tokens of text", ""]


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """Our model and the stock pipeline of a tiny base."""
    base = MODELS[request.param](tmp_path / request.param)
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
