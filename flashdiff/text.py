"""Prompts to token ids, from tokenizer.json texts alone: no transformers at serving time."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer

from flashdiff.config import Record
from flashdiff.errors import ModelError, RequestError, first_line


class TokenizerSpec(Record):
    """One tokenizer of a model, which fills one input of its text encoders."""

    name: str
    """Of that input: input_ids, input_ids_2, ..."""
    length: int = Field(ge=3, le=2**16)
    """Tokens, end marks included."""
    pad_id: int = Field(ge=0, lt=2**31)
    before: str = Field("", max_length=4000)
    """Text in front of every prompt, which a chat template puts there."""
    after: str = Field("", max_length=1000)
    lowercase: bool = False
    """Whether prompts are lowered and stripped first, as by a pipeline whose tokenizer does not."""


class CutText(str):
    """A prompt that may be cut to the tokens that fit. It equals no plain text: that is refused where it is too long."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CutText) and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((CutText, str(self)))


class PromptTokenizer:
    """All tokenizers of a model. Each pads to its length: marks, tokens, end mark, padding."""

    def __init__(self, texts: Mapping[str, str], specs: Sequence[TokenizerSpec]) -> None:
        """`texts` holds the text of a tokenizer.json for every spec, by name; ModelError for any other text."""
        self.texts, self.specs = dict(texts), tuple(specs)
        self._tokenizers = {spec.name: _parse(spec.name, texts[spec.name]) for spec in specs}
        self._longest = max(spec.length for spec in specs)

    def __call__(self, prompts: Sequence[str], *, truncate: bool = False) -> dict[str, NDArray[np.int64]]:
        """Ids [B, length] by name. RequestError for a prompt that does not fit, because a cut would drop part of its meaning.

        A tokenizer shorter than the model's longest may cut, as in the models' own pipelines: the longest reads it all.
        Training captions may be cut by any (`truncate`): their image is what it is. So may a `CutText`.
        """
        return {spec.name: self._ids(spec, prompts, truncate or spec.length < self._longest) for spec in self.specs}

    def _ids(self, spec: TokenizerSpec, prompts: Sequence[str], truncate: bool) -> NDArray[np.int64]:
        ids = np.full((len(prompts), spec.length), spec.pad_id, dtype=np.int64)
        tokenizer = self._tokenizers[spec.name]
        for prompt, row in zip(prompts, ids, strict=True):  # one by one: `encode_batch` wakes threads, which costs a prompt more
            text = prompt.lower().strip() if spec.lowercase else prompt
            try:
                encoding = tokenizer.encode(spec.before + text + spec.after, add_special_tokens=False)
                count = len(encoding.ids) + tokenizer.num_special_tokens_to_add(False)
                if count > spec.length and (truncate or isinstance(prompt, CutText)):
                    encoding.truncate(spec.length - count + len(encoding.ids))  # end marks stay, as in transformers
                tokens = tokenizer.post_process(encoding).ids
            except Exception as error:  # a tokenizer.json may ask for what it cannot do
                raise RequestError("prompt", prompt, f"the tokenizer of {spec.name} fails on it: {first_line(error)}") from None
            if len(tokens) > spec.length:
                raise RequestError(
                    "prompt", prompt, f"it has {len(tokens)} tokens, at most {spec.length} fit; truncate_prompt cuts it"
                )
            row[: len(tokens)] = tokens
        return ids


def _parse(name: str, text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exceptions, and its panics are not even that
        raise ModelError(f"the tokenizer of {name} cannot be used: {first_line(error)}") from None
    return tokenizer
