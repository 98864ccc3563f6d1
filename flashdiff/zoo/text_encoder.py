"""The embedded model's tokenizer and text encoder: made, and trained on captions."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdiff.checkpoint import step_generator
from flashdiff.zoo.fit import device, fit
from flashdiff.zoo.recipe import ZooRecipe
from flashdiff.zoo.world import Scene, attribute_labels, attribute_words, caption, full_caption


def make_tokenizer(scenes: Sequence[Scene], recipe: ZooRecipe) -> Any:
    """A CLIP tokenizer whose byte-pair merges are learned from the captions; any other text still has tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = random.Random(recipe.seed)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    captions = [caption(scene, rng).replace(",", " ,") for scene in scenes[:20_000]]
    # The trainer numbers the ends of words in the order of a hash map, and pairs that are equally frequent by these numbers.
    spelled = [learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(text)) for text in captions]
    ends = sorted({word[-1] + "</w>" for words in spelled for word, _ in words})
    trainer = trainers.BpeTrainer(
        special_tokens=ends,
        vocab_size=recipe.text.vocabulary - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(merge) for merge in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,  # type: ignore[arg-type]  # pairs, not text, is what it takes
        model_max_length=recipe.text.tokens,
    )


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids [B, length], padded or cut to the tokenizer's length."""
    ids: Tensor = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def make_text_encoder(recipe: ZooRecipe, vocabulary: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(recipe.seed + 2)
    text = recipe.text
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=4,
            max_position_embeddings=text.tokens,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


class CaptionReader(torch.nn.Module):
    """Hidden states [B, tokens, width] to the logits of every attribute's words.

    One query per attribute attends to the tokens, as the UNet's cross-attention will.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        words = attribute_words()
        self.queries = torch.nn.Parameter(torch.randn(len(words), width) / width**0.5)
        self.key, self.value = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(width, len(choices)) for name, choices in words.items()})

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """The logits [B, words] of every attribute, by its name, of hidden states [B, tokens, width]."""
        scores = self.queries @ self.key(hidden).transpose(1, 2)
        read = scores.softmax(-1) @ self.value(hidden)
        return {name: head(read[:, place]) for place, (name, head) in enumerate(self.heads.items())}


def train_text_encoder(text_encoder: Any, tokenizer: Any, scenes: Sequence[Scene], recipe: ZooRecipe, out: Path) -> None:
    """The encoder learns to say what the image of a caption shows, in place; then it is frozen, as Stable Diffusion's is.

    Learned with the UNet instead, words for details of low contrast stay unread: 200,000 images taught it the eyes, but not
    the rings and patterns, whose share of the loss is a hundredth of theirs.
    """
    stage = recipe.text
    torch.manual_seed(recipe.seed + 3)
    reader = CaptionReader(stage.width)
    labels = {name: torch.from_numpy(found).to(device()) for name, found in attribute_labels(scenes).items()}

    def loss_of(step: int) -> Tensor:
        rng, _ = step_generator(recipe.seed + 2, step)
        words = random.Random(int(rng.integers(2**62)))
        chosen = rng.integers(0, len(scenes), stage.batch_size)
        texts = [caption(scenes[index], words) for index in chosen]
        logits = reader(text_encoder(token_ids(tokenizer, texts).to(device())).last_hidden_state)
        losses = [
            torch.nn.functional.cross_entropy(logits[name], labels[name][chosen], ignore_index=-1, reduction="sum")
            for name in logits
        ]
        return torch.stack(losses).sum() / len(chosen)

    @torch.no_grad()
    def report() -> str:
        """Share of attributes read right off captions that say everything."""
        ids = token_ids(tokenizer, [full_caption(scene) for scene in scenes[:500]])
        logits = reader(text_encoder(ids.to(device())).last_hidden_state)
        right = [(logits[name].argmax(1) == labels[name][:500])[labels[name][:500] >= 0] for name in logits]
        return f"{torch.cat(right).float().mean():.3f} read"

    fit("text", torch.nn.ModuleList([text_encoder, reader]), loss_of, stage, out, ema_decay=None, report=report)
    text_encoder.requires_grad_(False)
