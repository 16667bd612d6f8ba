"""Single images through Pillow, wherever it is not training that decodes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

# An image with a side outside these is no face crop, and a much larger one would fill the memory.
SIDES_PX = (16, 4096)


class DecodeError(ValueError):
    """An image that cannot be decoded: its `name` and the `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be decoded: {reason}; remove or repair it")
        self.name, self.reason = name, reason


def decoded(encoded: np.ndarray, name: str) -> Image.Image:
    """The picture in the encoded bytes uint8 [n]. Raises DecodeError, which calls it `name`."""
    try:
        image = Image.open(io.BytesIO(encoded.tobytes()))
        image.load()
    except UnidentifiedImageError:
        reason = f"no known image format, it begins with {encoded[:8].tobytes()!r}"
    # Pillow's readers raise more kinds of errors on damaged files than they document.
    except Exception as error:
        reason = str(error)
    else:
        return image
    raise DecodeError(name, reason)


def wrong_size(width: int, height: int) -> str | None:
    """What is wrong with an image of this size, in pixels; None if nothing is."""
    low, high = SIDES_PX
    if low <= min(width, height) and max(width, height) <= high:
        return None
    return f"{width}x{height} pixels, expected {low} to {high} a side"


def kind(image: Image.Image) -> str:
    """Format, size and mode, as in "JPEG 112x112 RGB"."""
    return f"{image.format} {image.width}x{image.height} {image.mode}"
