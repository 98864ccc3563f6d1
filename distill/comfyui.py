"""A workflow for ComfyUI next to the LoRA, in the form of its API, which its page opens too."""

import json
from typing import Any

from flashdiff.components import ModelSpec
from flashdiff.lora_files import KOHYA

WORKFLOW = "comfyui.json"
_EMPTY_LATENTS = {"sd15": "EmptyLatentImage", "sdxl": "EmptyLatentImage", "sd3": "EmptySD3LatentImage"}
"""Families whose checkpoints ComfyUI loads whole, with the node that starts an image; others need loaders of their own."""


_STEPS = 4


def workflow(spec: ModelSpec, modes: int) -> str | None:
    """The workflow at 4 steps as JSON, for a student of so many modes; None where ComfyUI would not sample it as it was trained:
    for families that it does not load from one file, and where the times of 4 steps are not evenly spaced.

    ComfyUI's scheduler `simple` takes every 250th time of its table from the noisy end: the times that the student was
    trained for. Its sampler `lcm` is the student's, and a cfg of 1 leaves out the negative prompt.
    """
    latents = _EMPTY_LATENTS.get(spec.family)
    if latents is None or modes % _STEPS:
        return None
    size = spec.sizes[0]

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    nodes = {
        "1": node("CheckpointLoaderSimple", ckpt_name="the-base.safetensors"),
        "2": node("LoraLoaderModelOnly", model=["1", 0], lora_name=KOHYA, strength_model=1.0),
        "3": node("CLIPTextEncode", clip=["1", 1], text="a prompt"),
        "4": node("CLIPTextEncode", clip=["1", 1], text=""),
        "5": node(latents, width=size.width, height=size.height, batch_size=1),
        "6": node(
            "KSampler", model=["2", 0], positive=["3", 0], negative=["4", 0], latent_image=["5", 0], seed=0,
            steps=_STEPS, cfg=1.0, sampler_name="lcm", scheduler="simple", denoise=1.0,
        ),
        "7": node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": node("SaveImage", images=["7", 0], filename_prefix="flash"),
    }  # fmt: skip
    return json.dumps(nodes, indent=2) + "\n"
