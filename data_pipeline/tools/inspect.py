"""Views of a dataset's content: the kinds of images in a sample, and a contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.common.pillow_decode import decoded, kind
from data_pipeline.config import AugmentConfig
from data_pipeline.indexed.catalog import Catalog

_CAPTION_PX = 12


def image_kinds(catalog: Catalog, sample: int) -> Counter[str]:
    """Count format, size and mode ("JPEG 112x112 RGB") of `sample` evenly spread images that are not damaged.

    Raises DecodeError, which names the record, for an image that cannot be decoded.
    """
    return Counter(
        kind(_decoded(catalog, record)) for record in _intact(catalog, _spread(len(catalog), sample))
    )


def contact_sheet(
    catalog: Catalog, *, classes: int, images: int, size: int, augmentation: AugmentConfig | None = None
) -> Image.Image:
    """Return a sheet with one class per row: the first `images` images of `classes` evenly spread classes.

    Every image is `size` pixels wide and high, with its label below; with `augmentation`, it is augmented as
    for training. Raises DecodeError like `image_kinds`.
    """
    present = np.unique(catalog.label_N)
    chosen = present[_spread(len(present), classes)].tolist()
    of_class = (_intact(catalog, np.flatnonzero(catalog.label_N == label)) for label in chosen)
    records = [found[:images] for found in of_class]
    decoded_images: Iterator[Image.Image]
    if augmentation is None:
        decoded_images = (_decoded(catalog, record).convert("RGB") for record in chain(*records))
    else:
        decoded_images = _augmented(catalog, list(chain(*records)), size, augmentation)
    cell = size + _CAPTION_PX
    sheet = Image.new("RGB", (images * size, len(chosen) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(chosen):
        for column in range(len(records[row])):
            corner = (column * size, row * cell)
            sheet.paste(next(decoded_images).resize((size, size)), corner)
            draw.text((corner[0] + 3, corner[1] + size), f"{label}", fill="black")
    return sheet


def _augmented(
    catalog: Catalog, records: list[int], size: int, config: AugmentConfig
) -> Iterator[Image.Image]:
    """Yield the images of the records, augmented as the first samples of a run with seed 0."""
    from data_pipeline import augment, decode  # DALI takes a second to import

    encoded = [catalog.image(record) for record in records]
    decoder = decode.Decoder(
        lambda _: (encoded, augment.of_samples(config, 0, np.arange(len(records)))),
        lambda _, row: catalog.name_of(records[row]),
        batch_size=len(records),
        image_size=size,
        threads=1,
        prefetch_batches=1,
        device_id=None,
        changes=config,
    )
    for image_CHW in next(decoder):
        yield Image.fromarray((image_CHW * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy())


def _spread(count: int, wanted: int) -> np.ndarray:
    """Return at most `wanted` evenly spread numbers below `count`, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int))


def _intact(catalog: Catalog, record_N: np.ndarray) -> list[int]:
    """Return the records that are not damaged."""
    return record_N[~np.isin(record_N, catalog.damaged_K)].tolist()


def _decoded(catalog: Catalog, record: int) -> Image.Image:
    return decoded(catalog.image(record), catalog.name_of(record))
