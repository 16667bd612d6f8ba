"""What a dataset holds: counts, image sizes of a sample, and a contact sheet to look at."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.catalog import Catalog
from data_pipeline.images import decoded

_CAPTION_PX = 12


def image_kinds(catalog: Catalog, sample: int) -> Counter[str]:
    """How often each format, size and mode ("JPEG 112x112 RGB") occurs in `sample` evenly spread images.

    Raises DecodeError, naming the record, for an image that cannot be decoded.
    """
    return Counter(
        f"{image.format} {image.width}x{image.height} {image.mode}"
        for image in (_decoded(catalog, record) for record in _spread(len(catalog), sample))
    )


def contact_sheet(catalog: Catalog, *, classes: int, images: int, size: int) -> Image.Image:
    """A picture with one class per row: `classes` evenly spread ones, the first `images` of each.

    Every image is `size` pixels wide and high, with its label below. Raises DecodeError like `image_kinds`.
    """
    present = np.unique(catalog.label_N)
    chosen = present[_spread(len(present), classes)]
    cell = size + _CAPTION_PX
    sheet = Image.new("RGB", (images * size, len(chosen) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(chosen.tolist()):
        for column, record in enumerate(np.flatnonzero(catalog.label_N == label)[:images].tolist()):
            corner = (column * size, row * cell)
            sheet.paste(_decoded(catalog, record).convert("RGB").resize((size, size)), corner)
            draw.text((corner[0] + 3, corner[1] + size), f"{label}", fill="black")
    return sheet


def _spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the numbers below `count`, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int))


def _decoded(catalog: Catalog, record: int) -> Image.Image:
    return decoded(catalog.image(record), catalog.name_of(record))
