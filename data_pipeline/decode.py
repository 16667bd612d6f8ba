"""Encoded images and augmentation parameters in, normalised tensors out: the DALI graph.

The only import of nvidia.dali. The same graph decodes on the CPU (`device_id=None`) and, in DALI's mixed
mode, on a GPU. What is decoded when is the caller's: `source(i)` is asked for micro-batch i = 0, 1, 2...,
a few ahead of what is being read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from data_pipeline import augment
from data_pipeline.augment import Augmentation
from data_pipeline.images import DecodeError, decoded

EncodedBatch = tuple[list[np.ndarray], Augmentation]


@pipeline_def
def _graph(source: Callable[[int], tuple], image_size: int, device: str) -> Any:
    encoded, mirror, brightness, contrast = fn.external_source(
        source,
        num_outputs=4,
        batch=True,
        dtype=[types.UINT8, types.INT32, types.FLOAT, types.FLOAT],
        ndim=[1, 0, 0, 0],
    )
    images = fn.decoders.image(encoded, device=device, output_type=types.RGB)
    images = fn.resize(images, resize_x=image_size, resize_y=image_size)
    images = fn.brightness_contrast(images, brightness=brightness, contrast=contrast)
    # uint8 0..255 to [-1, 1], the range every published face-recognition recipe uses
    return fn.crop_mirror_normalize(
        images, mirror=mirror, mean=[127.5] * 3, std=[127.5] * 3, dtype=types.FLOAT, output_layout="CHW"
    )


class Decoder:
    """Iterates once over images_BCHW (float32, RGB, [-1, 1]) of the micro-batches that `source` gives.

    `source(i)` returns the encoded images and their augmentation, or raises StopIteration after the last;
    a batch may be smaller than `batch_size`. What else it raises ends the iteration, up to
    `prefetch_batches` early. `name_of(i, row)` is how an error calls an image.
    """

    def __init__(
        self,
        source: Callable[[int], EncodedBatch],
        name_of: Callable[[int, int], str],
        *,
        batch_size: int,
        image_size: int,
        threads: int,
        prefetch_batches: int,
        device_id: int | None,
    ) -> None:
        self._source, self._name_of = source, name_of
        self._source_error: Exception | None = None
        self._next = 0
        self._device_id = device_id
        self._pipeline = _graph(
            self._arrays,
            image_size,
            "cpu" if device_id is None else "mixed",
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch_batches,
        )

    def __iter__(self) -> Decoder:
        return self

    def __next__(self) -> torch.Tensor:
        # On torch's stream, so that DALI reuses a buffer only after the copy below has been made on the GPU.
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
        try:
            (images,) = self._pipeline.run(stream)
        except RuntimeError as error:
            if error is self._source_error:
                raise
            raise self._explain(self._next, error) from error
        self._next += 1
        return torch.from_dlpack(images.as_tensor()).clone()

    def _arrays(self, i: int) -> tuple:
        try:
            encoded, augmentation = self._source(i)
        except Exception as error:
            self._source_error = error
            raise
        return encoded, *augmentation

    def _explain(self, i: int, error: RuntimeError) -> DecodeError:
        """DALI says which operator failed, not which image: find it."""
        for row, encoded in enumerate(self._source(i)[0]):
            try:
                decoded(encoded, self._name_of(i, row))
            except DecodeError as found:
                return found
        return DecodeError(f"the batch that begins with {self._name_of(i, 0)} cannot be decoded: {error}")


def decode_all(
    encoded: list[bytes],
    name: str,
    *,
    first: int = 0,
    batch_size: int,
    image_size: int,
    threads: int,
    device_id: int | None,
) -> Iterator[torch.Tensor]:
    """Decode a list of images in order, unaugmented, `batch_size` at a time (the last batch may be smaller).

    Raises DecodeError naming `name` and the image's number, counted from `first`.
    """

    def source(i: int) -> EncodedBatch:
        rows = encoded[i * batch_size : (i + 1) * batch_size]
        if not rows:
            raise StopIteration
        return [np.frombuffer(row, np.uint8) for row in rows], augment.none(len(rows))

    return Decoder(
        source,
        lambda i, row: f"{name}: image {first + i * batch_size + row}",
        batch_size=batch_size,
        image_size=image_size,
        threads=threads,
        prefetch_batches=2,
        device_id=device_id,
    )
