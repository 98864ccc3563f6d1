"""The diffusers directories of models of real size, with random weights."""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.new_process import call_in_new_process
from benchmarks.real_size.networks import NETWORKS, PIPELINES
from flashdiff.files import write_whole

_PERIOD = 1_000_003  # of the random values: a prime, so that no two rows of a weight are equal


def make_base(name: str, folder: Path) -> dict[str, int]:
    """Write the directory of a model of `NETWORKS`; the number of parameters by part.

    SD1.5 is complete, in float32. Of the others, in float16, only the network is of real size, and everything else as small as
    its shapes allow. Another process writes the directory: a command's peak, as the kernel counts it, includes what its parent
    held at the fork.
    """
    return call_in_new_process(write_base, name, folder, is_whole=name == "sd15")


def write_base(name: str, folder: Path, *, is_whole: bool, weights: bool = True) -> dict[str, int]:
    """`make_base`, in this process. `is_whole` gives autoencoder and CLIP encoders their real size too; T5 is always small.

    Without weights, the directory has only configurations and vocabularies.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler

    dtype = torch.float32 if name == "sd15" else torch.float16
    part, network = NETWORKS[name]
    with torch.device("meta"):  # shapes alone
        models: dict[str, Any] = {part: network()}
        models["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512) if is_whole else (32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2 if is_whole else 1,
            latent_channels=16 if name == "sd3" else 4,
            sample_size=512,
        )
        models |= _text_encoders(name, is_whole)
    counts, classes = {}, {where: ("diffusers", type(model).__name__) for where, model in models.items()}
    for where, model in models.items():
        (folder / where).mkdir(parents=True)
        is_text = where.startswith("text_encoder")
        (model.config.save_pretrained if is_text else model.save_config)(folder / where)
        file = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        if weights:
            counts[where] = _write_weights(model, folder / where / file, dtype)
        if is_text:
            tokenizer = _t5_tokenizer() if type(model).__name__ == "T5EncoderModel" else _clip_tokenizer()
            tokenizer.save_pretrained(folder / where.replace("text_encoder", "tokenizer"))
            classes[where] = ("transformers", type(model).__name__)
            classes[where.replace("text_encoder", "tokenizer")] = ("transformers", type(tokenizer).__name__)
    scheduler: Any = (
        FlowMatchEulerDiscreteScheduler(shift=3.0)
        if name == "sd3"
        else DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )
    scheduler.save_pretrained(folder / "scheduler")
    classes["scheduler"] = ("diffusers", type(scheduler).__name__)
    write_whole(folder / "model_index.json", json.dumps({"_class_name": PIPELINES[name], **classes}))
    return counts


def _text_encoders(name: str, is_whole: bool) -> dict[str, Any]:
    """The encoders by folder: up to two of CLIP, of real width, and a T5."""
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

    encoders: dict[str, Any] = {}
    if name != "pixart":
        first: Any = CLIPTextModelWithProjection if name == "sd3" else CLIPTextModel
        encoders = {"text_encoder": first(clip(768, 12))}
    if name in ("sdxl", "sd3"):
        encoders["text_encoder_2"] = CLIPTextModelWithProjection(clip(1280, 32))
    if name in ("pixart", "sd3"):
        t5 = T5Config(vocab_size=300, d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=2)
        encoders["text_encoder" if name == "pixart" else "text_encoder_3"] = T5EncoderModel(t5)
    return encoders


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


def _t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512)
