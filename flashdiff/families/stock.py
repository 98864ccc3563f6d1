"""The stock diffusers pipeline of a model, with the weights of ours, the scheduler that ours stands for, and our noise."""

import importlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from flashdiff.components import ModelSpec, Size
from flashdiff.errors import FlashdiffError, ModelError, first_line
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.noise import image_noise, low_res_noise
from flashdiff.orders import Pixels, Reference
from flashdiff.parts import LOW_RES_IMAGE
from flashdiff.reading import read_json
from flashdiff.samplers.spacing import chosen_times
from flashdiff.sampling import Sampler
from flashdiff.schedule import FlowSchedule

_NO_BOUNDARY = 1e9
"""LCM's timestep scaling at which c_skip is 0 and c_out 1: a flash student's steps."""
_NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
_INPUTS = {"image": "image", "mask": "mask_image"}
"""What pipelines call the images that a request brings."""


class NoStockPipeline(FlashdiffError):  # noqa: N818  (a finding, which the caller writes down)
    """Diffusers has nothing that samples as this model does; the message says what it lacks."""


@dataclass(frozen=True, kw_only=True)
class StockScheduler:
    """A diffusers scheduler that takes the steps of a sampler."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """That replace the base's own."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """What the pipeline is called with."""


@dataclass(frozen=True, kw_only=True)
class StockImage:
    """An image that the stock pipeline made."""

    made_by: str
    pixels: NDArray[np.float32]  # [3, H, W] in [0, 1]


def stock_image(
    family: ModelFamily,
    model: TorchModel,
    folder: Path,
    vae: Path | None = None,
    *,
    prompt: str,
    seed: int,
    steps: int,
    size: Size,
    inputs: Mapping[str, Pixels] | None = None,
    reference: Reference | None = None,
) -> StockImage:
    """An image of the stock pipeline of a model, LoRAs and IP-Adapter included, on the device of `model`.

    `inputs`: the images that the task takes for a result of `size`, for a model that was trained for one.

    The pipeline reads the base's configuration files, tokenizers and scheduler itself; the weights are those of `model`. `vae` is
    the folder of an autoencoder in the place of the base's own.
    NoStockPipeline where diffusers cannot sample so; ModelError where the pipeline fails.
    """
    from PIL import Image

    spec, inputs = model.spec, inputs or {}
    given = [condition.name for condition in spec.taken_by() if condition.part is None]
    if given and not inputs:
        raise NoStockPipeline(f"the stock pipeline of a model that takes {', '.join(given)} makes no image without")
    name = str(read_json(folder / "model_index.json")["_class_name"]) if inputs else family.pipeline_class
    scheduler = stock_scheduler(spec, steps, is_shifted=spec.sampler.schedule != family.read_spec(folder).sampler.schedule)
    noise = _noise(seed, spec.latent_shape(size))
    drawn = itertools.chain(_noise_of_image(spec, seed, size), noise)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # advice for users of diffusers' settings
        try:
            pipeline = _pipeline(name, model, folder, vae)
            config = pipeline.scheduler.config
            kind = getattr(importlib.import_module("diffusers"), scheduler.kind)
            shift = {"shift": config.flow_shift} if "flow_shift" in config else {}  # as Sana's scheduler calls it
            pipeline.scheduler = kind.from_config(config, **{**shift, **scheduler.settings})
            referred = _referred(pipeline, model, reference) if reference else {}
            pack_first, pack = _packing(pipeline)
            takes = inspect.signature(pipeline.__call__).parameters
            if unknown := [argument for argument in scheduler.call if argument not in takes]:
                raise NoStockPipeline(f"diffusers' {name} takes no {unknown[0]}")
            wanted = {
                **{"height": size.height, "width": size.width, "use_resolution_binning": False, "clean_caption": False},
                **{"strength": 1.0},  # SDXL's inpainting starts from a hint of the image
                **{"max_area": size.height * size.width, "_auto_resize": False},  # FLUX Kontext's, which has sizes of its own
                **{_INPUTS[name]: Image.fromarray(pixels) for name, pixels in inputs.items()},
            }
            with _GivenNoise(lambda: pack(next(drawn))):
                images = pipeline(
                    prompt=prompt,
                    latents=pack_first(next(noise)).to(model.device),
                    output_type="pt",
                    **family.stock_call(_guidance(spec.sampler)),
                    **{name: value for name, value in wanted.items() if name in takes},
                    **scheduler.call,
                    **referred,
                ).images
        except NoStockPipeline:
            raise
        except Exception as error:  # the pipelines raise many kinds
            raise ModelError(f"{folder}: the stock {name} makes no image: {first_line(error)}") from None
    return StockImage(made_by=f"{name} with {scheduler.kind}", pixels=images[0].float().cpu().numpy())


def stock_scheduler(spec: ModelSpec, steps: int, *, is_shifted: bool = False) -> StockScheduler:
    """The diffusers scheduler whose `steps` steps are those of a model's sampler; NoStockPipeline where there is none.

    `is_shifted`: the model's shift is not the base's own.
    """
    if spec.sampler.kind == "scm":
        middle = 1.3 if steps == 2 else None
        return StockScheduler(kind="SCMScheduler", call={"num_inference_steps": steps, "intermediate_timesteps": middle})
    if isinstance(spec.sampler.schedule, FlowSchedule):
        return _flow_scheduler(spec.sampler, spec.sampler.schedule, spec.family, steps, is_shifted=is_shifted)
    sampler, predicts = spec.sampler, {"prediction_type": spec.prediction}
    count, settings = {"num_inference_steps": steps}, dict[str, Any]()
    own = {"timesteps": list(chosen_times(sampler.timesteps, steps))} if sampler.timesteps else count
    solver = {"original_inference_steps": sampler.original_steps}
    match sampler.kind:
        case "flash":
            settings = {"timestep_scaling": _NO_BOUNDARY, "clip_sample": False, "thresholding": False}
            call: Mapping[str, Any] = {"timesteps": [int(time) for time in sampler.times(steps)]}
            return StockScheduler(kind="LCMScheduler", settings={**predicts, **settings}, call=call)
        case "ode":
            if steps > 2:
                raise NoStockPipeline("diffusers' solvers take other steps than ours after the second")
            settings = {"set_alpha_to_one": True, "timestep_spacing": "trailing", "clip_sample": False}
            return StockScheduler(kind="DDIMScheduler", settings={**predicts, **settings}, call=count)
        case "lcm":
            settings = {"timestep_scaling": sampler.timestep_scaling, "clip_sample": False, **solver}
            return StockScheduler(kind="LCMScheduler", settings={**predicts, **settings}, call=own)
        case "tcd":
            return StockScheduler(kind="TCDScheduler", settings={**predicts, **solver}, call={**own, "eta": sampler.eta})
        case "ddim":
            if sampler.timesteps:
                raise NoStockPipeline("diffusers' DDIMScheduler takes no times of a student's own")
            settings = {"timestep_spacing": sampler.spacing, "clip_sample": False}
            return StockScheduler(kind="DDIMScheduler", settings={**predicts, **settings}, call={**count, "eta": sampler.eta})
        case "euler" | "euler-ancestral":
            kind = "EulerDiscreteScheduler" if sampler.kind == "euler" else "EulerAncestralDiscreteScheduler"
            if sampler.timesteps and sampler.kind == "euler-ancestral":
                raise NoStockPipeline("diffusers' EulerAncestralDiscreteScheduler takes no times of a student's own")
            if spec.prediction == "sample" and sampler.kind == "euler-ancestral":
                raise NoStockPipeline("diffusers' EulerAncestralDiscreteScheduler takes no network that predicts the sample")
            return StockScheduler(kind=kind, settings={**predicts, "timestep_spacing": sampler.spacing}, call=own)
    raise NoStockPipeline(f"no pipeline of diffusers for this family takes the sampler {sampler.kind}")


def _flow_scheduler(sampler: Sampler, schedule: FlowSchedule, family: str, steps: int, *, is_shifted: bool) -> StockScheduler:
    """`sigmas` are those before the shift, which is the scheduler's."""
    at_all_sizes = {"use_dynamic_shifting": False, "shift": schedule.shift, "shift_terminal": None}
    settings: dict[str, Any] = at_all_sizes if is_shifted else {}
    call: dict[str, Any] = {"num_inference_steps": steps}
    if sampler.kind == "flow-euler":
        if sampler.timesteps:
            call["sigmas"] = [(time + 1) / schedule.num_train_timesteps for time in chosen_times(sampler.timesteps, steps)]
        elif sampler.spacing == "trailing":
            call["sigmas"] = [float(sigma) for sigma in np.linspace(1, 1 / steps, steps)]
        elif family != "sd3":  # SD3's pipeline leaves them to the scheduler, which takes these
            call["sigmas"] = [float(sigma) for sigma in np.linspace(1, schedule.least_sigma, steps)]
        if 0 < sampler.eta < 1:
            raise NoStockPipeline("diffusers' FlowMatchEulerDiscreteScheduler knows eta 0 and 1 alone")
        settings = {**settings, "stochastic_sampling": sampler.eta == 1}
    elif sampler.kind == "flash" and sampler.grid:
        # The grid's levels are those of the default size, whatever the size.
        settings = {"stochastic_sampling": True, **at_all_sizes}
        call["sigmas"] = [(time + 1) / schedule.num_train_timesteps for time in sampler.grid.inference_times(steps)]
    elif sampler.kind == "ode":
        if steps > 2:
            raise NoStockPipeline("diffusers' solvers take other steps than ours after the second")
        call["sigmas"] = [float(sigma) for sigma in np.linspace(1, 1 / steps, steps)]
    else:
        raise NoStockPipeline(f"no pipeline of diffusers for this family takes the sampler {sampler.kind}")
    return StockScheduler(kind="FlowMatchEulerDiscreteScheduler", settings=settings, call=call)


def _guidance(sampler: Sampler) -> float:
    return sampler.guidance if sampler.embedded_guidance is None else sampler.embedded_guidance


def _pipeline(name: str, model: TorchModel, folder: Path, vae: Path | None) -> Any:
    """The pipeline of this class as its own configuration files say, with our weights and without a second copy of them."""
    diffusers = importlib.import_module("diffusers")
    index = read_json(folder / "model_index.json")
    places = {name: folder / name for name in model.weights} | ({"vae": vae} if vae else {})
    parts = {name: _stock_part(places[name], index[name], weights) for name, weights in model.weights.items()}
    absent: dict[str, Any] = {name: None for name, kind in index.items() if kind == [None, None]}
    kind = getattr(diffusers, name)
    if "add_watermarker" in inspect.signature(kind.__init__).parameters:
        absent["add_watermarker"] = False
    pipeline = kind.from_pretrained(folder, **{**absent, **dict.fromkeys(set(_NOT_NEEDED) & set(index)), **parts})
    pipeline.set_progress_bar_config(disable=True)
    _encode_without_noise(pipeline.vae)
    return pipeline


def _referred(pipeline: Any, model: TorchModel, reference: Reference) -> dict[str, Any]:
    """The arguments of a pipeline for a reference, with the model's IP-Adapter loaded into it by diffusers itself."""
    import transformers
    from accelerate import init_empty_weights
    from PIL import Image

    adapter = model.ip_adapter
    assert adapter
    with init_empty_weights(include_buffers=False):
        encoder: Any = transformers.CLIPVisionModelWithProjection(adapter.encoder.config)
    encoder.load_state_dict(adapter.encoder.state_dict(), assign=True)
    side = adapter.encoder.config.image_size
    processor = transformers.CLIPImageProcessor(size=side, crop_size=side)
    pipeline.register_modules(image_encoder=encoder.to(model.device).eval(), feature_extractor=processor)
    pipeline.load_ip_adapter(
        adapter.file.parent, subfolder="", weight_name=adapter.file.name, image_encoder_folder=None, local_files_only=True
    )
    pipeline.set_ip_adapter_scale(reference.scale)
    return {"ip_adapter_image": Image.fromarray(reference.pixels)}


def _encode_without_noise(vae: Any) -> None:
    """Give the mean in the place of a draw, as our encoder does."""
    encode = vae.encode

    def encode_to_mean(*args: Any, **kwargs: Any) -> Any:
        encoded = encode(*args, **kwargs)
        if hasattr(encoded, "latent_dist"):
            encoded.latent_dist.sample = lambda *_, **__: encoded.latent_dist.mode()
        return encoded

    vae.encode = encode_to_mean


def _stock_part(folder: Path, kind: list[str], ours: torch.nn.Module) -> Any:
    """The class and the settings that a network's files name, around our tensors; model_index.json names the library."""
    from accelerate import init_empty_weights

    library, class_name = kind
    if library == "diffusers":
        class_name = read_json(folder / "config.json").get("_class_name", class_name)
    made_by: Any = getattr(importlib.import_module(library), class_name)
    with init_empty_weights(include_buffers=False):
        if library == "diffusers":
            part = made_by.from_config(made_by.load_config(folder))
        else:
            part = made_by(made_by.config_class.from_pretrained(folder))
    part.load_state_dict(ours.state_dict(), assign=True)
    return part.to(next(ours.parameters()).device).eval()


def _packing(pipeline: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """How a pipeline is given the first latents [B, C, h, w], and how it keeps them; FLUX does as tokens of 2x2 patches."""
    if hasattr(pipeline, "_patchify_latents"):  # FLUX.2, which packs the first ones itself
        return pipeline._patchify_latents, lambda latents: pipeline._pack_latents(pipeline._patchify_latents(latents))
    if hasattr(pipeline, "_pack_latents"):
        return (lambda latents: pipeline._pack_latents(latents, *latents.shape),) * 2
    return (lambda latents: latents,) * 2


def _noise(seed: int, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """The noise [1, C, h, w] of an image's steps, from the first on."""
    for step in range(1000):
        yield torch.from_numpy(image_noise(seed, step, shape))[None]


def _noise_of_image(spec: ModelSpec, seed: int, size: Size) -> list[torch.Tensor]:
    """What a pipeline draws before the noise of its steps: the noise [1, 3, h, w] of an image that it upscales."""
    channels = [condition.channels for condition in spec.conditions if condition.name == LOW_RES_IMAGE]
    return [torch.from_numpy(low_res_noise(seed, (count, *spec.latent_shape(size)[1:])))[None] for count in channels]


class _GivenNoise(TorchFunctionMode):
    """Within the context `torch.randn`, which schedulers draw their noise with, returns ours."""

    def __init__(self, draw: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            like = func(*args, **(kwargs or {}))
            return self._draw().to(like.device, like.dtype).reshape(like.shape)
        return func(*args, **(kwargs or {}))
