"""The Ray Serve application: `serve run flashdiff.server.ray_app:app bundles=FOLDER`, and what its configuration names.

Importing this needs no Ray: its processes import it by name, and so do tests.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from flashdiff import defaults
from flashdiff.config import Record, parse_record
from flashdiff.engines.bundle import parse_manifest
from flashdiff.errors import ConfigError, FlashdiffError, install
from flashdiff.server.auth import Tokens
from flashdiff.server.models import Models
from flashdiff.server.opening import open_models
from flashdiff.server.ray_proxy import add_to_server
from flashdiff.server.ray_replica import ImageReplica, check_hashes

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["PendingWork", "add_to_server", "app"]

NAME = "flashdiff"
"""Of the deployment, as configurations name it."""
_MOST_ONGOING = 500  # calls of one replica: its own queue refuses what is too much, with a time to come back
_MOST_STARTS = 3


class Options(Record):
    """The arguments of the application."""

    bundles: tuple[Path, ...]
    """Folders, each a model named after its folder; the first is the default. On the command line, separated by commas."""
    tokens: Path | None = None
    """A file of bearer tokens, as with `flashdiff serve --tokens`; their rates are counted by each replica."""
    allow_other_bundles: bool = False
    """Whether a replica may serve other files than those that the application was deployed with."""

    @field_validator("bundles", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @field_validator("tokens")
    @classmethod
    def _found_by_every_replica(cls, value: Path | None) -> Path | None:
        """Replicas run in folders of their own."""
        return value and value.absolute()

    @field_validator("bundles")
    @classmethod
    def _some(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        if not value:
            raise ValueError("bundles: give the folder of a bundle")
        names = [path.absolute().name for path in value]
        if len(set(names)) < len(names):
            raise ValueError(f"two bundles have the same folder name: {', '.join(names)}")
        return tuple(path.absolute() for path in value)


def app(arguments: dict[str, Any]) -> "Application":
    """The application that serves the bundles; wrong arguments end `serve run` with one line."""
    try:
        options = parse_record(arguments, Options, source="flashdiff.server.ray_app:app")
        if options.tokens:
            Tokens(options.tokens)  # a file with a mistake is refused here, and not by every replica
        hashes = _hashes_of(options.bundles)
        bundles = _Bundles(options.bundles, {} if options.allow_other_bundles else hashes)
        return deployed(bundles, options.tokens)
    except FlashdiffError as error:
        raise _shown(error) from None


def deployed(opener: Callable[[], Models], tokens: Path | None = None) -> "Application":
    """An application whose replicas serve what the opener opens; ConfigError without Ray."""
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"Ray Serve is not installed ({error}): {install('ray')}") from None
    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=_MOST_ONGOING,
        max_constructor_retry_count=_MOST_STARTS,
        graceful_shutdown_timeout_s=defaults.DRAIN_S,
    )(ImageReplica)
    return deployment.bind(opener, tokens)


class PendingWork:
    """An autoscaling policy: as many replicas as have all pending images done in `target_s` seconds.

    A replica counts the seconds of device time that its accepted images still need, so requests of many steps or images weigh
    more than small ones.
    """

    def __init__(self, target_s: float = 1.0) -> None:
        # An exception here, or in a call, would stop Ray's controller from scaling anything.
        self._target_s = target_s if isinstance(target_s, int | float) and 0 < target_s < math.inf else None
        if self._target_s is None:
            message = "target_s: %r is not allowed; give seconds above 0. Until then the number of replicas stays as it is"
            logging.getLogger("ray.serve").error(message, target_s)

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        pending_s: Mapping[Any, float] = context.aggregated_metrics.get("pending_s", {})
        if not pending_s or self._target_s is None:
            return context.target_num_replicas, {}
        return sum(pending_s.values()) / self._target_s, {}


class _Bundles:
    """Opens the bundles in a replica, unless their hashes are others than expected."""

    def __init__(self, folders: tuple[Path, ...], expected: Mapping[str, str]) -> None:
        self._folders, self._expected = folders, expected

    def __call__(self) -> Models:
        check_hashes(_hashes_of(self._folders), self._expected)  # before minutes of compiling
        models = open_models(self._folders, None)
        check_hashes({name: model.identity.bundle_hash for name, model in models.served.items()}, self._expected)
        return models


def _hashes_of(folders: tuple[Path, ...]) -> dict[str, str]:
    """By name, the hashes of the bundles as they are now."""
    return {folder.name: parse_manifest(folder)[1].bundle_hash for folder in folders}


def _shown(error: FlashdiffError) -> Exception:
    """As Ray's command line shows an error in one line, where Ray is installed."""
    try:
        from click import ClickException
    except ImportError:
        return error
    return ClickException(str(error))
