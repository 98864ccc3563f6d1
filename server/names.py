"""What server and client call things: image formats, priorities, loopback hosts, and the model that made a reply."""

from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["png", "jpeg", "webp", "raw"]
Priority = Literal["high", "normal", "low"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that only clients of the same machine reach."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a reply says about the model that made it."""

    name: str
    bundle_hash: str
    family: str
    backend: str
    precision: str
