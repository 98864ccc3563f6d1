"""Defaults and choices that the command line's help shows and the records of options hold: plain values, cheap to import."""

from typing import Final

# --- build-engine ---
PRECISIONS: Final = ("fp32", "fp16", "bf16", "int8", "fp8", "auto")
"""Those that a build may be asked for; `auto` chooses among those of the machine."""
PRECISION: Final = "fp32"
BATCH_SIZES: Final = (1, 2, 4, 8)
LORA_RANK: Final = 16
"""Of LoRA slots."""
MAX_LORA_SLOTS: Final = 8
MAX_LORA_RANK: Final = 256

# --- how a model is sampled ---
SAMPLERS: Final = ("ode", "lcm", "euler", "euler-ancestral", "ddim", "tcd", "flow-euler", "scm")
"""Those that a family of ours can use."""
SPACINGS: Final = ("leading", "linspace", "trailing")
PREDICTIONS: Final = ("epsilon", "v_prediction", "sample")

# --- serve ---
HOST: Final = "127.0.0.1"
"""Of the server and of its metrics."""
PORT: Final = 50051
DRAIN_S: Final = 30.0
"""How long accepted requests may take after SIGTERM."""
LOG_FORMATS: Final = ("text", "json")

# --- evaluate ---
PROMPTS: Final = "avatars"
PROMPT_COUNT: Final = 500
IMAGES_PER_PROMPT: Final = 2
REFERENCE: Final = "avatars"
REFERENCE_COUNT: Final = 5000
TEACHER_STEPS: Final = (50,)

# --- a request ---
IMAGE_FORMATS: Final = ("png", "jpeg", "webp", "raw")
SEED: Final = 0
COUNT: Final = 1
STRENGTH: Final = 0.8
"""Of a request with an image, as in diffusers' Stable Diffusion pipeline."""
UPSCALE_STRENGTH: Final = 0.3
"""Of a request that enlarges its image: what is added is detail, and the image remains."""
IMAGE_GUIDANCE: Final = 1.5
"""Of an edit, as in diffusers' InstructPix2Pix pipelines."""
NOISE_LEVEL: Final = 20
"""Of an image to upscale, as in diffusers' StableDiffusionUpscalePipeline."""
MAX_NOISE_LEVEL: Final = 350
"""Where a model says nothing else, as in the same pipeline."""
CONTROL_SCALE: Final = 1.0
"""Of a control in a request."""
REFERENCE_SCALE: Final = 1.0
"""Of a reference in a request, as in diffusers' IP-Adapters."""
MAX_LORA_SCALE: Final = 10.0
"""Of a LoRA in a request, either way: it may be subtracted."""
LORA_SCALE: Final = 1.0
"""Of a LoRA in a request."""
