"""How large a reply can become, which is known before any work is done, and what a client says it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from flashdiff.components import Size
from flashdiff.errors import RequestError
from flashdiff.orders import Order
from flashdiff.server.images import encode_image
from flashdiff.server.names import ImageFormat

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""Of a gRPC message that the server sends."""
LIMIT_KEY = "flashdiff-max-message-bytes"
"""The metadata in which a client states the largest message that it takes."""
MESSAGE_EXTRA_BYTES = 8 * 1024
"""At most, of a message in addition to its images: timings, the model, the batches."""
_MOST_DIGITS = 15
_NOISE_SIDE, _HEADER_BYTES = 64, 512


@dataclass(frozen=True, kw_only=True)
class ReplyLimit:
    """How large the messages of a reply may be."""

    max_bytes: int = MAX_MESSAGE_BYTES
    formats: tuple[ImageFormat, ...]
    """In which each image is sent."""
    in_parts: bool = False
    """Whether the images may be spread over several messages."""

    def check(self, order: Order, quality: int | None) -> None:
        """RequestError when a message of the reply may become too large."""
        count = 1 if self.in_parts else order.count
        largest = MESSAGE_EXTRA_BYTES + count * sum(_largest_file(order.whole_size, name, quality) for name in self.formats)
        if largest <= self.max_bytes:
            return
        images = f"{count} image{'s' if count > 1 else ''} of {order.whole_size} as {' and '.join(self.formats)}"
        remedy = "ask for fewer or smaller images"
        if self.max_bytes < MAX_MESSAGE_BYTES:
            remedy += f" or for JPEG, or raise the client's limit, and {LIMIT_KEY} with it"
        name, value = ("upscale", order.parameters["upscale"]) if order.tiling else ("count", order.count)
        raise RequestError(
            name, value, f"{images} may take {largest} bytes, and a message has at most {self.max_bytes}: {remedy}"
        )


def stated_limit(metadata: Mapping[str, str]) -> int | None:
    """The largest message that the client takes, if it states one; RequestError for what is no such number."""
    stated = metadata.get(LIMIT_KEY)
    if stated is None:
        return None
    if not (stated.isascii() and stated.isdecimal() and len(stated) <= _MOST_DIGITS and int(stated) > MESSAGE_EXTRA_BYTES):
        raise RequestError(LIMIT_KEY, stated, f"state a number of bytes, more than {MESSAGE_EXTRA_BYTES}, in decimal digits")
    return min(int(stated), MAX_MESSAGE_BYTES)


def _largest_file(size: Size, image_format: ImageFormat, quality: int | None) -> int:
    """Bytes of a file that compresses nothing, where it is without loss, or else of one of noise."""
    raw = 3 * size.width * size.height
    match image_format:
        case "raw":
            return raw
        case "jpeg":
            return round(raw * _share_of_noise("jpeg", quality)) + _HEADER_BYTES
        case "webp" if quality:
            return round(raw * _share_of_noise("webp", quality)) + _HEADER_BYTES
        case _:  # a byte for each row, and a header for each block
            return raw + size.height + raw // 1024 + _HEADER_BYTES


@cache
def _share_of_noise(image_format: ImageFormat, quality: int | None) -> float:
    """The bytes of a file of black and white noise, the hardest picture there is, for each byte of its pixels."""
    noise = np.random.default_rng(0).integers(0, 2, (_NOISE_SIDE, _NOISE_SIDE, 3), dtype=np.uint8) * np.uint8(255)
    return len(encode_image(noise, image_format, quality)) / noise.size
