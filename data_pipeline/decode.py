"""The DALI graph: it decodes and augments encoded images, and returns normalised tensors.

This is the only module that imports nvidia.dali. The same graph decodes on the CPU (`device_id=None`) and, in
DALI's mixed mode, on a GPU. The decoder calls `source(i)` for micro-batch i = 0, 1, 2..., a few ahead of the
one that is being read. An image reaches DALI only if its header is accepted: DALI would allocate any size,
and some of its readers of other formats crash on damaged files.

The graph draws no random numbers: every sample brings its augmentation parameters. An augmentation that is
switched off is not in the graph; a sample that does not get an augmentation bypasses its operators.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert

from data_pipeline import augment
from data_pipeline.augment import Augmentation
from data_pipeline.common.image_header import SIDES_PX, refusal
from data_pipeline.common.pillow_decode import DecodeError, decoded
from data_pipeline.config import AugmentConfig

EncodedBatch = tuple[list[np.ndarray], Augmentation]
# Decoded in place of a refused image: a black bitmap of 16x16 pixels.
_PLACEHOLDER = np.frombuffer(
    struct.pack("<2sIIIIiiHH24x", b"BM", 54 + 16 * 48, 0, 54, 40, 16, 16, 1, 24) + bytes(16 * 48), np.uint8
)


class UndecodableError(DecodeError):
    """Error for undecodable images of a micro-batch: the reasons by row; the message names the first."""

    def __init__(self, name: str, reasons: dict[int, str]) -> None:
        super().__init__(name, next(iter(reasons.values())))
        self.reasons = reasons


# DALI turns an `if` on a value of the graph into a split of the batch, sample by sample.
@pipeline_def(enable_conditionals=True)
def _graph(
    source: Callable[[int], tuple], names: dict[str, list[str]], image_size: int, hw_decoder_load: float
) -> Any:
    count = 2 + sum(map(len, names.values()))
    encoded, mirror, *values = fn.external_source(source, num_outputs=count, batch=True)
    images = _decoded(encoded, hw_decoder_load)
    shape = fn.peek_image_shape(encoded)
    # Resizing takes as long as decoding, even if the size stays the same.
    if (shape[0] != image_size) | (shape[1] != image_size):
        images = fn.resize(images, resize_x=image_size, resize_y=image_size)
    for change, keys in names.items():
        parameters = {key: values.pop(0) for key in keys}
        if parameters["on"]:
            images = _changed(change, images, parameters, image_size)
    # From uint8 0..255 to [-1, 1], the range that every published face-recognition recipe uses.
    normal = fn.crop_mirror_normalize(
        images, mirror=mirror, mean=[127.5] * 3, std=[127.5] * 3, dtype=types.FLOAT, output_layout="CHW"
    )
    return normal


@do_not_convert
def _decoded(encoded: Any, hw_decoder_load: float) -> Any:
    if Pipeline.current().device_id is None:
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
    return fn.decoders.image(encoded, device="mixed", output_type=types.RGB, hw_decoder_load=hw_decoder_load)


@do_not_convert
def _changed(change: str, images: Any, parameters: dict[str, Any], image_size: int) -> Any:
    """Apply one augmentation to images uint8 HWC; every operator exists for the CPU and the GPU."""
    match change, parameters:
        case "occlusion", {"anchor": anchor, "shape": shape, "fill": fill}:
            return fn.erase(images, anchor=anchor, shape=shape, fill_value=fill, axes=[0, 1], normalized=True)
        case "crop", {"anchor": anchor, "shape": shape}:
            return fn.erase(images, anchor=anchor, shape=shape, axes=[0, 1], normalized=True)
        case "motion_blur", {"kernel": kernel}:
            return fn.filter(images, kernel.gpu() if images.device == "gpu" else kernel)
        case "blur", {"sigma": sigma}:
            return fn.gaussian_blur(images, sigma=sigma)
        case "low_resolution", {"scale": scale, "down": down, "up": up}:
            width = scale * image_size
            small = fn.resize(
                images, resize_x=width, resize_y=width, interp_type=_interpolation(down), antialias=False
            )
            return fn.resize(
                small,
                resize_x=image_size,
                resize_y=image_size,
                interp_type=_interpolation(up),
                antialias=False,
            )
        case "photometric", {"on": _, **factors}:
            return fn.color_twist(images, **factors)
        case "grey", _:
            grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
            return fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)
        case "jpeg", {"quality": quality}:
            return fn.jpeg_compression_distortion(images, quality=quality)
    raise AssertionError(change)


def _interpolation(number: Any) -> Any:
    return fn.cast(number, dtype=types.INTERP_TYPE)


class Decoder:
    """Single-use iterator over images_BCHW (float32, RGB, [-1, 1]) of the micro-batches from `source`.

    `source(i)` returns the encoded images and their augmentation, or raises StopIteration after the last;
    a batch may be smaller than `batch_size`. Any other exception from `source` ends the iteration, up to
    `prefetch_batches` early. `name_of(i, row)` returns the name of an image for error messages. `changes` is
    the configuration from which the augmentation is drawn. `hw_decoder_load` is the share of the images that
    a GPU's JPEG hardware decodes. An image with a side above `max_side` pixels counts as undecodable.
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
        changes: AugmentConfig,
        hw_decoder_load: float = 1.0,
        max_side: int = SIDES_PX[1],
    ) -> None:
        self._source, self._name_of, self._max_side = source, name_of, max_side
        self._refused: dict[int, dict[int, str]] = {}  # reasons by row, of the micro-batches in decoding
        self._source_error: Exception | None = None
        self._next = 0
        self._device_id = device_id
        self._pipeline = _graph(
            self._arrays,
            {name: list(keys) for name, keys in augment.of_samples(changes, 0, np.arange(1)).changes.items()},
            image_size,
            hw_decoder_load,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch_batches,
        )

    def __iter__(self) -> Decoder:
        return self

    def __next__(self) -> torch.Tensor:
        # DALI runs on torch's stream and so reuses a GPU buffer only after torch's work on it is done.
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
        try:
            (images,) = self._pipeline.run(stream)
        except RuntimeError as error:
            if error is self._source_error:
                raise
            encoded, refused = self._checked(self._source(self._next)[0])
            reasons = refused | _reasons(encoded, self._device_id, self._max_side)
            if not reasons:
                raise  # every image can be decoded: the error has another cause
            raise self._undecodable(reasons) from error
        refused = self._refused.pop(self._next)
        if refused:
            raise self._undecodable(refused)
        self._next += 1
        # No copy is needed: DALI's default executor does not reuse an output that is still referenced.
        return torch.from_dlpack(images.as_tensor())

    def _checked(self, encoded: list[np.ndarray]) -> tuple[list[np.ndarray], dict[int, str]]:
        """Replace the images that DALI must not decode; return all images, and the reasons by row."""
        reason_B = [refusal(image, self._max_side) for image in encoded]
        refused = {row: reason for row, reason in enumerate(reason_B) if reason is not None}
        return [_PLACEHOLDER if row in refused else image for row, image in enumerate(encoded)], refused

    def _undecodable(self, reasons: dict[int, str]) -> UndecodableError:
        return UndecodableError(self._name_of(self._next, next(iter(reasons))), reasons)

    def _arrays(self, i: int) -> tuple:
        try:
            encoded, augmentation = self._source(i)
        except Exception as error:
            self._source_error = error
            raise
        encoded, self._refused[i] = self._checked(encoded)
        changes = chain.from_iterable(change.values() for change in augmentation.changes.values())
        return encoded, augmentation.mirror_B, *changes


@pipeline_def
def _alone(source: Iterator[list[np.ndarray]], device: str) -> Any:
    encoded = fn.external_source(source, batch=True, dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device=device, output_type=types.RGB), fn.peek_image_shape(encoded)


def _reasons(encoded: list[np.ndarray], device_id: int | None, max_side: int) -> dict[int, str]:
    """Return the rows that cannot be decoded, with reasons: DALI names the failed operator, not the image."""
    reasons: dict[int, str] = {}
    row = 0
    while row < len(encoded):
        pipeline = _alone(
            iter([[image] for image in encoded[row:]]),
            "cpu" if device_id is None else "mixed",
            batch_size=1,
            num_threads=1,
            device_id=device_id,
            prefetch_queue_depth=1,
        )
        try:
            while row < len(encoded):
                pipeline.run()
                row += 1
        except RuntimeError as error:  # a pipeline cannot be used after an error
            reasons[row] = _reason(encoded[row], error, max_side)
            row += 1
    return reasons


def _reason(encoded: np.ndarray, error: RuntimeError, max_side: int) -> str:
    try:
        decoded(encoded, "", max_side=max_side)
    except DecodeError as found:
        return found.reason
    return str(error).strip().splitlines()[-1]
