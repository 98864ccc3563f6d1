"""What one update of `flashdiff distill` takes of main memory at real size: Stable Diffusion 1.5, random weights, 512x512.

    python benchmarks/memory.py --json memory.json            # two minutes on two cores, 8 GiB of memory

The weights are random and of the public configuration, so nothing is downloaded; 4.3 GB of them are written to a
temporary folder. The command runs in a process of its own, once, with all three losses and gradient checkpointing, at
batch 1 in float32; its peak is the kernel's own count. What the parts take is their number of values; what is left over
them are activations, and whatever else was there at the peak.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import environment
from flashdiff.errors import FlashdiffError, TrainingError
from flashdiff.files import write_whole
from flashdiff.lora import FLASH

_GIB = 2**30
_LORA_COPIES = 5  # weights, gradients, average, and AdamW's two moments

# The paper's last phase. The last of four modes on a grid of four points: the teacher takes one step, which is as large as any.
_RECIPE = """
base = "{base}"
guidance = [3.0, 13.0]
batch_size = 1
learning_rate = 1e-5
gradient_checkpointing = true
data = {{ source = "{data}", images = 1 }}
grid = {{ solver_steps = 4 }}
lora = {{ rank = 128, alpha = 128 }}

[loss]
adversarial = {{ kind = "lsgan", r1_weight = 0.0 }}

[[phases]]
updates = 1
mode_weights = [0, 0, 0, 1]
adversarial = 0.3
distribution_matching = 0.7
"""


def make_sd15(folder: Path) -> dict[str, int]:
    """A diffusers directory of SD1.5's configuration with random weights; the number of parameters by part."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.device("meta"):  # shapes alone
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the rest are diffusers' defaults
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    counts = {}
    parts: tuple[tuple[str, Any, str], ...] = (
        ("unet", unet, "diffusion_pytorch_model"),
        ("vae", vae, "diffusion_pytorch_model"),
        ("text_encoder", text, "model"),
    )
    for name, model, file in parts:
        (folder / name).mkdir(parents=True)
        (model.config.save_pretrained if model is text else model.save_config)(folder / name)
        weights = {key: torch.empty(p.shape).uniform_(-0.02, 0.02) for key, p in model.named_parameters()}
        save_file(weights, folder / name / f"{file}.safetensors", metadata={"format": "pt"})
        counts[name] = sum(values.numel() for values in weights.values())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a text is 77 tokens whatever the vocabulary
    words = [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder / "tokenizer")
    scheduler: Any = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_pretrained(folder / "scheduler")
    write_whole(folder / "model_index.json", json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return counts


def run() -> dict[str, Any]:
    """{"environment": ..., "rows": [one row]}; TrainingError when the command fails."""
    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process that ends: the kernel counts what a parent has at the fork into its child's peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            counts = pool.submit(make_sd15, folder / "sd15").result()
        (folder / "images").mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)).save(folder / "images" / "0.png")
        (folder / "images" / "0.txt").write_text("noise")
        recipe = folder / "recipe.toml"
        recipe.write_text(_RECIPE.format(base=folder / "sd15", data=folder / "images"))
        libraries, _, _ = _run(folder, "avatars.toml", "--dry-run")  # a base of 16 MB: what is there are the libraries
        _, _, told = _run(folder, str(recipe), "--dry-run")
        print(told, file=sys.stderr)
        peak, seconds, _ = _run(folder, str(recipe), "--out", str(folder / "out"))
        lora = json.loads((folder / "out" / FLASH).read_text())["lora_parameters"]
    parts = {
        "weights": 4 * sum(counts.values()) / _GIB,
        "lora, gradients, average, moments": 4 * _LORA_COPIES * lora / _GIB,
        "libraries": libraries,
    }
    parts["activations and the rest"] = peak - sum(parts.values())
    row = {
        "model": "sd15, random weights",
        "backend": "torch",
        "precision": "float32",
        "size": "512x512",
        "batch": 1,
        "stage": "one update of flashdiff distill, three losses",
        "gradient_checkpointing": True,
        "parameters": {**counts, "lora": lora},
        "planned": next(line for line in told.splitlines() if line.startswith("memory")),
        "peak_gib": round(peak, 2),
        "parts_gib": {part: round(gib, 2) for part, gib in parts.items()},
        "command_s": round(seconds),
    }
    return {"environment": environment({}), "rows": [row]}


def _run(folder: Path, *arguments: str) -> tuple[float, float, str]:
    """Peak GiB, seconds and output of `flashdiff distill`, with a cache of its own."""
    started = time.monotonic()
    with open(folder / "told.txt", "w+") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "flashdiff", "distill", *arguments],
            env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
            stdout=told,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        output = told.read()
    if process.returncode:
        raise TrainingError(f"flashdiff distill {' '.join(arguments)} ended with status {process.returncode}")
    return usage.ru_maxrss * 1024 / _GIB, time.monotonic() - started, output


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the row goes")
    options = parser.parse_args(arguments)
    try:
        found = run()
    except FlashdiffError as error:
        print(f"memory: error: {error}", file=sys.stderr)
        return 1
    write_whole(options.json, json.dumps(found, indent=2) + "\n")
    print(json.dumps(found["rows"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
