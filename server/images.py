"""RGB pixels to the bytes of an image file."""

import io
from typing import Literal

import fpng
from PIL import Image

from flashdiff.generate import Pixels

ImageFormat = Literal["png", "jpeg", "webp", "raw"]

FORMAT_OF_SUFFIX: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def encode_image(pixels: Pixels, image_format: ImageFormat) -> bytes:
    """[H, W, 3] RGB as a file's bytes. PNG, lossless WebP and raw keep every pixel; JPEG is quality 90."""
    match image_format:
        case "raw":
            return pixels.tobytes()
        case "png":  # fpng is a hundred times faster than Pillow's default (engines.md section 11)
            return bytes(fpng.from_ndarray(pixels))
        case "jpeg":
            return _with_pillow(pixels, "JPEG", quality=90)
        case "webp":
            return _with_pillow(pixels, "WEBP", lossless=True, method=0)


def _with_pillow(pixels: Pixels, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()
