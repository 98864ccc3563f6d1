"""What server and client call things: image formats, priorities, and the model that made a reply."""

from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["png", "jpeg", "webp", "raw"]
Priority = Literal["high", "normal", "low"]


@dataclass(frozen=True)
class ModelIdentity:
    """What a reply says about the model that made it."""

    name: str
    bundle_hash: str
    family: str
    backend: str
    precision: str
