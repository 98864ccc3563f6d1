"""Another autoencoder than a base's own: found, checked against the base, and put in its place."""

from dataclasses import replace
from pathlib import Path

from flashdiff.components import ModelSpec
from flashdiff.errors import ModelError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.codec import Decoder, Encoder, latent_factor
from flashdiff.families.files import network_files
from flashdiff.families.hub import download_part, hub_name, name_of
from flashdiff.families.loading import load_vae, read_config
from flashdiff.families.settings import AUTOENCODERS, check_network
from flashdiff.families.views import view
from flashdiff.files import hash_files

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def find_vae(name: str) -> Path:
    """The folder of an autoencoder: a path, that of a base which has one, or owner/name[/folder][@revision] on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        on_hub = hub_name(name)
        if on_hub is None:
            raise ModelError(f"--vae {name}: there is no such folder; give one with a config.json, or a hub id (owner/name)")
        folder = download_part(on_hub, (_WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"))
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise ModelError(f"--vae {name}: it holds no autoencoder of diffusers: there is no config.json")
    files = network_files(folder)
    if all(plain == own for plain, own in files.items()):
        return folder
    return view(name_of(folder), {plain: folder / own for plain, own in files.items()})


def check_vae(folder: Path, family: ModelFamily, spec: ModelSpec) -> None:
    """ModelError for an autoencoder whose latents are not those that the base's network was trained on."""
    if family.networks["vae"] is not AUTOENCODERS:
        raise ModelError(f"--vae {folder}: a model of the family {family.name} runs with its own autoencoder alone")
    config = read_config(folder.parent, folder.name)
    check_network(f"{folder}/config.json", family, "vae", config)
    try:
        channels, factor = config["latent_channels"], latent_factor(config)
    except (KeyError, TypeError):
        raise ModelError(f"{folder}/config.json lacks or misstates latent_channels or its levels") from None
    if (channels, factor) != (spec.latent_channels, spec.latent_factor):
        raise ModelError(
            f"--vae {folder}: its latents have {channels} channels and {factor} pixels a cell, those of {spec.name} have "
            f"{spec.latent_channels} and {spec.latent_factor}; give an autoencoder that was made for this model"
        )


def vae_files(folder: Path) -> list[Path]:
    """The files of an autoencoder that are read."""
    return [folder / file for file in network_files(folder).values()]


def vae_hash(folder: Path) -> str:
    """Hash of an autoencoder's weights and configuration."""
    return hash_files(folder, vae_files(folder))


def with_vae(model: TorchModel, folder: Path) -> TorchModel:
    """The model with this autoencoder in the place of its own."""
    vae = load_vae(folder.parent, folder.name)
    return replace(
        model,
        encoder=Encoder(vae).eval(),
        decoder=Decoder(vae).eval(),
        weights={**model.weights, "vae": vae},
        replaced=model.replaced | {"vae"},
    )
