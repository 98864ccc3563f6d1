"""Picture files cut down to the one picture that is decoded: its format found by magic bytes, no metadata, no further pictures.

Pillow spends time and memory on all of these before the first pixel: an EXIF directory may name the same megabytes 65,000
times, and a file that calls itself a multi-picture file is opened as another format.
"""

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

_MAX_SCANS = 100  # of a progressive JPEG; cameras write about ten
_MAX_FULL_SCANS = 32  # of the most pixels: every scan goes over all of them, in 20 ms or so for 16 million
_MAX_SEGMENTS = 10_000  # chunks of a PNG or segments of a JPEG: Pillow takes microseconds for each, however empty it is

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # neither stuffing nor a restart
_START_OF_SCAN, _END, _EXIF, _JFIF, _ADOBE, _COMMENT = 0xDA, 0xD9, 0xE1, 0xE0, 0xEE, 0xFE
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_ORIENTATION = 0x0112


class UnreadableError(ValueError):
    """What is wrong with a file: a value, and what is allowed."""

    def __init__(self, value: str, allowed: str) -> None:
        super().__init__(f"{value}: {allowed}")
        self.value, self.allowed = value, allowed


@dataclass(frozen=True)
class Picture:
    """One picture, for Pillow to decode as `format`; `orientation` is EXIF's."""

    format: Literal["PNG", "JPEG", "WEBP"]
    file: bytes
    orientation: int = 1
    scans: int = 1

    def check_work(self, width: int, height: int, max_pixels: int) -> None:
        """UnreadableError when decoding would take too much: pixels, or passes over them."""
        if width * height > max_pixels:
            raise UnreadableError(f"{width}x{height}", f"at most {max_pixels} pixels are read")
        if self.scans > 1 and self.scans * width * height > _MAX_FULL_SCANS * max_pixels:
            raise UnreadableError(
                f"{self.scans} scans of {width}x{height}", f"a JPEG may have {_MAX_FULL_SCANS * max_pixels} pixels times scans"
            )


def cut_down(file: bytes, max_pixels: int) -> Picture:
    """The file's first picture and nothing else; UnreadableError for a file that holds no picture, or too large a one.

    A small file can unpack to any number of pixels, so `check_work` reads the header first.
    """
    if file.startswith(_PNG):
        return _png(file)
    if file.startswith(b"\xff\xd8\xff"):
        return _jpeg(file)
    if file.startswith(b"RIFF") and file[8:12] == b"WEBP":
        return _webp(file, max_pixels)
    raise _not_whole(file)


def _not_whole(file: bytes) -> UnreadableError:
    return UnreadableError(f"{len(file)} bytes", "they must be a whole PNG, JPEG or WebP file")


def _png(file: bytes) -> Picture:
    """Of an animation, the default image."""
    kept, at, orientation = [_PNG], len(_PNG), 0
    for _ in range(_MAX_SEGMENTS):
        if at + 8 > len(file):
            break  # the rest is missing, as Pillow will find if it matters
        length, kind = struct.unpack_from(">I4s", file, at)
        end = at + 12 + length
        if kind == b"tRNS":
            kept.append(_transparent(file[at:end], form=file[24:26]))
        elif kind in _PNG_NEEDED:
            kept.append(file[at:end])
        elif kind in (b"eXIf", b"iTXt") and not orientation:
            orientation = _orientation(file[at + 8 : end - 4], is_exif=kind == b"eXIf")
        if kind == b"IEND":
            break
        at = end
    else:
        raise UnreadableError(f"{len(file)} bytes", f"a PNG may have {_MAX_SEGMENTS} chunks")
    return Picture("PNG", b"".join(kept), orientation or 1)


def _transparent(chunk: bytes, *, form: bytes) -> bytes:
    """A PNG's transparent level or colour in the 8 bits that Pillow compares it in; a level of 16-bit grey stays as it is.

    `form` is the depth and the kind of colour, of the header.
    """
    values = chunk[8:-4]
    if form in (b"\x02\x00", b"\x04\x00") and len(values) == 2:
        values = bytes([0, values[1] * (255 // (2 ** form[0] - 1)) & 255])
    elif form == b"\x10\x02" and len(values) == 6:
        values = bytes([0, values[0], 0, values[2], 0, values[4]])
    else:
        return chunk
    return chunk[:8] + values + struct.pack(">I", zlib.crc32(b"tRNS" + values))


def _jpeg(file: bytes) -> Picture:
    """Up to the end of its first picture."""
    kept, at, orientation = list[bytes](), 0, 0
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(file, at)
        if found is None:
            kept.append(file[at:])
            break
        marker, start = found[1][0], found.start()
        end = found.end()
        if marker not in (0x01, 0xD8, _END):
            if end + 2 > len(file):
                raise _not_whole(file)
            end += max(2, int.from_bytes(file[end : end + 2], "big"))
        is_metadata = (0xE0 <= marker <= 0xEF and marker not in (_JFIF, _ADOBE)) or marker == _COMMENT
        kept.append(file[at : start if is_metadata else end])
        if marker == _EXIF and not orientation:
            content = file[start + 4 : end]
            is_exif = content.startswith(b"Exif\0\0")
            orientation = _orientation(content[6:] if is_exif else content, is_exif=is_exif)
        if marker == _END:
            break
        at = end
    else:
        raise UnreadableError(f"{len(file)} bytes", f"a JPEG may have {_MAX_SEGMENTS} segments")
    picture = b"".join(kept)
    scans = picture.count(bytes((0xFF, _START_OF_SCAN)))  # not as they were walked: the decoder may see the file otherwise
    if scans > _MAX_SCANS:
        raise UnreadableError(f"{len(file)} bytes", f"a JPEG may have {_MAX_SCANS} scans")
    return Picture("JPEG", picture, orientation or 1, scans)


def _webp(file: bytes, max_pixels: int) -> Picture:
    """The whole file: of an animation the decoder draws the first frame. Its size is checked here, before the canvas is made."""
    kind, bits = file[12:16], int.from_bytes(file[21:25], "little")
    sizes = {
        b"VP8 ": (int.from_bytes(file[26:28], "little") & 0x3FFF, int.from_bytes(file[28:30], "little") & 0x3FFF),
        b"VP8L": ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1),
        b"VP8X": (int.from_bytes(file[24:27], "little") + 1, int.from_bytes(file[27:30], "little") + 1),
    }
    if len(file) < 30 or kind not in sizes:
        raise _not_whole(file)
    picture = Picture("WEBP", file, _webp_orientation(file))
    picture.check_work(*sizes[kind], max_pixels)
    return picture


def _webp_orientation(file: bytes) -> int:
    at, orientation = 12, 0
    for _ in range(_MAX_SEGMENTS):
        if at + 8 > len(file) or orientation:
            break
        kind, length = struct.unpack_from("<4sI", file, at)
        if kind in (b"EXIF", b"XMP "):
            content = file[at + 8 : at + 8 + length]
            orientation = _orientation(content.removeprefix(b"Exif\0\0"), is_exif=kind == b"EXIF")
        at += 8 + length + length % 2
    return orientation or 1


def _orientation(content: bytes, *, is_exif: bool) -> int:
    """EXIF's orientation, 1 to 8, in an EXIF directory or an XMP text; 0 where there is none."""
    if not is_exif:
        found = _XMP_ORIENTATION.search(content)
        return int(found[1]) if found else 0
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(content[at : at + size], order)

    directory = number(4, 4)
    for index in range(min(number(directory, 2), len(content) // 12)):
        entry = directory + 2 + 12 * index
        if number(entry, 2) == _ORIENTATION:
            value = number(entry + 8, {1: 1, 4: 4}.get(number(entry + 2, 2), 2))
            return value if 1 <= value <= 8 else 0
    return 0
