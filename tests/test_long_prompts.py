"""Prompts of more tokens than a model takes: refused, or cut as diffusers' pipelines cut them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import MODELS
from transformers import AutoTokenizer

from flashdiff import cli
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import RequestError
from flashdiff.families import load_base
from flashdiff.families.stock import stock_image
from flashdiff.generate import decode_rows, generate, generate_rows
from flashdiff.tasks import check_order
from flashdiff.text import CutText

LONG = "A red dog, a cat and 3 birds\u2028in the rain. " * 40
FOLDERS = {"input_ids": "tokenizer", "input_ids_2": "tokenizer_2", "input_ids_3": "tokenizer_3"}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers_truncation(name: str, tmp_path: Path) -> None:
    base = MODELS[name](tmp_path / name)
    _, model = load_base(str(base))
    with pytest.raises(RequestError, match=r"tokens, at most .* fit; truncate_prompt cuts it"):
        model.tokenizer([LONG])
    cut = model.tokenizer([CutText(LONG)])
    for spec in model.spec.tokenizers:
        stock = AutoTokenizer.from_pretrained(base / FOLDERS[spec.name])
        text = LONG.lower().strip() if spec.lowercase else LONG
        given = {"truncation": True, "max_length": spec.length, "padding": "max_length"}
        expected = stock(spec.before + text + spec.after, **given).input_ids
        assert cut[spec.name][0].tolist() == expected


@pytest.mark.parametrize("name", MODELS)
def test_the_image_of_a_cut_prompt_is_the_stock_pipelines(name: str, tmp_path: Path) -> None:
    base = MODELS[name](tmp_path / name)
    family, model = load_base(str(base))
    order = check_order(model.spec, prompt=LONG, seed=3, steps=2, truncate_prompt=True)
    ((row, _),) = generate_rows(model, [order])[0]
    ours = np.clip(decode_rows(model, [row])[0] / 2 + 0.5, 0, 1)
    stock = stock_image(family, model, base, prompt=LONG, seed=3, steps=2, size=order.size)
    np.testing.assert_allclose(ours, stock.pixels, atol=1e-5)


def test_a_prompt_that_fits_is_the_same_either_way_and_one_that_does_not_is_refused_whatever_came_before() -> None:
    fake = FakeComponents()
    words = " ".join(map(str, range(50)))
    orders = [check_order(fake.spec, prompt=p, truncate_prompt=cut) for p in ("a dog", words) for cut in (False, True)]
    with pytest.raises(RequestError, match="words fit"):
        generate(fake, orders)
    del orders[2]
    (plain,), (cut,), (long,) = generate(fake, orders)
    np.testing.assert_array_equal(plain, cut)
    (shorter,) = generate(fake, [check_order(fake.spec, prompt=" ".join(words.split()[: fake.spec.prompt_tokens]))])[0]
    np.testing.assert_array_equal(long, shorter)


def test_endless_prompts_are_refused_before_they_are_read() -> None:
    spec = FakeComponents().spec
    with pytest.raises(RequestError, match="70000 characters are more than the 65536 that are cut"):
        check_order(spec, prompt="x" * 70_000, truncate_prompt=True)
    check_order(spec, prompt="x" * 60_000, truncate_prompt=True)


def test_a_text_that_may_be_cut_equals_no_plain_one() -> None:
    cut: Any = CutText("a")
    assert cut == CutText("a")
    assert cut != "a"
    assert "a" != cut  # noqa: SIM300
    assert {"a": 1, cut: 2} == {cut: 2, "a": 1}
    assert len({"a": 1, cut: 2}) == 2


def test_generate_cuts_where_it_is_asked_to(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    build_engine(BuildOptions(base=str(tiny_base), out=bundle, backend="torch", batch_sizes=(1, 2)), print)
    given = ["generate", str(bundle), "--steps", "1", "--out", str(tmp_path / "a.png")]
    for prompt in (LONG, LONG[:100]):  # of more characters than the tokens can be, and of fewer
        assert cli.main([*given, prompt]) == 2
        assert "truncate_prompt cuts it" in capsys.readouterr().err
        assert cli.main([*given, prompt, "--truncate-prompt"]) == 0
