"""Opens bundles as the models a server serves: each warmed up, and measured on every device."""

from collections.abc import Sequence
from pathlib import Path

from flashdiff.engines.bundle import parse_manifest
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.runtime.snapshot import Snapshot
from flashdiff.errors import ConfigError
from flashdiff.server.models import Model, Models
from flashdiff.server.names import ModelIdentity


def open_models(bundles: Sequence[Path], repository: Path | None, devices: Sequence[Device] = (DEFAULT_DEVICE,)) -> Models:
    """The bundles, each under its folder's name, the first as the default; ConfigError when two have the same name.

    More can be loaded from the repository later, on the devices that live then.
    """
    names = [bundle.absolute().name for bundle in bundles]
    if len(set(names)) < len(names):
        raise ConfigError(f"two bundles have the same folder name: {', '.join(names)}")
    served = {name: open_model(bundle, devices) for name, bundle in zip(names, bundles, strict=True)}
    models = Models(
        served,
        repository,
        opener=lambda bundle: open_model(bundle, models.devices),
        identify=lambda bundle: parse_manifest(bundle)[1].bundle_hash,
        devices=devices,
    )
    return models


def open_model(bundle: Path, devices: Sequence[Device] = (DEFAULT_DEVICE,)) -> Model:
    """The bundle's engine on each device, warmed up, with its measured costs; an error of one device is the bundle's."""
    snapshot = Snapshot(bundle)  # the same bytes for all
    first, *rest = devices
    others = [_open_on(device, snapshot, bundle) for device in rest]
    model = _open_on(first, snapshot, bundle, others)
    snapshot.remove()  # every bucket is compiled
    return model


def _open_on(device: Device, snapshot: Snapshot, bundle: Path, others: Sequence[Model] = ()) -> Model:
    manifest = snapshot.manifest
    identity = ModelIdentity(
        name=bundle.resolve().name,
        bundle_hash=manifest.bundle_hash,
        family=manifest.model.family,
        backend=manifest.backend,
        precision=manifest.precision,
    )
    with device.pinned():
        engine = Engine(snapshot.folder, manifest, device=device)
        return Model(identity, engine, engine.measure_costs(), device, others)
