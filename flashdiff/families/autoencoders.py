"""Another autoencoder than a base's own: found, checked against the base, and put in its place."""

import logging
import math
from dataclasses import replace
from pathlib import Path

from flashdiff.components import ModelSpec
from flashdiff.errors import ModelError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.codec import Decoder, Encoder, latent_factor
from flashdiff.families.loading import load_vae, read_config
from flashdiff.families.networks import find_network
from flashdiff.families.settings import AUTOENCODERS, check_network, default_settings

_log = logging.getLogger(__name__)

TINY = "tiny"
_SMALL, _LARGE = "AutoencoderTiny", "AutoencoderKL"


def find_vae(name: str) -> Path:
    """The folder of an autoencoder: a path, that of a base which has one, or owner/name[/folder][@revision] on the hub."""
    return find_network(f"--vae {name}", name, what="autoencoder", inside=("vae",))


def vae_for(name: str, family: ModelFamily, base: Path) -> Path:
    """`find_vae`; TINY names the small autoencoder that was distilled from that of the family."""
    if name != TINY:
        return find_vae(name)
    if family.small_vae is None:
        raise ModelError(f"--vae {TINY}: none is known for the family {family.name}; give a folder or a hub id")
    if read_config(base, "vae").get("_class_name") == _SMALL:
        raise ModelError(f"--vae {TINY}: the base's own is an {_SMALL} already; leave it out")
    return find_vae(family.small_vae)


def check_vae(folder: Path, family: ModelFamily, spec: ModelSpec, base: Path | None = None) -> None:
    """ModelError for an autoencoder whose latents are not those that the model was trained on.

    Where only their scale differs from that of the autoencoder of `base`, a warning; None: it is not compared.
    """
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
    own = read_config(base, "vae") if base else {}
    defaults = default_settings(_LARGE)
    for name in ("scaling_factor", "shift_factor"):
        theirs, ours = ((values.get(name, defaults[name]) or 0) for values in (config, own))
        if {config.get("_class_name"), own.get("_class_name")} == {_LARGE} and not math.isclose(theirs, ours, rel_tol=1e-3):
            _log.warning(
                "--vae %s: its %s is %g, that of %s is %g; where it was made for another model, images are noise",
                *(folder, name, theirs, spec.name, ours),
            )


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
