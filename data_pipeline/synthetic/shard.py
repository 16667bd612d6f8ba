"""Synthetic training images as tar shards that are written to a stream and not stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import IO

import numpy as np

from data_pipeline import shuffle
from data_pipeline.common.process_pool import in_order
from data_pipeline.formats import tar_writer
from data_pipeline.synthetic.identities import AT_ONCE, SynthConfig, render_images


def write_shard(out: IO[bytes], config: SynthConfig, part: int, parts: int) -> None:
    """Render one of `parts` parts of the set's training images; every image is in exactly one part.

    In every part the identities come in random order. The same arguments give the same bytes.

    Raises ValueError if there are fewer images than parts.
    """
    if parts > config.images:
        raise ValueError(
            f"{part}/{parts}: expected at most as many parts as images, found {config.images} images "
            f"(identities = {config.identities}, images_per_identity = {config.images_per_identity}); "
            "choose fewer parts"
        )
    with contextlib.closing(
        in_order(render_images, _chunks(config, part, parts), config.processes)
    ) as results:
        number = part
        for result in results:
            for image in result:
                out.write(tar_writer.sample(number, image.jpeg, image.identity))
                number += parts
    out.write(tar_writer.END)
    out.flush()


def _chunks(
    config: SynthConfig, part: int, parts: int
) -> Iterator[tuple[SynthConfig, np.ndarray, np.ndarray]]:
    for start in range(part, config.images, parts * AT_ONCE):
        position_N = np.arange(start, min(start + parts * AT_ONCE, config.images), parts)
        image_N = shuffle.record_of(config.seed, position_N, config.images)
        yield config, image_N // config.images_per_identity, image_N % config.images_per_identity
