"""Opens bundles as the models a server serves: each warmed up, and measured on every device."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashdiff.components import Costs
from flashdiff.engines.bundle import Manifest, parse_manifest
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.runtime.snapshot import Snapshot
from flashdiff.errors import BundleError, ConfigError
from flashdiff.server.loras import LoraFolder
from flashdiff.server.models import Model, Models
from flashdiff.server.names import ModelIdentity

_LINE_EVERY_S = 3.0
_HASH = re.compile("[0-9a-f]{12,64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpectedBundles:
    """The hashes that bundles may have, each whole or from its start; ConfigError for what is no such hash. None: any."""

    hashes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in self.hashes:
            if not _HASH.fullmatch(text):
                raise ConfigError(
                    f"--expect-bundle {text}: give 12 to 64 digits of a bundle's hash, as `flashdiff inspect` shows it"
                )

    def check(self, bundle: Path) -> None:
        """BundleError for a bundle of another hash."""
        if self.hashes:
            self.check_hash(bundle, parse_manifest(bundle)[1].bundle_hash)

    def check_hash(self, bundle: Path, found: str) -> None:
        """BundleError when the bundle has been found to have another hash."""
        if self.hashes and not found.startswith(self.hashes):
            raise BundleError(f"{bundle} has the hash {found}, and --expect-bundle allows {', '.join(self.hashes)} alone")


def open_models(
    bundles: Sequence[Path],
    repository: Path | None,
    devices: Sequence[Device] = (DEFAULT_DEVICE,),
    expected: ExpectedBundles | None = None,
    loras: LoraFolder | None = None,
) -> Models:
    """The bundles, each under its folder's name, the first as the default; ConfigError when two have the same name.

    More can be loaded from the repository later, on the devices that live then. BundleError for one that is not expected.
    """

    def open_expected(bundle: Path, devices: Sequence[Device]) -> Model:
        if expected:
            expected.check(bundle)  # before minutes of compiling
        model = open_model(bundle, devices)
        if expected:
            expected.check_hash(bundle, model.identity.bundle_hash)  # the folder may have been replaced meanwhile
        return model

    names = [bundle.absolute().name for bundle in bundles]
    if len(set(names)) < len(names):
        raise ConfigError(f"two bundles have the same folder name: {', '.join(names)}")
    served = {name: open_expected(bundle, devices) for name, bundle in zip(names, bundles, strict=True)}
    models = Models(
        served,
        repository,
        opener=lambda bundle: open_expected(bundle, models.devices),
        identify=lambda bundle: parse_manifest(bundle)[1].bundle_hash,
        devices=devices,
        loras=loras,
    )
    return models


def open_model(bundle: Path, devices: Sequence[Device] = (DEFAULT_DEVICE,)) -> Model:
    """The bundle's engine on each device, warmed up, with its measured costs; an error of one device is the bundle's.

    The log says how far it is.
    """
    _log.info("opening %s", bundle)
    snapshot = Snapshot(bundle)  # the same bytes for all
    first, *rest = devices
    others = [_open_on(device, snapshot, bundle) for device in rest]
    model = _open_on(first, snapshot, bundle, others)
    snapshot.remove()  # every bucket is compiled
    return model


def identity_of(bundle: Path, manifest: Manifest) -> ModelIdentity:
    """How an opened bundle is named."""
    return ModelIdentity(
        name=bundle.resolve().name,
        bundle_hash=manifest.bundle_hash,
        family=manifest.model.family,
        backend=manifest.backend,
        precision=manifest.precision,
    )


def _open_on(device: Device, snapshot: Snapshot, bundle: Path, others: Sequence[Model] = ()) -> Model:
    started, manifest = time.monotonic(), snapshot.manifest
    identity = identity_of(bundle, manifest)

    def open_engine() -> tuple[Engine, Costs]:
        engine = Engine(snapshot.folder, manifest, device=device)
        return engine, engine.measure_costs(_log_buckets(identity.name, engine.bucket_count))

    engine, costs = device.run(open_engine)
    on = f" on {device.name}" if device.name else ""
    _log.info("%s is ready%s: %d buckets after %.1f s", identity.name, on, engine.bucket_count, time.monotonic() - started)
    return Model(identity, engine, costs, device, others, slots=engine.slots)


def _log_buckets(name: str, total: int) -> Callable[[], None]:
    """Called after each bucket, it logs how many are ready, every few seconds."""
    ready, line_at = 0, time.monotonic() + _LINE_EVERY_S

    def on_ready() -> None:
        nonlocal ready, line_at
        ready += 1
        if time.monotonic() >= line_at:
            _log.info("%s: %d of %d buckets are ready", name, ready, total)
            line_at = time.monotonic() + _LINE_EVERY_S

    return on_ready
