"""Decoding of single images with Pillow, outside training; no other module opens images with Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from data_pipeline.common.data_file import read_data_file
from data_pipeline.common.image_header import (
    FORMATS,
    SIDES_PX,
    UnknownFormatError,
    image_size,
    wrong_size,
)

# An uncompressed image of 4096x4096 pixels with four channels of 16 bits has half of this.
_MOST_BYTES = 1 << 28
_TILE_SIZE = (322, 323)  # the tags of a TIFF for the width and the length of its tiles


class DecodeError(ValueError):
    """An image cannot be decoded; the error has its `name` and the `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be decoded: {reason}; remove or repair it")
        self.name, self.reason = name, reason


class TooLargeError(DecodeError):
    """An image has a side above the limit."""


def read_encoded(path: Path) -> np.ndarray:
    """Return the bytes of an image file, uint8 [n]. Raises DecodeError if it is no regular file, or huge."""
    try:
        return np.frombuffer(read_data_file(path, _MOST_BYTES), np.uint8)
    except OSError as error:
        raise DecodeError(str(path), error.strerror or str(error)) from error


def decoded(
    encoded: np.ndarray,
    name: str,
    *,
    max_side: int = SIDES_PX[1],
    other_formats: tuple[str, ...] = (),
) -> Image.Image:
    """Decode the bytes uint8 [n] of an image whose sides are at most `max_side` pixels.

    `other_formats` are tried beside the formats of `image_header`, by Pillow's names. Raises DecodeError with
    the image's `name`; the size is checked before pixels are decoded.
    """
    try:
        _check_header(encoded, name, max_side, is_known=not other_formats)
        image = Image.open(io.BytesIO(encoded.data), formats=[*FORMATS, *other_formats])
        _check_size(image.size, name, max_side)  # Pillow's size counts if a file states two
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # A tile is decoded as a whole, also if it is larger than the image.
            width, height = (image.tag_v2.get(tag, 1) for tag in _TILE_SIZE)
            reason = wrong_size(width, height, low=1, high=max_side)
            if reason is not None:
                raise TooLargeError(name, f"a tile of {reason}")
        image.load()
    except DecodeError:
        raise
    except UnidentifiedImageError:
        reason = f"no known image format, it begins with {encoded[:8].tobytes()!r}"
    # Pillow does not document all exceptions that its readers raise for damaged files.
    except Exception as error:
        reason = str(error)
    else:
        return image
    raise DecodeError(name, reason)


def kind(image: Image.Image) -> str:
    """Return format, size and mode, as in "JPEG 112x112 RGB"."""
    return f"{image.format} {image.width}x{image.height} {image.mode}"


def _check_header(encoded: np.ndarray, name: str, max_side: int, is_known: bool) -> None:
    # Opening a WebP image allocates its size in Pillow, so the header is read before.
    try:
        size = image_size(encoded)
    except UnknownFormatError:
        if is_known:
            raise
    else:
        _check_size(size, name, max_side)


def _check_size(size: tuple[int, int], name: str, max_side: int) -> None:
    reason = wrong_size(*size, low=1, high=max_side)
    if reason is not None:
        raise TooLargeError(name, reason)
