"""Single images through Pillow, for messages, facts and contact sheets; training decodes with DALI."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError


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
