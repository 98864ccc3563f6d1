"""What the families' loaders share: parts from a diffusers directory, configurations, and errors that name the part."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from flashdiff.components import MAX_SIDE, ModelSpec, Size
from flashdiff.errors import ConfigError, FlashdiffError, ModelError, first_line
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.codec import Decoder, Encoder, latent_factor
from flashdiff.families.entrance import Entrance, unet_entrances
from flashdiff.families.files import networks_of
from flashdiff.families.hub import name_of
from flashdiff.families.settings import AUTOENCODERS, check_settings
from flashdiff.parts import Condition, latent_diffusion
from flashdiff.prediction import Prediction
from flashdiff.reading import read_json
from flashdiff.samplers.recognise import recognised
from flashdiff.sampling import Sampler
from flashdiff.schedule import NoiseSchedule, Schedule
from flashdiff.tasks import tasks_for
from flashdiff.text import PromptTokenizer, TokenizerSpec

_MOST_LAYERS = 1000
_LARGEST = 2**31
"""Of any number in a configuration."""


def read_config(folder: Path, part: str, name: str = "config.json") -> dict[str, Any]:
    """A part's configuration; ModelError when it is missing, not a JSON object, or names sizes beyond all reason."""
    path = folder / part / name
    try:
        config: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a complete model directory, {part}/{name} is missing") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    for key, value in config.items():
        _check_setting(path, key, value)
    return config


def pipeline_class_of(folder: Path) -> str:
    """The pipeline class that model_index.json names."""
    return str(read_config(folder, ".", "model_index.json").get("_class_name"))


def _check_setting(path: Path, key: str, value: Any) -> None:
    """The libraries would try for hours to make a network of a billion layers."""
    if isinstance(value, list):
        if len(value) > _MOST_LAYERS:
            raise ModelError(f"{path}: '{key}' has {len(value)} items, more than {_MOST_LAYERS}")
        for item in value:
            _check_setting(path, key, item)
    elif isinstance(value, int) and abs(value) > (limit := _MOST_LAYERS if "layers" in key else _LARGEST):
        raise ModelError(f"{path}: '{key}' is larger than {limit}")


def explain_bad_settings(read: Callable[[Path], ModelSpec]) -> Callable[[Path], ModelSpec]:
    """Make a `read_spec` raise a ModelError that names the setting which is missing or has a wrong value."""

    @functools.wraps(read)
    def checked(folder: Path) -> ModelSpec:
        try:
            return read(folder)
        except FlashdiffError:
            raise
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise ModelError(f"{folder}: a configuration file misstates {where}: {problem['msg']}") from None
        except Exception as error:  # a missing key, a text for a number, a division by zero: whatever the files say
            raise ModelError(f"{folder}: a configuration file lacks or misstates {first_line(error)}") from None

    return checked


def spec_of(
    folder: Path,
    family: ModelFamily,
    *,
    prediction: Prediction,
    schedule: Schedule,
    network_channels: int,
    latent_side: int,
    tokenizers: tuple[TokenizerSpec, ...],
    unconditional: Literal["empty_prompt", "zeros"] = "empty_prompt",
    sampling: Mapping[str, Any] | None = None,
    entrances: Sequence[Entrance] = ((),),
) -> ModelSpec:
    """The spec of a base model, sampled by its ODE with the family's guidance and steps, but for the fields in `sampling`.

    ModelError when none of these entrances makes the autoencoder's latents as wide as the network's, of `network_channels`.
    """
    vae = read_config(folder, "vae")
    factor, channels = latent_factor(vae), vae["latent_channels"] if "latent_channels" in vae else vae["z_dim"]
    conditions = [Condition(name=name, part="text_encoder", unconditional=unconditional) for name in family.conditioning]
    by_width = {channels + sum(c.channels for c in entrance if c.enters == "concat"): entrance for entrance in entrances}
    entrance = by_width.get(network_channels)
    if entrance is None:
        known = " or ".join(map(str, by_width))
        raise ModelError(
            f"{folder}: the {family.lora_prefix} takes {network_channels} channels, the autoencoder's latents have {channels}; "
            f"of this pipeline class the family {family.name} runs networks that take {known}"
        )
    index = read_config(folder, ".", "model_index.json")
    there = networks_of(index, family)
    absent = [part for part in family.networks if part not in (*there, *family.optional)]
    if absent:
        raise ModelError(f"{folder}: model_index.json names no {absent[0]}, which a {family.pipeline_class} needs")
    configs = {part: read_config(folder, part) for part in there}
    check_settings(folder, family, {**configs, "scheduler": scheduler_config(folder), ".": index})
    return ModelSpec(
        name=name_of(folder),
        family=family.name,
        prediction=prediction,
        sampler=Sampler.model_validate(
            {
                "kind": "ode",
                "schedule": schedule,
                "guidance": family.default_guidance,
                "default_steps": family.default_steps,
                **(sampling or {}),
            }
        ),
        latent_channels=channels,
        latent_factor=factor,
        sizes=(Size(latent_side * factor, latent_side * factor),),
        tokenizers=tokenizers,
        parts=latent_diffusion(
            [tokenizer.name for tokenizer in tokenizers], family.conditioning, *(name for c in entrance for name in c.tensors)
        ),
        conditions=(*conditions, *entrance),
        tasks=tasks_for(entrance),
    )


def unet_spec(
    folder: Path,
    family: ModelFamily,
    tokenizers: tuple[TokenizerSpec, ...],
    *,
    guidance: float | None = None,
    entrances: Sequence[Entrance] | None = None,
    **settings: Any,
) -> ModelSpec:
    """`spec_of` a Stable Diffusion 1.x or XL: its scheduler says what the UNet predicts, and sometimes how it is sampled.

    `guidance` is the scale that a UNet with a guidance input receives; None: the family's default. `entrances` are those of its
    pipeline class where nothing else is given. ModelError or ConfigError for a scheduler that flashdiff cannot follow.
    """
    source = f"{folder}/scheduler"
    unet, scheduler = read_config(folder, "unet"), scheduler_config(folder)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{folder}: prediction_type '{prediction}' is not supported; epsilon, v_prediction and sample are")
    if prediction == "epsilon" and scheduler.get("rescale_betas_zero_snr"):
        raise ConfigError(
            f"{source}: rescale_betas_zero_snr is not supported with prediction_type epsilon: its first step would divide by 0; "
            "set the one to false, or the other to what the UNet was trained on"
        )
    sampling = recognised(scheduler, source)
    if unet.get("time_cond_proj_dim"):
        sampling |= {"embedded_guidance": guidance or family.default_guidance, "guidance": 1.0}
    return spec_of(
        folder,
        family,
        prediction=prediction,
        schedule=NoiseSchedule.from_scheduler_config(scheduler, source=source),
        network_channels=unet["in_channels"],
        latent_side=unet["sample_size"],
        tokenizers=tokenizers,
        sampling=sampling,
        entrances=entrances or unet_entrances(pipeline_class_of(folder), read_config(folder, "vae")["latent_channels"]),
        **settings,
    )


def unet_size_step(unet: dict[str, Any]) -> int:
    """Latent cells that a side must be a multiple of for every level of a UNet to halve it exactly."""
    step: int = 2 ** (len(unet["block_out_channels"]) - 1)
    return step


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's settings of a diffusers folder; refuses what `read_config` refuses."""
    return read_config(folder, "scheduler", "scheduler_config.json")


def size_limits(folder: Path, family: ModelFamily) -> tuple[int, int | None]:
    """Latent cells that sides must be multiples of, and those of the longest side (None: any); see `ModelFamily`."""
    denoiser = read_config(folder, family.lora_prefix)
    try:
        step, largest = family.size_step(denoiser), family.largest_side(denoiser)
        if not (isinstance(step, int) and 1 <= step <= MAX_SIDE):
            raise ValueError("what sides must be multiples of")
        return step, largest
    except Exception as error:  # as in `explain_bad_settings`
        raise ModelError(f"{folder}/{family.lora_prefix}/config.json lacks or misstates {first_line(error)}") from None


def load_part(folder: Path, part: str, kind: Any) -> Any:
    """A model of class `kind` in float32, frozen and in eval mode, from safetensors and never from pickles.

    ModelError when it cannot be loaded whole.
    """
    import diffusers

    read_config(folder, part)
    try:
        model, info = kind.from_pretrained(
            folder / part, torch_dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    except Exception as error:  # the loaders raise many kinds for a missing or damaged file
        raise ModelError(f"{folder}: cannot load {part}: {first_line(error)}") from None
    if info["missing_keys"]:  # the loaders would make them up
        raise ModelError(f"{folder}: {part} lacks weights, {sorted(info['missing_keys'])[0]} among them")
    # A text encoder's file may hold what its pipeline leaves out, such as a language model's head.
    if (further := info["unexpected_keys"]) and issubclass(kind, diffusers.ModelMixin):
        raise ModelError(
            f"{folder}: {part} has no layer for some of its weights, {sorted(further)[0]} among them: its config.json describes "
            "another network"
        )
    return model.eval().requires_grad_(False)


def load_vae(folder: Path, part: str = "vae") -> Any:
    """The autoencoder of a base, or of a folder `part` of its own, of the class that its configuration names."""
    import diffusers

    written = read_config(folder, part).get("_class_name", "AutoencoderKL")
    if written not in AUTOENCODERS:
        raise ModelError(f"{folder}/{part}: the autoencoder is a {written}; supported: {', '.join(AUTOENCODERS)}")
    return load_part(folder, part, getattr(diffusers, AUTOENCODERS[written]))


def tokenizer_spec(folder: Path, part: str, name: str, length: int | None = None, **settings: Any) -> TokenizerSpec:
    """From a tokenizer's configuration: `length` overrides its own, as pipelines do for T5; `settings` are those of the spec."""
    from transformers import AutoTokenizer

    tokenizer = _tokenizer(folder, part, AutoTokenizer)
    # Where there is an instruction or a chat's template around the prompt, the pipeline sets the side or masks the padding.
    if "before" not in settings and tokenizer.padding_side != "right":
        raise ModelError(f"{folder}/{part}: 'padding_side' is '{tokenizer.padding_side}'; flashdiff pads on the right")
    length = length or tokenizer.model_max_length
    return TokenizerSpec(name=name, length=length, pad_id=tokenizer.pad_token_id, **settings)


def torch_model(
    folder: Path,
    spec: ModelSpec,
    *,
    text_encoder: nn.Module,
    denoiser: nn.Module,
    network: Any,
    weights: Mapping[str, Any],
    encoder: Encoder | None = None,
    decoder: nn.Module | None = None,
    tokenizer: PromptTokenizer | None = None,
) -> TorchModel:
    """The model of these modules; the usual codec and the base's tokenizers where none are given."""
    return TorchModel(
        spec=spec,
        folder=folder,
        tokenizer=tokenizer or load_tokenizers(folder, spec.tokenizers),
        text_encoder=text_encoder.eval(),
        denoiser=denoiser.eval(),
        encoder=(encoder or Encoder(weights["vae"])).eval(),
        decoder=(decoder or Decoder(weights["vae"])).eval(),
        network=network,
        weights=weights,
    )


def load_tokenizers(folder: Path, specs: tuple[TokenizerSpec, ...]) -> PromptTokenizer:
    """The tokenizers of a model: `input_ids_2` come from the folder `tokenizer_2`."""
    from transformers import AutoTokenizer

    texts = {}
    for spec in specs:
        part = spec.name.replace("input_ids", "tokenizer")
        found = _tokenizer(folder, part, AutoTokenizer)
        try:
            texts[spec.name] = found.backend_tokenizer.to_str()
        except Exception as error:  # a tokenizer of another kind than the library `tokenizers` runs
            raise ModelError(f"{folder}: {part} cannot be used: {first_line(error)}") from None
    return PromptTokenizer(texts, specs)


def _tokenizer(folder: Path, part: str, kind: Any) -> Any:
    # transformers makes a vocabulary up where it finds none.
    if not any(path for pattern in ("tokenizer.json", "vocab.json", "*.model") for path in (folder / part).glob(pattern)):
        raise ModelError(f"{folder}: {part} holds no vocabulary (tokenizer.json, vocab.json or spiece.model)")
    for path in (folder / part).iterdir():
        if not path.is_file() and not (path.is_dir() and not path.suffix):  # reading a pipe may never end
            raise ModelError(f"{path}: a folder, a pipe, a device or a broken link, where a file is needed")
    try:
        return kind.from_pretrained(folder / part)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as above; a panic of the Rust library is not even an Exception
        raise ModelError(f"{folder}: cannot load {part}: {first_line(error)}") from None
