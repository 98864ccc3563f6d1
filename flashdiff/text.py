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

    def __call__(self, prompts: Sequence[str], *, truncate: bool = False) -> NDArray[np.int64]:
        """Ids [B, length]. RequestError for a prompt that does not fit, because cutting it would drop what it asks for.

        Training captions may be cut (`truncate`): their image is what it is.
        """
        ids = np.full((len(prompts), self.length), self.pad_id, dtype=np.int64)
        for prompt, row, encoding in zip(prompts, ids, self._tokenizer.encode_batch(list(prompts)), strict=True):
            tokens = encoding.ids
            if len(tokens) > self.length:
                if not truncate:
                    raise RequestError("prompt", prompt, f"it has {len(tokens)} tokens, at most {self.length} fit")
                tokens = [*tokens[: self.length - 1], tokens[-1]]  # the end mark stays
            row[: len(tokens)] = tokens
        return ids
