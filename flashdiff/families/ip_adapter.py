"""IP-Adapters (arXiv 2308.06721): found, checked against a base and an image encoder, and added to the denoiser.

The adapter's own weights stay outside the network: keys and values of the image's tokens are computed for every attention that
reads them, and handed to the network, which `readers` teaches to read them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.errors import ModelError, first_line
from flashdiff.families import ZOO, all_families
from flashdiff.families.base import IpAdapter, ModelFamily, TorchModel
from flashdiff.families.files import base_hash
from flashdiff.families.hub import HubName, download_file, download_part, hub_name
from flashdiff.families.loading import load_part, pipeline_class_of, read_config
from flashdiff.families.made_for import MadeFor
from flashdiff.families.networks import Library, files_of_network, find_network, hash_of_network
from flashdiff.families.readers import Reader, Reading, teach
from flashdiff.families.settings import check_transformers_config
from flashdiff.files import hash_file
from flashdiff.references import referred, takes_reference

FILE = "ip_adapter.safetensors"
"""Of an adapter that ships with flashdiff."""
RECORD = "reference.json"
"""The file next to an adapter that says what base it was trained for; published adapters have none."""
ENCODER_FOLDER = "image_encoder"
"""Where published adapters have their image encoder."""

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on, as its image processor has them."""
_BLOCKS, _HEAD = 4, 64  # of the Resampler, likewise
_MOST_TOKENS = 1024
_FACE_FEATURES = 512  # of the face network that FaceID adapters read
LAYERS, PROJECTION, VISION = (
    ("ip_adapter.", "double_blocks."),
    ("image_proj.", "ip_adapter_proj_model."),
    ("vision_model.", "visual_projection."),
)
"""The first letters of an adapter's tensors: of keys and values, and of what makes tokens; and of an image encoder's in a file
that may hold all of CLIP."""
_NAMES = (
    (re.compile(r"^ip_adapter_proj_model\."), "image_proj."),
    (re.compile(r"^double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\."), r"ip_adapter.\1.to_\2_ip."),
)
"""XLabs' names of an adapter's tensors, and the usual ones."""
_LONGEST_REASON = 300
_LIBRARY: Library = "transformers"


@dataclass(frozen=True, kw_only=True)
class Found:
    """An IP-Adapter and its image encoder on this disk."""

    file: Path
    encoder: Path


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What an adapter is."""

    name: str
    """plain, which reads the encoder's embedding, or plus, which reads its last hidden states but one."""
    tokens: tuple[int, int]
    """The number of tokens that it makes of an image, and their width."""
    side: int
    """Pixels of each side of the images that the encoder reads."""


def find_adapter(name: str, encoder: str | None) -> Found:
    """The file of an adapter, and the folder of its image encoder.

    The adapter is a path, one that ships with flashdiff, or owner/name/file[@revision] on the hub.
    Without an `encoder` it is the folder `image_encoder` next to the file. ModelError says what is not there.
    """
    option = f"--reference {name}"
    shipped = sorted(path.parent.name for path in ZOO.glob(f"*/{FILE}"))
    if not Path(name).exists() and name in shipped:
        name = str(ZOO / name / FILE)
    if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
        raise ModelError(
            f"{option}: a pickle, which may run any program; take the .safetensors file of the same adapter, which is published "
            "next to it"
        )
    file, on_hub = Path(name), hub_name(name)
    if not file.exists() and on_hub and on_hub.file:
        file = download_file(on_hub)
    elif file.is_dir():
        raise ModelError(f"{option}: a folder; give the adapter's .safetensors file in it")
    elif not file.is_file():
        names = "".join(f"'{own}', " for own in shipped)
        raise ModelError(f"{option}: there is no such file; give a .safetensors file, {names}or owner/name/file on the hub")
    if file.suffix != ".safetensors":
        raise ModelError(f"{option}: an IP-Adapter is a .safetensors file")
    return Found(file=file, encoder=_find_encoder(option, file, None if Path(name).exists() else on_hub, encoder))


def _find_encoder(option: str, file: Path, on_hub: HubName | None, encoder: str | None) -> Path:
    if encoder is not None:
        given = f"--reference-encoder {encoder}"
        try:
            return find_network(given, encoder, what="image encoder", inside=(ENCODER_FOLDER,), library=_LIBRARY)
        except ModelError as error:
            raise error if given in str(error) else ModelError(f"{given}: {error}") from None
    folder = file.parent / ENCODER_FOLDER
    if on_hub and on_hub.file:
        inside = (*on_hub.file.split("/")[:-1], ENCODER_FOLDER)
        folder = download_part(replace(on_hub, file="/".join(inside)), ("model.safetensors",))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{option}: there is no {folder}/config.json; name the image encoder's folder with --reference-encoder")
    return find_network(option, str(folder), what="image encoder", library=_LIBRARY)


def encoder_files(folder: Path) -> list[Path]:
    """The files of an image encoder that are read."""
    return files_of_network(folder, library=_LIBRARY)


def encoder_hash(folder: Path) -> str:
    """Hash of an image encoder's weights and configuration."""
    return hash_of_network(folder, library=_LIBRARY)


def check_adapter(found: Found, family: ModelFamily, base: Path, spec: ModelSpec) -> Kind:
    """What an adapter is; ModelError for one that does not fit the base or the encoder, with both shapes or hashes."""
    option = f"--reference {found.file}"
    if not family.references:
        taking = ", ".join(other.name for other in all_families() if other.references)
        raise ModelError(f"{option}: models of the family {family.name} take no IP-Adapter; those that do: {taking}")
    reader = family.references
    if (pipeline := pipeline_class_of(base)) in reader.not_for:
        raise ModelError(f"{option}: models of the class {pipeline} take no IP-Adapter")
    encoder, network = _read_encoder(found.encoder), _without_weights(base, family)
    shapes = _shapes(found.file)
    projection = {name.removeprefix("image_proj."): shape for name, shape in shapes.items() if name.startswith("image_proj.")}
    name = _kind_of(option, shapes, projection)
    if name not in reader.kinds:
        raise ModelError(
            f"{option}: it is of the form {name}; for models of the family {family.name} {reader.kinds[0]} is supported"
        )
    width = reader.width(network)
    wanted = {
        f"ip_adapter.{reader.number(index)}.{which}.{tensor}": (
            [network.get_submodule(attention).to_k.out_features, width][:dimensions],
            spec.name,
        )
        for index, attention in enumerate(reader.attentions(network))
        for which in ("to_k_ip", "to_v_ip")
        for tensor, dimensions in (("weight", 2), ("bias", 1))[: 1 + reader.has_biases]
    }
    of_encoder = f"{found.encoder.name} (the image encoder)"
    if name == "plain":
        tokens = reader.tokens(next(iter(projection["proj.weight"]), 0))
        wanted["image_proj.proj.weight"] = [tokens * width, encoder["projection_dim"]], f"{spec.name} with {of_encoder}"
        wanted["image_proj.norm.weight"] = [width], spec.name
    else:
        tokens, inner = projection["latents"][1], projection["latents"][2]
        wanted["image_proj.proj_in.weight"] = [inner, encoder["hidden_size"]], of_encoder
        wanted["image_proj.proj_out.weight"] = [width, inner], spec.name
    for key, (shape, of) in wanted.items():
        if shapes.get(key) != shape:
            own = f"is {shapes[key]}" if key in shapes else "is not there"
            raise ModelError(
                f"{option} was made for another base or image encoder: its {key} {own}, {of} needs {shape} "
                f"(the adapter is {hash_file(found.file)[:12]}, the base {base_hash(base)[:12]}, the image encoder "
                f"{encoder_hash(found.encoder)[:12]})"
            )
    known = {key for key in wanted if key.startswith("ip_adapter.")}
    if further := sorted(key for key in shapes if key.startswith("ip_adapter.") and key not in known):
        raise ModelError(f"{option} was made for another base: {spec.name} has no layer for its {further[0]}")
    if made_for := MadeFor.read(found.file.parent / RECORD):
        made_for.check(option, f"the adapter is {hash_file(found.file)[:12]}", base, spec)
    return Kind(name=name, tokens=(tokens, width), side=encoder["image_size"])


def _shapes(file: Path) -> dict[str, list[int]]:
    """Of every tensor of a file, by its usual name."""
    import safetensors

    try:
        with safetensors.safe_open(file, "pt") as weights:
            return {_named(name): weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118  # not a mapping
    except Exception as error:  # whatever a damaged file leads to
        raise ModelError(f"--reference {file}: damaged, or no safetensors file ({first_line(error)})") from None


def _named(name: str) -> str:
    for theirs, usual in _NAMES:
        name = theirs.sub(usual, name)
    return name


def _kind_of(option: str, shapes: Mapping[str, list[int]], projection: Mapping[str, list[int]]) -> str:
    if not projection or not any(name.startswith("ip_adapter.") for name in shapes):
        example = next(iter(shapes), "no tensor")
        raise ModelError(f"{option}: no IP-Adapter: it needs tensors image_proj.* and ip_adapter.*, and has {example}")
    if "proj.weight" in projection:
        return "plain"
    if "latents" in projection and "proj_in.weight" in projection:
        query = projection.get("layers.0.0.to_q.weight", projection.get("layers.0.attn.to_q.weight", []))
        latents = projection["latents"]
        fits = len(latents) == 3 and latents[0] == 1 and 1 <= latents[1] <= _MOST_TOKENS
        blocks = {name.split(".")[1] for name in projection if name.startswith("layers.")}
        if len(blocks) != _BLOCKS:
            raise ModelError(f"{option}: its Resampler has {len(blocks)} blocks; {_BLOCKS} are supported")
        if fits and len(query) == 2 and query[0] % _HEAD == 0:
            return "plus"
        raise ModelError(
            f"{option}: its Resampler has latents {latents} and queries {query}; one set of up to {_MOST_TOKENS} latents with "
            f"heads {_HEAD} wide is supported"
        )
    raise ModelError(f"{option}: {_unsupported(projection)}; the plain form and plus (a Resampler) are supported")


def _unsupported(projection: Mapping[str, list[int]]) -> str:
    """What an adapter of another form is, by the shapes of what makes its tokens."""
    first = projection.get("proj.0.weight", [])
    if first[1:] == [_FACE_FEATURES] or any(name.startswith("perceiver_resampler.") for name in projection):
        return "it is a FaceID adapter, which reads a face network's features"
    if first:
        return (
            "it makes its tokens by several layers from the image encoder's embedding, as InstantX's adapter of FLUX and the "
            "form called full do"
        )
    return "it is of a form that is not supported"


def _read_encoder(folder: Path) -> dict[str, Any]:
    """The settings of an image encoder, alone or within CLIP, defaults filled in; ModelError for another network."""
    from transformers import CLIPConfig, CLIPVisionConfig

    config, path = read_config(folder.parent, folder.name), f"{folder}/config.json"
    if config.get("model_type") == CLIPConfig.model_type and isinstance(config.get("vision_config"), dict):
        config, path = config["vision_config"], f"{path}: vision_config"
    if config.get("model_type") != CLIPVisionConfig.model_type:
        raise ModelError(
            f"{path}: 'model_type' is {str(config.get('model_type'))!r}; an IP-Adapter's image encoder is a "
            f"CLIPVisionModelWithProjection, {CLIPVisionConfig.model_type!r}"
        )
    check_transformers_config(path, config, "CLIPVisionConfig")
    try:
        settings: dict[str, Any] = CLIPVisionConfig(**config).to_dict()
    except Exception as error:  # the library's own checks
        raise ModelError(f"{path}: {first_line(error)}") from None
    for name, most in (("projection_dim", 2**16), ("hidden_size", 2**16), ("image_size", 4096), ("patch_size", 4096)):
        if not (isinstance(settings[name], int) and 0 < settings[name] <= most):
            raise ModelError(f"{path}: '{name}' is {settings[name]!r}; it must be a whole number from 1 to {most}")
    if settings["num_channels"] != 3:
        raise ModelError(f"{path}: 'num_channels' is {settings['num_channels']!r}; images have 3")
    return settings


def _without_weights(base: Path, family: ModelFamily) -> Any:
    """A base's denoiser on no device; ModelError for one that no IP-Adapter fits."""
    import diffusers

    assert family.references
    config, path = read_config(base, family.lora_prefix), f"{base}/{family.lora_prefix}/config.json"
    if kind := config.get("encoder_hid_dim_type"):
        raise ModelError(f"{path}: 'encoder_hid_dim_type' is {kind!r}: no IP-Adapter fits it")
    with torch.device("meta"):
        network = getattr(diffusers, next(iter(family.networks[family.lora_prefix]))).from_config(config)
    if not family.references.attentions(network):
        raise ModelError(f"{path}: its blocks have no attention that an IP-Adapter adds to")
    return network


def with_adapter(family: ModelFamily, model: TorchModel, found: Found | None) -> TorchModel:
    """The model with an adapter that was checked, or with none."""
    if found is None:
        return model
    import safetensors.torch
    from transformers import CLIPVisionModelWithProjection

    assert family.references
    encoder = load_part(found.encoder.parent, found.encoder.name, CLIPVisionModelWithProjection)
    try:
        weights = {_named(name): values.float() for name, values in safetensors.torch.load_file(found.file).items()}
        layers = _Layers(family.references, model.network, weights)
        of_projection = {n.removeprefix("image_proj."): v for n, v in weights.items() if n.startswith("image_proj.")}
        projection = model.network._convert_ip_adapter_image_proj_to_diffusers(of_projection, low_cpu_mem_usage=False)
    except Exception as error:  # a tensor that is not there, or of another shape; torch lists them below a heading
        raise ModelError(f"--reference {found.file}: {' '.join(str(error).split())[:_LONGEST_REASON]}") from None
    is_plus = "latents" in of_projection
    reader = _Encoder(encoder, projection.eval().requires_grad_(False), is_plus=is_plus).eval()
    number, width = reader.empty.shape[1:]
    spec = model.spec  # a build's has it from the start
    if not takes_reference(spec):
        spec = referred(spec, (number, width), encoder.config.image_size)
    denoiser = ReadingDenoiser(model.denoiser, layers.requires_grad_(False)).eval()
    return replace(
        model,
        spec=spec,
        denoiser=denoiser,
        reference_encoder=reader,
        ip_adapter=IpAdapter(file=found.file, encoder=encoder, without=denoiser.denoiser),
    )


def _set_apart(encoder: Any) -> None:
    """Keep the first layer norm from being fused with the addition of the positions before it, by a change of shape in between.

    ONNX Runtime fuses the two for a batch of one alone, where both terms have the same shape: a row would depend on its batch.
    """
    norm, tokens = encoder.vision_model.pre_layrnorm, encoder.vision_model.embeddings.num_positions
    norm.register_forward_pre_hook(lambda _, inputs: inputs[0].flatten(0, 1))
    norm.register_forward_hook(lambda _, inputs, output: output.unflatten(0, (-1, tokens)))


def as_clip_normalizes() -> tuple[Tensor, Tensor]:
    """A factor and an offset [1, 3, 1, 1]: from images in [-1, 1] to pixels with the mean and deviation of CLIP's training."""
    mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    return 0.5 / deviation, (0.5 - mean) / deviation


class _Encoder(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] to an adapter's tokens [B, T, D], and to those of no image."""

    empty: Tensor
    factor: Tensor
    offset: Tensor

    def __init__(self, encoder: Any, projection: Any, *, is_plus: bool) -> None:
        super().__init__()
        self.encoder, self.projection, self.is_plus = encoder, projection, is_plus
        _set_apart(encoder)
        factor, offset = as_clip_normalizes()
        self.register_buffer("factor", factor)
        self.register_buffer("offset", offset)
        side = encoder.config.image_size
        with torch.no_grad():
            # As in diffusers' prepare_ip_adapter_image_embeds: for plus what the encoder makes of zeros, else zeros.
            zeros = torch.zeros(1, 3, side, side)
            features = self._features(zeros)
            self.register_buffer("empty", projection(features if is_plus else torch.zeros_like(features)))

    def _features(self, pixels: Tensor) -> Tensor:
        if self.is_plus:
            hidden: Tensor = self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
            return hidden
        embeds: Tensor = self.encoder(pixels).image_embeds
        return embeds

    def forward(self, reference_images: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [B, T, D] of the images and of none."""
        pixels = reference_images * self.factor.to(reference_images.dtype) + self.offset.to(reference_images.dtype)
        tokens = self.projection(self._features(pixels))
        return tokens, self.empty.to(tokens.dtype).expand(tokens.shape[0], -1, -1)


class _Layers(nn.Module):
    """The keys and values of an image's tokens for every attention that reads them."""

    def __init__(self, reader: Reader, network: Any, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.keys, self.values = nn.ModuleList(), nn.ModuleList()
        for index in range(len(teach(reader, network))):
            for which, layers in (("to_k_ip", self.keys), ("to_v_ip", self.values)):
                place = f"ip_adapter.{reader.number(index)}.{which}"
                values = weights[f"{place}.weight"]
                layer = nn.Linear(values.shape[1], values.shape[0], bias=reader.has_biases)
                layer.weight.data = values
                if reader.has_biases:
                    layer.bias.data = weights[f"{place}.bias"]
                layers.append(layer)

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [layer(tokens) for layer in self.keys], [layer(tokens) for layer in self.values]


class ReadingDenoiser(nn.Module):
    """A denoiser that reads the tokens of a reference next to the prompt's."""

    def __init__(self, denoiser: Any, layers: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.layers = denoiser, layers

    def forward(self, *inputs: Tensor, residuals: Mapping[str, list[Tensor]] | None = None) -> Tensor:
        """`inputs`: the denoiser's own, then tokens [B, T, D] and their scale [B]; `residuals`: of control networks."""
        *own, tokens, scale = inputs
        keys, values = self.layers(tokens)
        steering = {} if residuals is None else {"residuals": residuals}
        output: Tensor = self.denoiser(*own, **steering, reference=Reading(keys, values, scale[:, None, None]))
        return output

    def adopt(self, network: Any) -> None:
        """Of a control network: as the denoiser itself."""
        self.denoiser.adopt(network)

    def residuals_of(
        self, network: Any, latents: Tensor, times: Tensor, conditions: Sequence[Tensor], image: Tensor, scale: Tensor
    ) -> dict[str, list[Tensor]]:
        """Of a control network, to which the reference means nothing."""
        residuals: dict[str, list[Tensor]] = self.denoiser.residuals_of(network, latents, times, conditions[:-2], image, scale)
        return residuals
