"""Opens bundles as the models a server serves: each warmed up, and measured on this machine."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flashdiff.engines.bundle import parse_manifest
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ConfigError
from flashdiff.server.models import Model, Models
from flashdiff.server.names import ModelIdentity

_LINE_EVERY_S = 3.0

_log = logging.getLogger(__name__)


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
    """The bundle's engine, warmed up, with its measured costs; the log says how far it is."""
    started = time.monotonic()
    _log.info("opening %s", bundle)
    engine = open_bundle(bundle)
    manifest = engine.manifest
    on_ready = _log_buckets(bundle.resolve().name, engine.bucket_count)
    identity = ModelIdentity(
        name=bundle.resolve().name,
        bundle_hash=manifest.bundle_hash,
        family=manifest.model.family,
        backend=manifest.backend,
        precision=manifest.precision,
    )
    costs = engine.measure_costs(on_ready)
    _log.info("%s is ready: %d buckets after %.1f s", identity.name, engine.bucket_count, time.monotonic() - started)
    return Model(identity, engine, costs)


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
