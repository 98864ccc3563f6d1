"""The finished LoRA folder: weights, flash.json and a card that says how to use them."""

from pathlib import Path

from flashdiff.distill.config import Recipe
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.files import write_whole
from flashdiff.lora import FlashInfo, save_flash_lora


def publish(out: Path, model: TorchModel, family: ModelFamily, recipe: Recipe, lora_parameters: int) -> None:
    """Write the student that is in `model` now. flash.json comes last: a folder that has it is complete."""
    info = FlashInfo(
        family=family.name,
        base=recipe.base,
        base_hash=model.base_hash,
        recipe_hash=recipe.content_hash,
        grid=recipe.grid,
        guidance=recipe.guidance,
        updates=recipe.updates,
        lora_parameters=lora_parameters,
        network_parameters=sum(p.numel() for name, p in model.network.named_parameters() if ".lora_" not in name),
        inference={str(steps): recipe.grid.inference_times(steps) for steps in range(1, recipe.grid.modes + 1)},
    )
    write_whole(out / "README.md", _card(info, recipe))
    save_flash_lora(out, model, family, info)


def _card(info: FlashInfo, recipe: Recipe) -> str:
    share = 100 * info.lora_parameters / info.network_parameters
    steps = min(4, recipe.grid.modes)
    grids = "; ".join(f"{count}: {times}" for count, times in info.inference.items())
    return f"""# Flash LoRA for {info.base}

{info.lora_parameters:,} parameters, {share:.1f} % of the denoiser's {info.network_parameters:,}, trained with
Flash Diffusion's distillation loss (arXiv 2406.02347) for {info.updates:,} updates of {recipe.batch_size} samples: the
teacher takes {recipe.grid.solver_steps} solver steps with guidance {info.guidance[0]:g} to {info.guidance[1]:g}.
Recipe hash {info.recipe_hash[:12]}, base hash {info.base_hash[:12]}.

Made for 1 to {recipe.grid.modes} steps, **guidance off**, at these timesteps:
{grids}.

With flashdiff: `flashdiff build-engine {info.base} --lora THIS_FOLDER --out BUNDLE`. With diffusers:

```python
from diffusers import LCMScheduler, StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{info.base}")  # for the embedded model: the path of its directory
pipeline.load_lora_weights("THIS_FOLDER")
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
pipeline("a prompt", timesteps={info.inference[str(steps)]}, guidance_scale=0)  # the scheduler's own choice differs
```
"""
