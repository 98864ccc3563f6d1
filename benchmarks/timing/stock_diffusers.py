"""Stock diffusers with the same flash LoRA, the alternative to flashdiff, as configurations to time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing.configurations import PROMPT, Configuration, whole_pipeline
from flashdiff.errors import ConfigError, first_line

_PIPELINE = "StableDiffusionPipeline"

NewConfiguration = Callable[[int, int], Configuration]
"""Makes the configuration of a number of steps and a batch."""


class StockModel(NamedTuple):
    """What stock diffusers runs: a base, and the flash LoRA to fuse into it."""

    base: str
    lora: Path


def check_stock_base(base: str) -> None:
    """ConfigError for a base that `open_stock` has no pipeline for."""
    from flashdiff.families import family_of, find_base

    if (needs := family_of(find_base(base)).pipeline_class) != _PIPELINE:
        raise ConfigError(
            f"--base {base} is for a {needs}; stock diffusers is timed with a {_PIPELINE} alone: give bundles, --student "
            "and --teacher, without --base"
        )


def open_stock(model: StockModel, *, device: str, compiled: bool) -> NewConfiguration:
    """Stock diffusers in float32, with the LoRA fused and its times, as the LoRA's model card says."""
    import torch
    from diffusers import LCMScheduler, StableDiffusionPipeline

    from flashdiff.families import find_base
    from flashdiff.lora import find_lora, read_flash_info

    folder, adapter = find_base(model.base), find_lora(str(model.lora))
    info = read_flash_info(adapter)
    if info is None:
        raise ConfigError(f"--lora {model.lora}: it has no flash.json, which lists the times to sample at")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()  # keeps the fused weights, and removes peft's layers, which slow every call down
    pipeline.to(device)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet)

    def new_configuration(steps: int, batch: int) -> Configuration:
        def make_images(seed: int) -> Any:
            return pipeline(
                PROMPT,
                timesteps=info.inference[str(steps)],
                guidance_scale=0,
                num_images_per_prompt=batch,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images

        return whole_pipeline("diffusers, compiled" if compiled else "diffusers", "fp32", steps, batch, steps, make_images)

    return new_configuration


def open_stock_variants(
    model: StockModel, *, device: str, with_compiled: bool, steps: int, report: Callable[[str], None]
) -> list[NewConfiguration]:
    """Eager and, if it is wanted and compiles, compiled stock diffusers, each after its first image."""
    eager = open_stock(model, device=device, compiled=False)
    eager(steps, 1).run_once(0)
    if not with_compiled:
        return [eager]
    compiled = open_stock(model, device=device, compiled=True)
    return [eager, compiled] if compiles(compiled(steps, 1), report) else [eager]


def compiles(configuration: Configuration, report: Callable[[str], None]) -> bool:
    """Make the first image, which compiles the denoiser. Reports why it fails, as it does without a C++ compiler."""
    try:
        configuration.run_once(0)
    except Exception as error:  # torch.compile raises many kinds
        report(f"without diffusers, compiled: {first_line(error)}")
        return False
    return True
