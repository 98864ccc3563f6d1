"""RGB pixels to the bytes of an image file, and back."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import fpng
import numpy as np
from PIL import Image, ImageOps

from flashdiff.components import Size
from flashdiff.controls import ControlRequest
from flashdiff.errors import RequestError
from flashdiff.orders import Pixels
from flashdiff.picture_files import UnreadableError
from flashdiff.pictures import Background, as_clip_reads, opened, size_of, to_rgb
from flashdiff.references import ReferenceRequest
from flashdiff.server.names import ImageFormat
from flashdiff.tasks import Reader

FORMAT_OF_SUFFIX: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


DEFAULT_JPEG_QUALITY = 90
LARGE_BYTES = 3 * 2 * 1024 * 1024
"""Of pixels: fpng lets no other thread run, for a second at 4096x4096; a lossless WebP of that size takes five."""
MAX_PIXELS = 4096 * 4096
"""Of a request's picture."""


def encode_image(pixels: Pixels, image_format: ImageFormat, quality: int | None = None) -> bytes:
    """[H, W, 3] RGB as a file's bytes. PNG and raw keep every pixel, and so does WebP without a `quality` (1 to 100)."""
    match image_format:
        case "raw":
            return pixels.tobytes()
        case "png" if pixels.size > LARGE_BYTES:
            return _with_pillow(pixels, "PNG", compress_level=1)
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


def enlarge(picture: Pixels, factor: int) -> Pixels:
    """A picture [h, w, 3] as [factor h, factor w, 3], bicubic."""
    height, width, _ = picture.shape
    return np.array(Image.fromarray(picture).resize((factor * width, factor * height), Image.Resampling.BICUBIC))


def decode_image(file: bytes, size: Size | None, name: str = "image", behind: Background = "white") -> Pixels:
    """The RGB picture [H, W, 3] of a PNG, JPEG or WebP file, scaled to fill `size` (Lanczos) and cropped at the centre.

    Without a size it stays as it is. Where it is transparent, `behind` is seen.
    RequestError for any other file, by the `name` that the request gives it.
    """
    with _refused(file, name), opened(file, MAX_PIXELS) as image:
        rgb = to_rgb(image, behind)
    return np.array(ImageOps.fit(rgb, size, Image.Resampling.LANCZOS) if size else rgb)


def readers(files: Mapping[str, bytes]) -> dict[str, Reader]:
    """`decode_image` of each file, as `check_order` takes it; a mask that is transparent replaces nothing there.

    RequestError when a mask and the image that it belongs to have different sizes: scaled and cropped, they would not fit.
    """
    if "mask" in files and "image" in files:
        image, mask = (_size_of(files[name], name) for name in ("image", "mask"))
        if image != mask:
            raise RequestError("mask", str(mask), f"it must be as large as the image, {image}")
    behind: dict[str, Background] = {"mask": "black"}
    return {name: partial(decode_image, file, name=name, behind=behind.get(name, "white")) for name, file in files.items()}


def control_request(
    name: str, file: bytes, *, scale: float | None = None, start: float | None = None, end: float | None = None
) -> ControlRequest:
    """A control whose image is read as a mask is, as `check_order` takes it; without a file it is refused there."""
    given = {key: value for key, value in (("scale", scale), ("start", start), ("end", end)) if value is not None}
    image = partial(decode_image, file, name=f"controls.{name}.image", behind="black") if file else None
    return ControlRequest(name=name, image=image, **given)


def reference_request(file: bytes, *, scale: float | None = None) -> ReferenceRequest:
    """A reference whose image is read as CLIP reads it, as `check_order` takes it; without a file it is refused there."""
    given = {} if scale is None else {"scale": scale}
    return ReferenceRequest(image=partial(_decode_reference, file) if file else None, **given)


def _decode_reference(file: bytes, size: Size) -> Pixels:
    with _refused(file, "reference.image"), opened(file, MAX_PIXELS) as image:
        return as_clip_reads(to_rgb(image), size.width)


def _size_of(file: bytes, name: str) -> Size:
    with _refused(file, name):
        return size_of(file, MAX_PIXELS)


def white_where_transparent(file: bytes, name: str = "mask") -> bytes:
    """A PNG that is white where the picture of the file is transparent, and black where it is opaque.

    RequestError for a file that no picture can be read from, or whose picture is transparent nowhere.
    """
    with _refused(file, name), opened(file, MAX_PIXELS) as image:
        alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema() == (255, 255):
        raise RequestError(name, f"{len(file)} bytes", "it must be transparent where the image is to be edited")
    return _with_pillow(np.asarray(ImageOps.invert(alpha)), "PNG", compress_level=1)


@contextmanager
def _refused(file: bytes, name: str) -> Iterator[None]:
    """Whatever is raised in reading a file becomes a RequestError."""
    try:
        yield
    except (RequestError, MemoryError):
        raise
    except UnreadableError as error:
        raise RequestError(name, error.value, error.allowed) from None
    except Image.DecompressionBombError:
        raise RequestError(name, f"{len(file)} bytes", f"at most {MAX_PIXELS} pixels are read") from None
    except Exception:  # Pillow raises many kinds for what is damaged
        raise RequestError(name, f"{len(file)} bytes", "they must be a whole PNG, JPEG or WebP file") from None
