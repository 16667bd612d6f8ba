"""Decoding of single images with Pillow, outside training."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

# An image with a side outside this range is not a face crop, and a much larger one would fill the memory.
SIDES_PX = (16, 4096)


class DecodeError(ValueError):
    """An image cannot be decoded; the error has its `name` and the `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be decoded: {reason}; remove or repair it")
        self.name, self.reason = name, reason


def decoded(encoded: np.ndarray, name: str) -> Image.Image:
    """Decode the bytes uint8 [n] of an image. Raises DecodeError with the image's `name`."""
    try:
        image = Image.open(io.BytesIO(encoded.tobytes()))
        image.load()
    except UnidentifiedImageError:
        reason = f"no known image format, it begins with {encoded[:8].tobytes()!r}"
    # Pillow does not document all exceptions that its readers raise for damaged files.
    except Exception as error:
        reason = str(error)
    else:
        return image
    raise DecodeError(name, reason)


def wrong_size(width: int, height: int) -> str | None:
    """Return the reason why an image of this size, in pixels, is refused; None if it is accepted."""
    low, high = SIDES_PX
    if low <= min(width, height) and max(width, height) <= high:
        return None
    return f"{width}x{height} pixels, expected {low} to {high} a side"


def kind(image: Image.Image) -> str:
    """Return format, size and mode, as in "JPEG 112x112 RGB"."""
    return f"{image.format} {image.width}x{image.height} {image.mode}"
