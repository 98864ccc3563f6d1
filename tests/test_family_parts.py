"""Text encoders and networks alone against those of the stock pipelines, for what a whole image would not show."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny import MODELS, open_stock

from flashdiff.errors import RequestError
from flashdiff.families import load_base


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
