"""Models of real size with random weights, from the public configurations, and what a command takes on them."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from flashdiff.errors import FlashdiffError
from flashdiff.files import write_whole

GIB = 2**30
_PERIOD = 1_000_003  # of the random values: a prime, so that no two rows of a weight are alike


def make_base(name: str, folder: Path) -> dict[str, int]:
    """Write the diffusers directory of a model of `NETWORKS`; the number of values by part.

    In a process that ends: the kernel counts what a parent has at the fork into its child's peak.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(write_base, name, folder, is_whole=name == "sd15").result()


def run_measured(folder: Path, *arguments: str) -> tuple[float, float, str]:
    """Peak GiB of main memory (the kernel's count), seconds and output of a `flashdiff` command, with a cache of its own in
    `folder`; FlashdiffError when it fails."""
    started = time.monotonic()
    with open(folder / "told.txt", "w+") as told:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "flashdiff", *arguments],
            env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
            stdout=told,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        output = told.read()
    if process.returncode:
        raise FlashdiffError(f"flashdiff {' '.join(arguments)} ended with status {process.returncode}")
    return usage.ru_maxrss * 1024 / GIB, time.monotonic() - started, output


def tell(measure: Callable[[], dict[str, Any]], json_file: Path) -> int:
    """Write what was measured and print its rows; the command's exit status, 1 when it failed."""
    try:
        found = measure()
    except FlashdiffError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        return 1
    write_whole(json_file, json.dumps(found, indent=2) + "\n")
    print(json.dumps(found["rows"], indent=2))
    return 0


def _unet_sd15() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the rest are diffusers' defaults


def _unet_sdxl() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _transformer_pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(sample_size=64, caption_channels=4096)  # PixArt-XL-2-512x512


def _transformer_sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )


NETWORKS: dict[str, tuple[str, Callable[[], Any]]] = {
    "sd15": ("unet", _unet_sd15),
    "sdxl": ("unet", _unet_sdxl),
    "pixart": ("transformer", _transformer_pixart),
    "sd3": ("transformer", _transformer_sd3),
}
"""Folder and network of each. SD1.5 is whole, in float32; of the others the network is the public one, in float16, and what
stands around it as small as its shapes allow."""

_PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "pixart": "PixArtAlphaPipeline",
    "sd3": "StableDiffusion3Pipeline",
}


def network_parameters(name: str) -> int:
    """Of the public network, from its shapes alone."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[name][1]().parameters())


def write_base(name: str, folder: Path, *, is_whole: bool, weights: bool = True) -> dict[str, int]:
    """`make_base`, in this process; whole means autoencoder and CLIP encoders of real size too, T5 never. Without weights it has
    configurations and vocabularies alone."""
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
    write_whole(folder / "model_index.json", json.dumps({"_class_name": _PIPELINES[name], **classes}))
    return counts


def _text_encoders(name: str, is_whole: bool) -> dict[str, Any]:
    """By folder: CLIP's two, of real width, and T5's."""
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
    """Random ones that keep the scale of what goes through: variance 1 over the inputs of a value, norms of 1, biases of 0."""
    import torch
    from safetensors.torch import save_file

    values = torch.empty(_PERIOD).uniform_(-math.sqrt(3), math.sqrt(3), generator=torch.Generator().manual_seed(0))

    def weight(name: str, shape: Sequence[int]) -> Any:
        if len(shape) < 2:
            return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)
        # Each begins elsewhere: OpenVINO keeps weights that are alike once.
        scaled = (values.roll(zlib.crc32(name.encode())) / math.sqrt(math.prod(shape[1:]))).to(dtype)
        count = math.prod(shape)
        return scaled.repeat(-(-count // _PERIOD))[:count].clone().reshape(tuple(shape))

    weights = {name: weight(name, tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(weights, file, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in weights.values())


def _clip_words() -> list[str]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a text is 77 tokens whatever the vocabulary
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
