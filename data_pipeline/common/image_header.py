"""Format and size of an encoded image, read from its header before a decoder allocates anything.

Decoders choose their code by an image's content, not by its name, and allocate what the header states. Only
the formats that face datasets come in reach a decoder; Pillow could also start Ghostscript, and DALI's reader
of JPEG 2000 can crash. The same check serves DALI and Pillow.
"""

from __future__ import annotations

import re
import struct

import numpy as np

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow's names
# An image with a side outside this range is not a face crop, and a much larger one would fill the memory.
SIDES_PX = (16, 4096)

_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NO_LENGTH = frozenset([0x01, *range(0xD0, 0xD8)])
_NO_IMAGE = frozenset([0xD8, 0xD9, 0xDA])  # start, end and pixels
# A decoder of progressive JPEG runs over all pixels once per scan. Encoders write about 10 scans.
_SCAN_HEADER = re.compile(rb"\xff\xda\0[\x08-\x0e]")
_SCAN_BYTES = 10  # of a scan without pixels
_MOST_SCANS = 64
# Profiles and previews come before the size, in segments of up to 64 KiB.
_MOST_SEGMENTS = 1000


class UnknownFormatError(ValueError):
    """The first bytes are not those of a format in FORMATS."""


def image_size(encoded: np.ndarray) -> tuple[int, int]:
    """Return width and height of an encoded image, uint8 [n], in pixels.

    Raises UnknownFormatError, or ValueError if the header holds no size or a JPEG has too many scans; the
    message is the reason.
    """
    data = encoded.data
    try:
        if data[:3] == b"\xff\xd8\xff":
            size = _jpeg_size(data)
            if size is not None:
                _check_scans(encoded, *size)
        elif data[:16] == _PNG:
            size = struct.unpack_from(">II", data, 16)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            size = _webp_size(data)
        elif data[:2] == b"BM":
            size = _bmp_size(data)
        else:
            raise UnknownFormatError(
                f"expected a JPEG, PNG, WebP or BMP image, found one that begins with {bytes(data[:8])!r}; "
                "`lgaf data pack` converts other formats"
            )
    except (struct.error, IndexError):
        size = None
    if size is None:
        raise ValueError("its header is damaged or truncated and states no size")
    return size


def wrong_size(width: int, height: int, low: int = SIDES_PX[0], high: int = SIDES_PX[1]) -> str | None:
    """Return the reason why an image of this size, in pixels, is refused; None if it is accepted."""
    if low <= min(width, height) and max(width, height) <= high:
        return None
    return f"{width}x{height} pixels, expected {low} to {high} a side"


def refusal(encoded: np.ndarray, max_side: int) -> str | None:
    """Return the reason why an encoded image must not be given to a decoder; None if it may be."""
    try:
        return wrong_size(*image_size(encoded), high=max_side)
    except ValueError as error:
        return str(error)


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        # Like libjpeg, skip fill bytes, and other bytes between segments.
        found = _JPEG_MARKER.search(data, at)
        if found is None:
            return None
        marker, at = found[1][0], found.end()
        if marker in _SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if marker in _NO_IMAGE:
            return None
        if marker not in _NO_LENGTH:
            at += struct.unpack_from(">H", data, at)[0]
    return None


def _check_scans(encoded: np.ndarray, width: int, height: int) -> None:
    # Most images are too small for scans that take long: for them the search would be the larger cost.
    if len(encoded) // _SCAN_BYTES * width * height <= _MOST_SCANS * SIDES_PX[1] ** 2:
        return
    # Coded pixels never contain the marker. Other data behind the image can: only then its length is read.
    markers = np.count_nonzero((encoded[:-1] == 0xFF) & (encoded[1:] == 0xDA))
    if markers > _MOST_SCANS and (scans := len(_SCAN_HEADER.findall(encoded.data))) > _MOST_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, expected at most {_MOST_SCANS}; save it again with fewer")


def _webp_size(data: memoryview) -> tuple[int, int] | None:
    chunk = data[12:16]
    if chunk == b"VP8X":  # libwebp refuses an image of another size than its canvas
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        return (low_width | high_width << 16) + 1, (low_height | high_height << 16) + 1
    if chunk == b"VP8L":
        (sizes,) = struct.unpack_from("<I", data, 21)
        return (sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _bmp_size(data: memoryview) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)  # the height of a bitmap from top to bottom is negative
