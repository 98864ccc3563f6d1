"""What differs between model families, as one record; and a loaded model, which runs in torch.

A family names its parts as modules with flat, named tensors. Training, export and the torch reference all run these same
modules, so what is exported is what was trained.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.families.codec import Encoder
from flashdiff.families.control_kinds import ControlKind
from flashdiff.families.files import base_hash
from flashdiff.families.prints import prints_of
from flashdiff.families.readers import Reader
from flashdiff.families.settings import Fixed
from flashdiff.text import PromptTokenizer

GUIDANCE = "guidance"
"""The conditioning tensor [B] of networks that were trained to take the guidance scale as an input."""


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One kind of diffusion model. A family that needs an `if` outside this folder misses a field here."""

    name: str
    pipeline_class: str
    """`_class_name` of its model_index.json."""
    conditioning: tuple[str, ...]
    """Names of the text encoder's outputs, which are the denoiser's inputs after latents and times."""
    lora_targets: tuple[str, ...]
    """Module names (suffixes) in the denoiser that take LoRA layers."""
    slot_blocks: tuple[str, ...] = ()
    """Names of modules whose linear layers and 1x1 convolutions take LoRAs at run time, as `lora_targets` do."""
    feature_tap: Callable[[Any], nn.Module]
    """The module of the network whose output the discriminator looks at."""
    feature_blocks: Callable[[Any], Sequence[nn.Module]] = lambda _: ()
    """All blocks of the network in order, where the discriminator may look at any; their outputs are like `feature_tap`'s."""
    lora_prefix: str
    """The denoiser's name in a diffusers LoRA file."""
    fixed_size: bool = False
    """Whether an exported network works at one image size alone, because it bakes its positions in; else at any."""
    float32_inputs: tuple[str, ...] = ()
    """Conditioning that stays float32 in a network of lower precision, because the network itself mixes it with float32."""
    size_step: Callable[[dict[str, Any]], int]
    """Latent cells that sides must be multiples of, from the denoiser's config.json."""
    largest_side: Callable[[dict[str, Any]], int | None] = lambda _: None
    """Latent cells of the longest side there are positions for, from the same; None: any."""
    lora_writer: str | None = None
    """The diffusers pipeline whose `save_lora_weights` writes such a file; None: `pipeline_class` itself."""
    stock_call: Callable[[float], Mapping[str, Any]] = lambda guidance: {"guidance_scale": guidance}
    """What its diffusers pipeline is called with for a guidance scale of ours."""
    default_guidance: float
    default_steps: int
    """Of the base model, without a flash LoRA."""
    part_weights: Mapping[str, tuple[str, tuple[str, ...]]] = field(
        default_factory=lambda: {
            "text_encoder": ("text_encoder*", ("",)),
            "encoder": ("vae", ("encoder.", "quant_conv.")),
            "decoder": ("vae", ("decoder.", "post_quant_conv.")),
        }
    )
    """Where the weights of a part lie: a pattern of folders, and the first letters of the tensors' names."""
    networks: Mapping[str, str | Mapping[str, str]]
    """The folders with a network's config.json: the transformers class of an encoder's configuration, or for each diffusers class
    that it may name the one that is loaded."""
    optional: tuple[str, ...] = ()
    """Those of the networks that a base may do without, where model_index.json says `[null, null]`."""
    further_files: tuple[str, ...] = ()
    """Configuration files that are read next to those of networks, tokenizers and scheduler."""
    pipeline_settings: tuple[str, ...] = ()
    """Settings in model_index.json that `read_spec` reads."""
    fixed: Mapping[str, Fixed] = field(default_factory=dict)
    """By folder: settings that count only at some values."""
    controls: Mapping[str, ControlKind] = field(default_factory=dict)
    """The classes of diffusers' networks that its denoiser can be steered by: see `control`."""
    references: Reader | None = None
    """How its denoiser reads a reference; None: no IP-Adapter fits it. See `ip_adapter`."""
    small_vae: str | None = None
    """Hub id of the autoencoder in TAESD's form that was distilled from its own: `--vae tiny`."""
    upcasts_vae: bool = False
    """Whether its diffusers pipeline computes an autoencoder with `force_upcast` in float32 where the rest is in float16."""
    is_flow: bool = False
    """Whether its scheduler is a rectified flow's."""
    read_spec: Callable[[Path], ModelSpec]
    """The spec of a base model from its configuration files alone, sampled by its ODE."""
    load: Callable[[Path, ModelSpec], "TorchModel"]

    def weights_of(self, part: str) -> tuple[str, tuple[str, ...]]:
        """See `part_weights`; the denoiser's have a folder of their own."""
        return self.part_weights.get(part, (self.lora_prefix, ("",)))


@dataclass(frozen=True, kw_only=True)
class IpAdapter:
    """An IP-Adapter that was added to a model's denoiser: see `flashdiff.families.ip_adapter`."""

    file: Path
    encoder: Any
    """The image encoder, a model of transformers."""
    without: nn.Module
    """The denoiser as it was: it takes neither tokens nor their scale."""


@dataclass(kw_only=True)
class TorchModel:
    """A base model in torch, float32 and in eval mode. Implements `Components`; a part's module has the part's name.

    text_encoder (ids [B, T] of every tokenizer) -> conditions; denoiser (latents [B, C, h, w], times [B],
    *conditions) -> [B, C, h, w]; encoder (images [B, 3, H, W] in [-1, 1]) -> latents, and decoder back. Latents are scaled:
    about unit variance.
    """

    spec: ModelSpec
    folder: Path
    tokenizer: PromptTokenizer
    text_encoder: nn.Module
    denoiser: nn.Module
    encoder: Encoder
    decoder: nn.Module
    network: Any
    """The diffusers model inside `denoiser`: where LoRA layers go."""
    weights: Mapping[str, Any]
    """Every model that was loaded, by its folder: saving them, fused or not, makes a base directory again."""
    replaced: frozenset[str] = frozenset()
    """The networks that are not those of `folder`, by their folders there."""
    denoiser_control: nn.Module | None = None
    """The denoiser together with its control networks, where it has any."""
    controls: Mapping[str, Any] = field(default_factory=dict)
    """These networks, by name."""
    reference_encoder: nn.Module | None = None
    """Makes tokens of a reference, where the denoiser reads one."""
    ip_adapter: IpAdapter | None = None
    as_base: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Within its context the network has the weights of `folder`, where all of them are trained."""
    slotted: Mapping[str, nn.Module] = field(default_factory=dict)
    """The denoisers that take LoRAs at run time, by their parts' names."""
    max_batch: int = 8
    parallel_decode: bool = False

    @cached_property
    def base_hash(self) -> str:
        """Names the weights and configuration, wherever they lie."""
        return base_hash(self.folder)

    @cached_property
    def base_prints(self) -> dict[str, str]:
        """What names the weights apart from their precision; see `prints_of`."""
        return prints_of(self.folder)

    @property
    def conditioning(self) -> tuple[str, ...]:
        """Names of the denoiser's conditions, in the order in which it takes them."""
        return tuple(condition.name for condition in self.spec.conditions)

    def module(self, part: str) -> nn.Module:
        """The module of a part."""
        module: nn.Module = self.slotted[part] if part in self.slotted else getattr(self, part)
        return module

    def tokenize(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Token ids [B, length] of every tokenizer; see `Components.tokenize`."""
        return self.tokenizer(prompts)

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """The outputs [B, ...] of a part, by name, as float32 on the CPU wherever the model is; see `Components.call`."""
        spec, module = self.spec.part(part), self.module(part)
        place = next(module.parameters()).device
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])).to(place) for name in spec.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {name: values.float().cpu().numpy() for name, values in zip(spec.outputs, outputs, strict=True)}

    def encode_ids(self, ids: Mapping[str, NDArray[np.int64]]) -> dict[str, Tensor]:
        """The text encoder's outputs for token ids [B, T] of every tokenizer, float32 on the network's device."""
        spec = self.spec.text_part
        place = next(self.text_encoder.parameters()).device
        with torch.no_grad():
            outputs = self.text_encoder(*(torch.from_numpy(ids[name]).to(place) for name in spec.inputs))
        return {name: values.to(self.device, torch.float32) for name, values in zip(spec.outputs, outputs, strict=True)}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def guides_twice(self) -> bool:
        """Whether guidance is a second evaluation, and not an input of the network."""
        return GUIDANCE not in self.conditioning and self.spec.sampler.embedded_guidance is None

    def unconditional(self, negative_prompt: str = "") -> dict[str, Tensor] | None:
        """Conditions [1, ...] that guidance contrasts prompts with; None where the network takes guidance as an input."""
        if not self.guides_twice:
            return None
        empty = self.encode_ids(self.tokenizer([negative_prompt]))
        zeros = {
            condition.name for condition in self.spec.conditions if condition.unconditional == "zeros" and not negative_prompt
        }
        return {name: torch.zeros_like(values) if name in zeros else values for name, values in empty.items()}
