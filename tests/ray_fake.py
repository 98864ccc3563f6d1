"""The application that `test_ray_serve.py` deploys: two fake models, whose bundle hashes begin with the replica's process id."""

import os
from typing import Any

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.server.models import Model, Models
from flashdiff.server.names import ModelIdentity
from flashdiff.server.ray_app import deployed


def hash_of(pid: int) -> str:
    return f"{pid:012d}".ljust(64, "0")


def _models() -> Models:
    models = {}
    for name in ("fake", "other"):
        fake = FakeComponents(delay_s=0.02, max_batch=1)
        identity = ModelIdentity(name=name, bundle_hash=hash_of(os.getpid()), family="fake", backend="fake", precision="fp32")
        models[name] = Model(identity, fake, fake.costs)
    return Models(models)


def app(arguments: dict[str, Any]) -> Any:
    return deployed(_models)
