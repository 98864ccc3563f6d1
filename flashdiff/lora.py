"""LoRA folders: `pytorch_lora_weights.safetensors` in diffusers' form, and `flash.json`, which says what it was trained for.

The weights load with stock diffusers' `load_lora_weights`; alpha stands in the file's metadata, and so does flash.json, for
files that are moved without it. A LoRA that has neither is an ordinary (style) LoRA or another project's student.
"""

import json
import logging
import re
import struct
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from flashdiff.components import ModelSpec
from flashdiff.config import Record, parse_record
from flashdiff.errors import ConfigError, LoraError, first_line
from flashdiff.families import ZOO, family_of, find_base
from flashdiff.families.autoencoders import check_vae, vae_for, with_vae
from flashdiff.families.base import GUIDANCE, ModelFamily, TorchModel
from flashdiff.families.files import hash_of_all
from flashdiff.families.hub import download_lora, hub_name, name_of
from flashdiff.families.prints import shared_precision
from flashdiff.files import hash_file, hash_files, write_whole
from flashdiff.kohya import to_kohya
from flashdiff.lora_files import (
    FLASH,
    FLASH_KEY,
    KOHYA,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    SETTINGS_KEY,
    WEIGHTS,
    check_peft_settings,
    flash_file,
    peft_settings,
    weights_file,
)
from flashdiff.lora_formulas import Layer, bias_change, check_rank, decomposed, weight_change
from flashdiff.lora_kinds import DECOMPOSED, Scaling, check_layer, scaling_of
from flashdiff.lora_names import LayerNames, aliases_of, changes_text, comfyui_names
from flashdiff.lora_original_names import FUSED
from flashdiff.reading import open_file, parse_json, read_file, read_json
from flashdiff.samplers.options import SamplingOptions, sampled_as
from flashdiff.sampling import flash_student
from flashdiff.schedule import Grid

_log = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 100_000_000  # as safetensors has it
ADAPTER = "student"
"""The trained adapter's name within peft."""


class FlashInfo(Record):
    """What flash.json holds: enough to serve the student as it was trained, and to refuse another base.

    It lies with a LoRA, or in the directory of a model whose denoiser is the student.
    """

    family: str
    base: str
    base_hash: str
    base_prints: dict[str, str] = Field(default={}, max_length=10)
    """Names of the base's weights as they are when rounded to a precision; a run of an earlier flashdiff did not record them."""
    recipe_hash: str
    grid: Grid
    guidance: tuple[float, float]
    """Range of the teacher's guidance; the student itself runs without."""
    updates: int = Field(ge=0, le=2**40)
    lora_parameters: int = Field(ge=0, le=2**50)
    """0 where the student is a whole model."""
    network_parameters: int = Field(ge=0, le=2**50)
    inference: dict[str, list[int]] = Field(max_length=1000)
    """Number of steps to the exact timesteps to give a consistency (LCM) scheduler, guidance off."""


def add_adapter(
    model: TorchModel,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    name: str = ADAPTER,
    dora: bool = False,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Put a trainable LoRA into the denoiser: random A (Kaiming, as peft has it), zero B, so that it starts as the base itself.

    Its product B A is multiplied by `alpha` / `rank`. peft's "gaussian" has a deviation of 1/rank whatever the layer's width: at
    rank 4 too much for a convolution of 1152 inputs. `ranks` are those of the layers with these names, or endings of names; each
    is scaled like the others. ConfigError for targets or ranks that name no layer.
    """
    import torch
    from peft import LoraConfig

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float works and is kept
        target_modules=list(targets),
        use_dora=dora,
        rank_pattern={re.escape(key): own for key, own in ranks.items()},
        alpha_pattern={re.escape(key): alpha * own / rank for key, own in ranks.items()},
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
            warnings.filterwarnings("ignore", message="The following .*_pattern keys")  # refused below
            model.network.add_adapter(config, adapter_name=name)
    except ValueError as error:  # no such layer
        raise ConfigError(f"lora.targets: {first_line(error)}") from None
    layers = [key.split(".lora_A.")[0] for key, _ in model.network.named_parameters() if f".lora_A.{name}." in key]
    if unknown := next((key for key in ranks if not any(f".{layer}".endswith(f".{key}") for layer in layers)), None):
        raise ConfigError(f"lora.ranks: no layer that gets a LoRA is called '{unknown}', nor ends in it")
    for key, parameter in model.network.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.float()  # peft gives it the base's precision, too coarse to learn in


def save_flash_lora(folder: Path, model: TorchModel, family: ModelFamily, info: FlashInfo) -> None:
    """Write a LoRA folder into `folder`, which exists."""
    import diffusers
    from peft.utils import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model.network, adapter_name=ADAPTER)
    config = model.network.peft_config[ADAPTER].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    prefix = family.lora_prefix
    try:
        with tempfile.TemporaryDirectory() as place:
            getattr(diffusers, family.lora_writer or family.pipeline_class).save_lora_weights(
                place, **{f"{prefix}_lora_layers": weights, f"{prefix}_lora_adapter_metadata": config}
            )
            content = (Path(place) / WEIGHTS).read_bytes()
    except Exception as error:  # safetensors has its own errors for a full disk
        raise LoraError(f"{folder}: cannot write the LoRA: {first_line(error)}") from None
    note = {FLASH_KEY: info.model_dump_json()}
    whole = {f"{prefix}.{key}": value.contiguous() for key, value in weights.items()}
    kohya = safetensors.torch.save(to_kohya(whole, prefix, config["lora_alpha"] / config["r"]))
    write_whole(folder / WEIGHTS, with_ordered_header(content, **note))
    write_whole(folder / KOHYA, with_ordered_header(kohya, **note))
    write_whole(folder / FLASH, info.model_dump_json(indent=2) + "\n")


def read_flash_info(lora: Path) -> FlashInfo | None:
    """The flash.json in a folder or next to one of its files, else the one in the file's metadata; None where there is neither.

    LoraError when it cannot be read.
    """
    file = flash_file(lora)
    source = str(file)
    try:
        if file.exists():
            values = read_json(file)
        elif weights_file(lora).is_file() and (found := read_metadata(lora).get(FLASH_KEY)) is not None:
            source, values = f"{weights_file(lora)}: its metadata '{FLASH_KEY}'", parse_json(found)
        else:
            return None
        return parse_record(values, FlashInfo, source=source)
    except OSError as error:
        raise LoraError(f"{file}: cannot read: {error.strerror}") from None
    except (ValueError, ConfigError) as error:
        raise LoraError(f"{source} is damaged: {error}") from None


def read_metadata(lora: Path) -> dict[str, str]:
    """The metadata in the header of a LoRA's file; LoraError when it cannot be read."""
    return dict(_read_header(lora).get("__metadata__") or {})


def touches_text(lora: Path) -> bool:
    """Whether a LoRA changes a text encoder, by its header alone; LoraError when it cannot be read."""
    return changes_text(_read_header(lora))


def _read_header(lora: Path) -> dict[str, Any]:
    file = weights_file(lora)
    try:
        with open_file(file) as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header has {length} bytes")
            header: dict[str, Any] = parse_json(opened.read(length))
        dict(header.get("__metadata__") or {})
        return header
    except Exception as error:  # whatever a damaged header leads to
        raise LoraError(f"{file} is damaged: {first_line(error)}") from None


def find_lora(name: str) -> Path:
    """A LoRA folder or .safetensors file by its path, a folder that ships with flashdiff, or `owner/name[/file][@revision]` on
    the hub; LoraError when there is none."""
    if Path(name).suffix == ".safetensors" and Path(name).is_file():
        return Path(name)
    for folder in (Path(name), ZOO / name):
        if (folder / WEIGHTS).is_file():
            if (folder / "training").exists() and not (folder / FLASH).exists():
                raise LoraError(f"{folder} holds an unfinished training run: give `flashdiff distill` again, it goes on")
            return folder
        if (folder / PEFT_WEIGHTS).is_file():
            return folder / PEFT_WEIGHTS
        if (folder / FLASH).is_file():
            raise LoraError(f"{folder} is no LoRA but a whole model: give it in the place of the base")
    if not Path(name).exists() and (on_hub := hub_name(name)):
        return download_lora(on_hub, WEIGHTS, (FLASH, PEFT_CONFIG))
    raise LoraError(
        f"no LoRA '{name}': give a folder that holds {WEIGHTS} or {PEFT_WEIGHTS}, a .safetensors file, a hub id "
        "(owner/name[/file]), or 'avatars-flash'"
    )


def lora_name(lora: Path) -> str:
    """What a LoRA is called: its folder's or repository's name where its file has the usual one."""
    return name_of(lora.parent) if lora.name in (WEIGHTS, PEFT_WEIGHTS) else lora.name


def lora_files(lora: Path) -> list[Path]:
    """The files of a LoRA that are read."""
    return [weights_file(lora), flash_file(lora), *([lora.parent / PEFT_CONFIG] if lora.name == PEFT_WEIGHTS else [])]


def lora_hash(lora: Path) -> str:
    """Hash of the LoRA's weights, and of the file that holds their scale where peft saved them."""
    if lora.name == PEFT_WEIGHTS and (lora.parent / PEFT_CONFIG).is_file():
        return hash_files(lora.parent, [lora, lora.parent / PEFT_CONFIG])
    return hash_file(weights_file(lora))


def load_fused(
    base: str,
    loras: Sequence[tuple[Path, float]],
    sampling: SamplingOptions | None,
    *,
    variant: str | None = None,
    config: str | None = None,
    vae: str | None = None,
) -> tuple[ModelFamily, TorchModel]:
    """A base model with its LoRAs fused, each multiplied by its weight (1: as trained), sampled as `fused_spec` says.

    Bundles hold this model, and evaluations measure it. `variant` and `config` are those of `find_base`, `vae` that of
    `vae_for`. Raises what `find_base`, `vae_for`, `fused_spec` and `fuse` raise.
    """
    folder = find_base(base, variant=variant, config=config)
    family = family_of(folder)
    spec = fused_spec(family.read_spec(folder), [folder, *(lora for lora, _ in loras)], sampling or SamplingOptions())
    autoencoder = vae_for(vae, family, folder) if vae else None
    if autoencoder:
        check_vae(autoencoder, family, spec, folder)
    model = family.load(folder, spec)
    if autoencoder:
        model = with_vae(model, autoencoder)
    fuse(model, family, loras)
    for warning in check_base(folder, model.base_hash, [lora for lora, _ in loras]):
        _log.warning(warning)
    return family, model


def fused_spec(base: ModelSpec, places: Sequence[Path], sampling: SamplingOptions) -> ModelSpec:
    """The spec of what lies in `places`: the folder of the base, and its LoRAs. One of them may be a flash student, which says
    itself how it is sampled; the options are for a base without.

    LoraError or ConfigError when they do not go together.
    """
    flash: list[FlashInfo] = []
    for info in map(read_flash_info, places):
        if info and info not in flash:  # one run's file given twice is one student
            flash.append(info)
    if len(flash) > 1:
        raise LoraError(f"only one flash student can be built, {len(flash)} were given")
    if not flash:
        _check_guidance(base, sampling.guidance)
        return sampled_as(base, sampling)
    if flash[0].family != base.family:
        raise LoraError(f"the flash student is for family {flash[0].family}, the base is {base.family}")
    if flash[0].grid.num_train_timesteps != base.sampler.schedule.num_train_timesteps:
        raise LoraError(
            f"the flash student's grid has {flash[0].grid.num_train_timesteps} times, the base was trained on another number"
        )
    if sampling.guidance is not None and sampling.guidance > 1:
        raise ConfigError("--guidance is for a base without a flash student, which runs without guidance")
    for name in ("preset", "sampler", "spacing", "timesteps", "eta", "shift", "prediction"):
        if (value := getattr(sampling, name)) is not None:
            raise ConfigError(f"--{name} {value}: the flash student says itself how it is sampled; leave it out")
    sampler = flash_student(base.sampler, flash[0].grid)
    if sampling.steps is not None:
        if sampling.steps > sampler.max_steps:
            raise ConfigError(f"--steps {sampling.steps}: this student takes 1 to {sampler.max_steps}")
        sampler = sampler.model_copy(update={"default_steps": sampling.steps})
    return base.model_copy(update={"sampler": sampler})


def _check_guidance(base: ModelSpec, guidance: float | None) -> None:
    """ConfigError for guidance where the network was distilled to run without, though its family takes it as an input."""
    takes_none = GUIDANCE in {condition.name for condition in base.conditions} and base.sampler.embedded_guidance is None
    if guidance is not None and guidance > 1 and takes_none:
        raise ConfigError(f"--guidance {guidance:g}: {base.name} was distilled to run without guidance; leave it out, or give 0")


def hashes_of(base: Path, hash_of_base: str) -> set[str]:
    """The hash of a base and, where it is a flash student, that of the base that it was distilled from."""
    student = read_flash_info(base)
    return {hash_of_base, student.base_hash} if student else {hash_of_base}


def check_base(base: Path, hash_of_base: str, loras: Sequence[Path]) -> list[str]:
    """LoraError for a flash LoRA that was trained on another base; a warning for each that knew the base in another precision."""
    warnings = []
    for lora in loras:
        info = read_flash_info(lora)
        if info is None or info.base_hash == hash_of_base or info.base_hash == hash_of_all(base):
            continue
        same = shared_precision(base, info.base_prints)
        if same is None:
            raise LoraError(
                f"{lora} was trained on '{info.base}' with hash {info.base_hash[:12]}, "
                f"but {base} has hash {hash_of_base[:12]}; build it with its own base"
            )
        warnings.append(
            f"{lora} was trained on '{info.base}' in another precision: {base} has the same weights once both are rounded to "
            f"{same}, so images differ a little from those of its own base"
        )
    return warnings


def fuse(model: TorchModel, family: ModelFamily, loras: Sequence[tuple[Path, float]]) -> None:
    """Merge the LoRAs, each multiplied by its weight (1: as trained), into the denoiser and the text encoders, for good.

    LoraError when a flash LoRA was trained on another base, and for the first tensor of a file that no layer of this base takes.
    The model is unchanged where a file cannot be read, and partly changed where shapes do not fit.
    """
    check_base(model.folder, model.base_hash, [lora for lora, _ in loras])
    files = [(read_lora(lora, model, family), weight) for lora, weight in loras]
    # DoRA's norms are those of the base's own weights, whichever LoRAs were fused before.
    later = {place for file, _ in files[1:] for place, layer in file.layers.items() if any(role in layer for role in DECOMPOSED)}
    originals = {place: _weight_of(model, place).clone() for place in later}
    with torch.no_grad():
        for file, weight in files:
            for place, layer in file.layers.items():
                try:
                    _fuse_layer(model, place, layer, weight, file.scaling(*place), originals.get(place))
                except Exception as error:  # torch has many kinds for shapes that do not fit; senseless metadata has others
                    key = file.keys[place]
                    raise LoraError(f"{file.path} does not fit {model.folder}: '{key}': {first_line(error)}") from None


def _fuse_layer(
    model: TorchModel, place: tuple[str, str], layer: Layer, weight: float, scaling: Scaling, original: Tensor | None
) -> None:
    """Change one layer's weight and bias; ValueError or one of torch's errors for shapes that do not fit."""
    modules, before = _modules(model, place), _weight_of(model, place)
    change, bias = weight_change(layer, before.shape, weight, scaling), bias_change(layer, weight, scaling)
    if not all(values is None or bool(values.isfinite().all()) for values in (change, bias)):
        raise ValueError("what it adds is not finite")
    rows = [module.weight.shape[0] for module in modules]
    if bias is not None:
        if any(getattr(module, "bias", None) is None for module in modules):
            raise ValueError("the base's layer has no bias to add to")
        if bias.shape != (sum(rows),):
            raise ValueError(f"it is for a bias of {list(bias.shape)}, the base's has {[sum(rows)]}")
        for module, part in zip(modules, bias.split(rows), strict=True):
            module.bias.data += part
    if change is not None and any(role in layer for role in DECOMPOSED):
        new = decomposed(before, change, layer, before if original is None else original)
        for module, part in zip(modules, new.split(rows), strict=True):
            module.weight.data = part.clone() if len(modules) > 1 else part
    elif change is not None:
        for module, part in zip(modules, change.split(rows), strict=True):
            module.weight.data += part


def _modules(model: TorchModel, place: tuple[str, str]) -> list[Any]:
    """The layer of a place, or those whose weights are the rows of one."""
    return [model.weights[place[0]].get_submodule(name) for name in place[1].split(FUSED)]


def _weight_of(model: TorchModel, place: tuple[str, str]) -> Tensor:
    weights = [module.weight.data for module in _modules(model, place)]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA's tensors by the layers they change: (folder of the model, module)."""

    path: Path
    layers: dict[tuple[str, str], dict[str, Tensor]]
    keys: dict[tuple[str, str], str]
    """One of the names that each layer's tensors have in the file, for errors."""
    settings: dict[str, Any]
    """peft's, from the file's metadata, each with the folder before it: `unet.lora_alpha`."""

    def scaling(self, part: str, module: str) -> Scaling:
        """What the metadata says of a layer's scale; TypeError or ValueError where it makes no sense."""
        return scaling_of(self.settings, part, module)


_TEXT_PROJECTION = re.compile(r"(text_encoders?[._]|lora_te).*text_projection")
"""ComfyUI's extracted LoRAs have it of CLIPs whose pooled output no base uses."""


def read_lora(lora: Path, model: TorchModel, family: ModelFamily) -> LoraFile:
    """A LoRA's tensors, each with its place in this model; LoraError for the first that has none."""
    file = weights_file(lora)
    try:
        content = read_file(file)
        weights = _tensors(content)
        settings = parse_json(_metadata(content).get(SETTINGS_KEY, "{}")) or {}
        settings = {str(key): value for key, value in settings.items()}
    except Exception as error:  # safetensors' errors for a damaged file
        raise LoraError(f"{file} is damaged: {first_line(error)}") from None
    if not weights:
        raise LoraError(f"{file} holds no layer")
    if file.name == PEFT_WEIGHTS:
        settings = {f"{family.lora_prefix}.{key}": value for key, value in peft_settings(file.parent / PEFT_CONFIG).items()}
    check_peft_settings(file.parent / PEFT_CONFIG if file.name == PEFT_WEIGHTS else file, settings)
    parts = {name: part for name, part in model.weights.items() if name.startswith(("text_encoder", family.lora_prefix))}
    modules = {name: aliases_of(part, is_denoiser=name == family.lora_prefix) for name, part in parts.items()}
    names = LayerNames(modules, family.lora_prefix, comfyui_names(parts))
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    unused = []
    for key, value in weights.items():
        try:
            place = names.find(key, str(file))
        except LoraError:
            if not _TEXT_PROJECTION.match(key):
                raise
            unused.append(key)
            continue
        layer = layers.setdefault((place.part, place.module), {})
        if place.role in layer:
            raise LoraError(f"{file}: '{key}' and another tensor are for the same place")
        # kohya's scripts write a whole number's alpha as one.
        is_alpha = place.role == "alpha"
        if (value.numel() != 1 if is_alpha else not value.is_floating_point()) or value.dtype is torch.bool:
            raise LoraError(f"{file}: '{key}' has the type {value.dtype} and the shape {list(value.shape)}, which no LoRA has")
        layer[place.role] = value.float()
        keys.setdefault((place.part, place.module), key)
    if unused:
        _log.warning("%s: '%s' is left out: no text encoder of this base has a projection there", file, unused[0])
    if not layers:
        raise LoraError(f"{file} holds no layer that this base has")
    for at, layer in layers.items():
        if problem := check_layer(layer) or check_rank(layer):
            raise LoraError(f"{file}: '{keys[at]}': {problem}")
    return LoraFile(path=file, layers=layers, keys=keys, settings=settings)


def _tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError for a type that torch does not have."""
    try:
        return safetensors.torch.load(content)
    except KeyError as error:
        raise ValueError(f"it holds tensors of the type {error.args[0]}, which are not read") from None


# --- safetensors' header ---------------------------------------------------------------------------------------------


def with_ordered_header(content: bytes, **note: str) -> bytes:
    """A safetensors file with further metadata, all of it sorted: the library writes it in another order every time."""
    header, data = _parts(content)
    header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **note}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    return struct.pack("<Q", len(text)) + text + data


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that the library has loaded."""
    metadata: dict[str, str] = _parts(content)[0].get("__metadata__", {})
    return metadata


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return parse_json(content[8 : 8 + length]), content[8 + length :]
