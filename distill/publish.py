"""The finished student's folder: weights, flash.json and a card that says how to use them."""

import inspect
import statistics
from pathlib import Path

from flashdiff.distill.branches import Branches
from flashdiff.distill.comfyui import WORKFLOW, workflow
from flashdiff.distill.conditions import ImageConditions
from flashdiff.distill.config import IMAGE, MASK, Recipe
from flashdiff.distill.costs import cost
from flashdiff.distill.student import Student
from flashdiff.distill.student_kinds import kind_of
from flashdiff.errors import TrainingError, first_line
from flashdiff.families.base import GUIDANCE, ModelFamily, TorchModel
from flashdiff.families.hub import hub_name
from flashdiff.families.loading import pipeline_class_of
from flashdiff.files import write_whole
from flashdiff.lora import FlashInfo
from flashdiff.lora_files import WEIGHTS
from flashdiff.reading import parse_json, read_text
from flashdiff.schedule import FlowSchedule
from flashdiff.tasks.base import Task

_ARGUMENTS = {IMAGE: "image", MASK: "mask_image"}
"""What the pipelines of diffusers call a request's images."""
_FILES = {IMAGE: "photo.png", MASK: "mask.png"}
"""What the card calls their files."""
_LAST = 100
"""Updates over which the card averages losses."""


def publish(
    out: Path,
    model: TorchModel,
    family: ModelFamily,
    recipe: Recipe,
    student: Student,
    log: Path,
    updates: int,
    *,
    images: ImageConditions,
    branches: Branches,
) -> None:
    """Write the weights that the student has in `model` now, those after so many `updates`, with a card; the run's `log` has a
    line of JSON per update.

    `images` is what it reads of images, `branches` are those of its teacher's guidance.

    flash.json is written last: a folder that has it is complete.
    """
    is_lora = recipe.student == "lora"
    info = FlashInfo(
        family=family.name,
        base=recipe.base,
        base_hash=model.base_hash,
        base_prints=model.base_prints,
        recipe_hash=recipe.content_hash,
        grid=recipe.grid,
        guidance=recipe.guidance,
        updates=updates,
        lora_parameters=student.parameter_count if is_lora else 0,
        network_parameters=sum(p.numel() for name, p in model.network.named_parameters() if ".lora_" not in name),
        inference={str(steps): recipe.grid.inference_times(steps) for steps in range(1, recipe.grid.modes + 1)},
    )
    ran, usage = _run(recipe, log, updates, branches), _usage(info, model, family, recipe, images.task)
    write_whole(out / "README.md", _card(info, recipe, images, ran, usage))
    if is_lora and not images.wanted and (nodes := workflow(model.spec, recipe.grid.modes)):
        write_whole(out / WORKFLOW, nodes)
    kind_of(recipe).save(out, model, family, info)


def _usage(info: FlashInfo, model: TorchModel, family: ModelFamily, recipe: Recipe, task: Task) -> str:
    """How to run the student with stock diffusers, at its exact times."""
    times = info.inference[str(min(4, recipe.grid.modes))]
    is_lora = recipe.student == "lora"
    if is_lora and family.lora_writer:
        return f"{family.pipeline_class} has no LoRA loader in diffusers; `PeftAdapterMixin.load_lora_adapter` reads the file."
    scheduler, setting = "LCMScheduler", f"timesteps={times}"
    if isinstance(model.spec.sampler.schedule, FlowSchedule):
        # These sigmas are before the shift, which the scheduler applies itself.
        scheduler, setting = "FlowMatchLCMScheduler", f"sigmas={[(t + 1) / recipe.grid.num_train_timesteps for t in times]}"
    pipeline_class = pipeline_class_of(model.folder) if task.inputs else family.pipeline_class
    call, why = setting, "the scheduler's own choice of times differs"
    if not _takes(pipeline_class, setting.split("=")[0]):
        call, why = f"num_inference_steps={len(times)}", f"near {times}: its call takes no times"
    call += "".join(f", {_ARGUMENTS[name]}={name}" for name in task.inputs)
    if task.inputs and _takes(pipeline_class, "strength"):  # one of them takes 0.9999 by default, and then skips the first step
        call += ", strength=1.0"
    guidance = 3.5 if GUIDANCE in family.conditioning else 0
    where, found = f'"{info.base}"' if is_lora else '"."', ""
    if is_lora and "/" not in info.base and not Path(info.base).is_dir():  # the embedded model, whose name only flashdiff knows
        where, found = f'find_base("{info.base}")', "\nfrom flashdiff.families import find_base\n"
    loads = f'\npipeline.load_lora_weights(".", weight_name="{WEIGHTS}")' if is_lora else ""
    imported = "from diffusers.utils import load_image\n" if task.inputs else ""
    loaded = "".join(f'{name} = load_image("{_FILES[name]}")\n' for name in task.inputs)
    return f"""```python
# run it in this folder
from diffusers import {scheduler}, {pipeline_class}
{imported}{found}
pipeline = {pipeline_class}.from_pretrained({where}){loads}
pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config)
{loaded}image = pipeline("a prompt", {call}, guidance_scale={guidance}).images[0]  # {why}
image.save("image.png")
```
"""


def _takes(pipeline_class: str, argument: str) -> bool:
    """Whether the call of a class of diffusers has an argument."""
    import diffusers

    return argument in inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters


def _run(recipe: Recipe, log: Path, updates: int, branches: Branches) -> str:
    """The run's cost, and its losses before the update that is published."""
    passes = float(f"{cost(recipe, branches) * recipe.batch_size:.2g}")
    try:
        lines = [parse_json(line) for line in read_text(log).splitlines()[max(0, updates - _LAST) : updates]]
        names = dict.fromkeys(name for line in lines for name in line if name not in ("update", "loss", "skipped", "held_out"))
        means = {name: statistics.mean(line[name] for line in lines if name in line) for name in names}
        held_out = lines[-1].get("held_out")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TrainingError(f"{log} is damaged ({first_line(error)}); remove it and the last checkpoint") from None
    apart = ""
    if held_out is not None:
        apart = (
            f"\nIts mean squared distance from the teacher's solutions, on {recipe.keep_best} held-out samples: {held_out:.3g}."
        )
    ended = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in means.items())
    return (
        f"The run cost as much as {passes:,.0f} forward passes of the denoiser, the teacher's and the backward ones included. "
        f"Over its\nlast {len(lines)} updates, losses (weighted), the student's latents and its gradient: {ended}.{apart}"
    )


def _options(recipe: Recipe) -> str:
    """Those of `build-engine` for the networks that a recipe adds to its base."""
    added = [f" --control {control.name}={control.network}" for control in recipe.controls]
    if given := recipe.reference:
        added.append(f" --reference {given.adapter}" + (f" --reference-encoder {given.encoder}" if given.encoder else ""))
    return "".join(added)


def _card(info: FlashInfo, recipe: Recipe, images: ImageConditions, run: str, usage: str) -> str:
    is_lora = recipe.student == "lora"
    share = 100 * info.lora_parameters / info.network_parameters
    trained = f"All {info.network_parameters:,} parameters of the denoiser, trained with"
    if is_lora:
        of = f"{share:.1f} % of the denoiser's {info.network_parameters:,}"
        trained = f"{info.lora_parameters:,} parameters, {of}, trained with"
    modes = recipe.grid.modes
    made_for = "1 step" if modes == 1 else f"1 to {modes} steps"
    counts = ",".join(str(count) for count in sorted({modes, min(2, modes), 1}, reverse=True))
    losses = ", ".join(term.title for term in recipe.terms())
    guidance = " to ".join(f"{scale:g}" for scale in dict.fromkeys(info.guidance))
    grids = "; ".join(f"{count}: {times}" for count, times in info.inference.items())
    read = f"Of every sample, teacher and student read {images.described()}.\n" if images.wanted else ""
    if options := _options(recipe):
        usage += "\nThis runs without the networks that it was trained with; the pipelines that take them load it alike.\n"
    measured = f" --task {images.task.name}" if images.task.inputs else ""
    sources = f"{info.base} --lora THIS_FOLDER" if is_lora else "THIS_FOLDER"
    build = f"flashdiff build-engine {sources}{options} --out BUNDLE"
    further = " `kohya.safetensors` is the same LoRA for\nComfyUI and similar tools, not tried there: cfg 1, sampler lcm, "
    further += "scheduler simple, whose times are these; `comfyui.json`, where\nthere is one, is such a workflow."
    on_hub = hub_name(info.base) if not Path(info.base).exists() else None
    base_model = f"base_model: {on_hub.repository}\n" if on_hub else ""
    return f"""---
{base_model}library_name: diffusers
tags: [{images.task.name.replace("_", "-")}, {"lora, " if is_lora else ""}flash-diffusion, flashdiff]
---

# Flash {"LoRA" if is_lora else "student"} for {info.base}

{trained}
Flash Diffusion (arXiv 2406.02347; losses: {losses}) for {info.updates:,} updates of {recipe.batch_size} samples: the
teacher takes {recipe.grid.solver_steps} solver steps with guidance {guidance}.
{read}Recipe hash {info.recipe_hash[:12]}, base hash {info.base_hash[:12]}.

{run}
To measure its quality: `flashdiff evaluate BUNDLE{measured} --steps {counts} --teacher TEACHER_BUNDLE`.

Made for {made_for}, **guidance off**, at these timesteps:
{grids}.

With flashdiff: `{build}`.{further if is_lora else ""} With diffusers:

{usage}"""
