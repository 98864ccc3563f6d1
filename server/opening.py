"""Opens bundles as the models a server serves: each warmed up, and measured on this machine."""

from collections.abc import Sequence
from pathlib import Path

from flashdiff.engines.bundle import parse_manifest
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ConfigError
from flashdiff.server.models import Model, Models
from flashdiff.server.names import ModelIdentity


def open_models(bundles: Sequence[Path], repository: Path | None) -> Models:
    """The bundles, each under its folder's name, the first as the default; ConfigError when two have the same name.

    More can be loaded from the repository later.
    """
    names = [bundle.absolute().name for bundle in bundles]
    if len(set(names)) < len(names):
        raise ConfigError(f"two bundles have the same folder name: {', '.join(names)}")
    served = {name: open_model(bundle) for name, bundle in zip(names, bundles, strict=True)}
    return Models(served, repository, opener=open_model, identify=lambda bundle: parse_manifest(bundle)[1].bundle_hash)


def open_model(bundle: Path) -> Model:
    """The bundle's engine, warmed up, with its measured costs."""
    engine = open_bundle(bundle)
    manifest = engine.manifest
    identity = ModelIdentity(
        name=bundle.resolve().name,
        bundle_hash=manifest.bundle_hash,
        family=manifest.model.family,
        backend=manifest.backend,
        precision=manifest.precision,
    )
    return Model(identity, engine, engine.measure_costs())
