"""Prompts to token ids, from a tokenizer.json alone: no transformers at serving time."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from flashdiff.errors import RequestError


class PromptTokenizer:
    """A CLIP-style tokenizer with a fixed length: start mark, tokens, end mark, padding."""

    def __init__(self, tokenizer: Tokenizer, *, length: int, pad_id: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self.length, self.pad_id = tokenizer, length, pad_id

    @classmethod
    def from_json(cls, text: str, *, length: int, pad_id: int) -> Self:
        """From the text of a tokenizer.json."""
        return cls(Tokenizer.from_str(text), length=length, pad_id=pad_id)

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return str(self._tokenizer.to_str())

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Ids [B, length]; RequestError for a prompt that does not fit, because cutting it would drop what it asks for."""
        ids = np.full((len(prompts), self.length), self.pad_id, dtype=np.int64)
        for prompt, row, encoding in zip(prompts, ids, self._tokenizer.encode_batch(list(prompts)), strict=True):
            if len(encoding.ids) > self.length:
                raise RequestError("prompt", prompt, f"it has {len(encoding.ids)} tokens, at most {self.length} fit")
            row[: len(encoding.ids)] = encoding.ids
        return ids
