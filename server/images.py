"""RGB pixels to the bytes of an image file."""

import io
from typing import Literal

import fpng
from PIL import Image

from flashdiff.generate import Pixels

ImageFormat = Literal["png", "jpeg", "webp", "raw"]

FORMAT_OF_SUFFIX: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


DEFAULT_JPEG_QUALITY = 90


def encode_image(pixels: Pixels, image_format: ImageFormat, quality: int | None = None) -> bytes:
    """[H, W, 3] RGB as a file's bytes. PNG and raw keep every pixel, and so does WebP without a `quality` (1 to 100)."""
    match image_format:
        case "raw":
            return pixels.tobytes()
        case "png":  # fpng is a hundred times faster than Pillow's default
            return bytes(fpng.from_ndarray(pixels))
        case "jpeg":
            return _with_pillow(pixels, "JPEG", quality=quality or DEFAULT_JPEG_QUALITY)
        case "webp":
            lossless = {"lossless": True, "method": 0}
            return _with_pillow(pixels, "WEBP", **({"quality": quality} if quality else lossless))


def _with_pillow(pixels: Pixels, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()
