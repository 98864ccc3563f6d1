"""Stock diffusers pipelines of the same networks with random weights, as configurations to time."""

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.real_size.random_engine import GUIDANCE, random_weights
from benchmarks.timing.configurations import PROMPT, Configuration, whole_pipeline
from benchmarks.timing.stock_diffusers import compiles
from flashdiff.engines.bundle import Precision


def open_pipeline(base: Path, device: str, precision: Precision) -> Any:
    """The stock pipeline of a base without weights."""
    import diffusers
    from transformers import AutoTokenizer

    from flashdiff.engines.parts import DTYPES
    from flashdiff.families import load_base

    with random_weights(base, device):
        _, model = load_base(str(base))
    index = json.loads((base / "model_index.json").read_text())
    kind = getattr(diffusers, index["_class_name"])
    arguments: dict[str, Any] = {name: module.to(DTYPES[precision]) for name, module in model.weights.items()}
    arguments |= {name: AutoTokenizer.from_pretrained(base / name) for name in index if name.startswith("tokenizer")}
    arguments["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(base / "scheduler")
    parameters = inspect.signature(kind.__init__).parameters.values()
    arguments |= {one.name: None for one in parameters if one.default is one.empty and one.name not in (*arguments, "self")}
    if "requires_safety_checker" in {one.name for one in parameters}:
        arguments["requires_safety_checker"] = False
    pipeline = kind(**arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_configuration(
    pipeline: Any, model: str, precision: Precision, steps: int, batch: int, *, guided: bool
) -> Configuration:
    """The pipeline with one number of steps: guided with its own scheduler, or unguided with one for few steps."""
    import torch
    from diffusers import LCMScheduler

    scheduler = pipeline.scheduler
    if not guided and not hasattr(scheduler.config, "shift"):  # a flow model's own scheduler works with few steps too
        scheduler = LCMScheduler.from_config(scheduler.config)

    def make_images(seed: int) -> Any:
        pipeline.scheduler = scheduler
        with _default_torch_precision():
            return pipeline(
                PROMPT,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE if guided else 0.0,
                num_images_per_prompt=batch,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images

    return whole_pipeline(model, precision, steps, batch, steps * (2 if guided else 1), make_images)


def compiled_configurations(
    base: Path, device: str, precision: Precision, batch: int, report: Callable[[str], None]
) -> list[Configuration]:
    """The pipeline with a compiled denoiser; none, and a line to `report`, where compiling fails."""
    import torch

    pipeline = open_pipeline(base, device, precision)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    setattr(pipeline, part, torch.compile(getattr(pipeline, part), dynamic=False))
    configurations = [
        pipeline_configuration(pipeline, "diffusers, compiled", precision, steps, batch, guided=False) for steps in (2, 4)
    ]
    started = time.monotonic()
    if not compiles(configurations[0], report):
        return []
    report(f"diffusers compiled its denoiser in {time.monotonic() - started:.0f} s")
    return configurations


@contextmanager
def _default_torch_precision() -> Iterator[None]:
    """Undo `no_reduced_precision`, which our engine calls, for as long as stock diffusers runs."""
    import torch

    from flashdiff.engines.parts import no_reduced_precision

    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    try:
        yield
    finally:
        no_reduced_precision()
