"""How denoisers read the tokens that an IP-Adapter made of a reference: a record a kind, which families name.

The adapter's own weights stay outside the network: it is handed the keys and values of the tokens for every attention that reads
them, and holds none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """What attentions read of a reference: keys and values [B, T, C] of each, and a scale [B, 1, 1]."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    scale: Tensor

    def found(self, index: int, query: Tensor) -> Tensor:
        """What the queries [B, heads, N, C / heads] of attention `index` find [B, N, C], times the scale."""
        keys, values = (_heads(tensors[index], query.shape[1]) for tensors in (self.keys, self.values))
        return self.scale * _attended(query, keys, values)

    def next_to(self, texts: Mapping[str, Any]) -> dict[str, Any]:
        """A UNet's arguments with these in them: its blocks hand the hidden states to the processors as they are."""
        return {**texts, "encoder_hidden_states": (texts["encoder_hidden_states"], self)}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How one kind of denoiser reads a reference."""

    attentions: Callable[[Any], Sequence[str]]
    """The names of a network's attentions that do."""
    number: Callable[[int], int]
    """Of the attention at a place among these, in the names of an adapter's tensors."""
    width: Callable[[Any], int]
    """Of the tokens that a network reads."""
    tokens: Callable[[int], int]
    """How many tokens the plain form makes, by the rows of its projection."""
    processor: Callable[[Any, int], Any]
    """What attends, of the processor in whose place it does, and the attention's place."""
    has_biases: bool
    """Whether keys and values have one."""
    kinds: tuple[str, ...]
    """The forms of adapters that there are: see `ip_adapter.Kind`."""
    not_for: tuple[str, ...] = ()
    """Pipelines of the family whose models take no reference."""


def teach(reader: Reader, network: Any) -> list[str]:
    """Let a network's attentions read a reference where they are given one; their names, in the order of an adapter's layers."""
    names = list(reader.attentions(network))
    processors = {f"{name}.processor": network.attn_processors[f"{name}.processor"] for name in names}
    reading = {name: reader.processor(plain, index) for index, (name, plain) in enumerate(processors.items())}
    network.set_attn_processor({**network.attn_processors, **reading})
    return names


class _CrossAttention:
    """A UNet's cross-attention, which reads a reference where there is one."""

    def __init__(self, plain: Any, index: int) -> None:
        self.plain, self.index = plain, index

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **options: Any) -> Tensor:
        if not isinstance(encoder_hidden_states, tuple):
            output: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, **options)
            return output
        text, reading = encoder_hidden_states
        query, keys, values = (
            _heads(layer(given), attn.heads)
            for layer, given in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        found = _attended(query, keys, values) + reading.found(self.index, query)
        for layer in attn.to_out:
            found = layer(found)
        return found


class _JointAttention:
    """FLUX's attention over text and image: what the image's queries, without their places, find is added after the block."""

    def __init__(self, plain: Any, index: int) -> None:
        self.plain, self.index = plain, index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        ip_hidden_states: Reading | None = None,
    ) -> tuple[Tensor, ...]:
        if ip_hidden_states is None:
            plain: tuple[Tensor, ...] = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            return plain
        queries: list[Tensor] = []  # [B, N, heads, C / heads], as the plain processor computes them
        hook = attn.norm_q.register_forward_hook(lambda _, inputs, output: queries.append(output))
        try:
            output: tuple[Tensor, ...] = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        finally:
            hook.remove()
        return *output, ip_hidden_states.found(self.index, queries[0].transpose(1, 2))


def _heads(values: Tensor, heads: int) -> Tensor:
    """[B, N, C] as [B, heads, N, C / heads]."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attended(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[B, N, C] of heads [B, heads, N, C / heads]."""
    return nn.functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)


def _cross_attentions(unet: Any) -> list[str]:
    return [name.removesuffix(".processor") for name in unet.attn_processors if not name.endswith("attn1.processor")]


UNET_READER = Reader(
    attentions=_cross_attentions,
    number=lambda index: 1 + 2 * index,
    width=lambda unet: int(unet.get_submodule(_cross_attentions(unet)[0]).to_k.in_features),
    tokens=lambda _: 4,
    processor=_CrossAttention,
    has_biases=False,
    kinds=("plain", "plus"),
)
FLUX_READER = Reader(
    attentions=lambda transformer: [f"transformer_blocks.{index}.attn" for index in range(len(transformer.transformer_blocks))],
    number=lambda index: index,
    width=lambda transformer: int(transformer.config.joint_attention_dim),
    tokens=lambda rows: 16 if rows == 16 * 4096 else 4,  # as published, and fixed in diffusers
    processor=_JointAttention,
    has_biases=True,
    kinds=("plain",),
    not_for=("FluxFillPipeline",),
)
