"""The diffusers directories of models of real size, with random weights."""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.new_process import call_in_new_process
from benchmarks.real_size.networks import NETWORKS
from flashdiff.files import write_whole

_BYTE_WORDS = 300  # the vocabulary of language models, whose tokens are bytes
_PERIOD = 1_000_003  # of the random values: a prime, so that no two rows of a weight are equal


def make_base(name: str, folder: Path, *, is_cut: bool = False) -> dict[str, int]:
    """Write the directory of a model of `NETWORKS`; the number of parameters by part.

    SD1.5 is complete, in float32. Of the others, in float16, only the network is of real size, and everything else as small as
    its shapes allow. `is_cut`: in float32, only the network's width is real, and it has few layers. Another process writes the
    directory: a command's peak, as the kernel counts it, includes what its parent held at the fork.
    """
    return call_in_new_process(write_base, name, folder, is_whole=name == "sd15" and not is_cut, is_cut=is_cut)


def write_base(name: str, folder: Path, *, is_whole: bool, is_cut: bool = False, weights: bool = True) -> dict[str, int]:
    """`make_base`, in this process. `is_whole` gives autoencoder and CLIP encoders their real size too; others are always small.

    Without weights, the directory has only configurations and vocabularies.
    """
    import torch
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    network = NETWORKS[name]
    dtype = torch.float32 if name == "sd15" or is_cut else torch.float16
    with torch.device("meta"):  # shapes alone
        models: dict[str, Any] = {network.folder: network.make(is_cut=is_cut), "vae": _autoencoder(network.family, is_whole)}
        models |= _text_encoders(network.family, models[network.folder].config, is_whole)
    counts, classes = {}, {where: ("diffusers", type(model).__name__) for where, model in models.items()}
    for where, model in models.items():
        (folder / where).mkdir(parents=True)
        is_text = where.startswith("text_encoder")
        (model.config.save_pretrained if is_text else model.save_config)(folder / where)
        file = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        if weights:
            counts[where] = _write_weights(model, folder / where / file, dtype)
        if is_text:
            tokenizer = _clip_tokenizer() if type(model).__name__.startswith("CLIP") else _byte_tokenizer()
            tokenizer.save_pretrained(folder / where.replace("text_encoder", "tokenizer"))
            classes[where] = ("transformers", type(model).__name__)
            classes[where.replace("text_encoder", "tokenizer")] = ("transformers", type(tokenizer).__name__)
    scheduler: Any = (
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
        if network.family in ("sd15", "sdxl", "pixart", "pixart_sigma")
        else FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    scheduler.save_pretrained(folder / "scheduler")
    classes["scheduler"] = ("diffusers", type(scheduler).__name__)
    write_whole(folder / "model_index.json", json.dumps({"_class_name": network.pipeline, **classes}))
    return counts


def _autoencoder(family: str, is_whole: bool) -> Any:
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage

    if family in ("sana", "sana_sprint"):
        levels: dict[str, Any] = {
            f"{side}_{setting}": value
            for side in ("encoder", "decoder")
            for setting, value in (
                ("block_types", ("ResBlock",) * 6),
                ("block_out_channels", (8,) * 6),
                ("layers_per_block", (1,) * 6),
                ("qkv_multiscales", ((),) * 6),
            )
        }
        return AutoencoderDC(latent_channels=32, **levels)
    if family == "qwen_image":
        return AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 512}
    if family == "flux2_klein":
        return AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=32, **levels)
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512) if is_whole else (32, 32, 32, 32),
        layers_per_block=2 if is_whole else 1,
        latent_channels=16 if family in ("sd3", "flux", "z_image") else 4,
        **levels,
    )


def _text_encoders(family: str, network: Any, is_whole: bool) -> dict[str, Any]:
    """The encoders by folder, as wide as the network's configuration asks for: up to two of CLIP, a language model or none."""
    import transformers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    def clip(width: int, layers: int) -> Any:
        words = len(_clip_words())
        return CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width if is_whole else 64,
            num_attention_heads=width // 64,
            num_hidden_layers=layers if is_whole else 2,
            projection_dim=width,
            hidden_act="quick_gelu" if width == 768 else "gelu",
            vocab_size=49408 if is_whole else words,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
        )

    def small(width: int, layers: int) -> dict[str, Any]:
        """The settings that the language models share."""
        return {
            "vocab_size": _BYTE_WORDS, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 64,
            "num_attention_heads": 2, "num_key_value_heads": 1,
        }  # fmt: skip

    t5 = T5Config(vocab_size=_BYTE_WORDS, d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=2)
    match family:
        case "sd15":
            return {"text_encoder": CLIPTextModel(clip(network.cross_attention_dim, 12))}
        case "sdxl":
            second = CLIPTextModelWithProjection(clip(1280, 32))
            return {"text_encoder": CLIPTextModel(clip(768, 12)), "text_encoder_2": second}
        case "sd3":
            first, second = (CLIPTextModelWithProjection(clip(width, layers)) for width, layers in ((768, 12), (1280, 32)))
            return {"text_encoder": first, "text_encoder_2": second, "text_encoder_3": T5EncoderModel(t5)}
        case "flux":
            return {"text_encoder": CLIPTextModel(clip(768, 12)), "text_encoder_2": T5EncoderModel(t5)}
        case "pixart" | "pixart_sigma":
            return {"text_encoder": T5EncoderModel(t5)}
        case "z_image":
            config: Any = transformers.Qwen3Config(**small(network.cap_feat_dim, 2), head_dim=64)
            return {"text_encoder": transformers.Qwen3Model(config)}
        case "flux2_klein":  # three of the layers are read, the last of them is the 27th
            config = transformers.Qwen3Config(**small(network.joint_attention_dim // 3, 28), head_dim=64)
            return {"text_encoder": transformers.Qwen3ForCausalLM(config)}
        case "sana" | "sana_sprint":
            config = transformers.Gemma2Config(**small(network.caption_channels, 1), head_dim=64)
            return {"text_encoder": transformers.Gemma2Model(config)}
        case "qwen_image":
            width = network.joint_attention_dim
            vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
            rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [width // 16, width // 16, width // 8]}
            text = {**small(width, 1), "rope_parameters": rope}
            config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
            return {"text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config)}
    raise ValueError(family)


def _write_weights(model: Any, file: Path, dtype: Any) -> int:
    """Write random weights that keep the scale of activations (variance 1 / inputs, norms 1, biases 0); their number."""
    import torch
    from safetensors.torch import save_file

    values = torch.empty(_PERIOD).uniform_(-math.sqrt(3), math.sqrt(3), generator=torch.Generator().manual_seed(0))

    def weight(name: str, shape: Sequence[int]) -> Any:
        if len(shape) < 2:
            return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)
        # Each starts at another value: OpenVINO stores equal weights once.
        scaled = (values.roll(zlib.crc32(name.encode())) / math.sqrt(math.prod(shape[1:]))).to(dtype)
        count = math.prod(shape)
        return scaled.repeat(-(-count // _PERIOD))[:count].clone().reshape(tuple(shape))

    weights = {name: weight(name, tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(weights, file, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in weights.values())


def _clip_words() -> list[str]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the vocabulary does not matter: a text is always 77 tokens
    return [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab={word: index for index, word in enumerate(_clip_words())}, merges=[], model_max_length=77)


def _byte_tokenizer() -> Any:
    """For language models of every kind: a token a byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512)
