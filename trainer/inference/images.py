"""Images for a trained network, read and decoded by threads while the network computes.

    for faces in ahead(load, paths, batch_size=64, threads=8):   # load(path) -> uint8 [H, W, 3]
        features = network(to_network(np.stack(faces), device))

Pillow decodes them to the same pixels for every device. Training decodes with DALI.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from data_pipeline.common.pillow_decode import decoded, read_encoded

T = TypeVar("T")
R = TypeVar("R")
# Enough to keep the threads busy, and few enough to need little memory.
_BATCHES_AHEAD = 2


def open_image(path: Path, encoded: bytes | None = None) -> Image.Image:
    """Decode the image in a file, or in `encoded` if it is given, to RGB, upright by its EXIF data.

    Raises DecodeError, naming `path`, if it cannot be decoded.
    """
    encoded_n = read_encoded(path) if encoded is None else np.frombuffer(encoded, np.uint8)
    # DALI (for training) and OpenCV (for landmarks) apply the EXIF orientation too.
    return ImageOps.exif_transpose(decoded(encoded_n, str(path))).convert("RGB")


def resized(image: Image.Image, size: int) -> Image.Image:
    """Resize an image to a square of `size` pixels as training does: bilinear, antialiased when shrunk."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def to_network(images_BHWC: np.ndarray, device: torch.device) -> torch.Tensor:
    """Convert RGB images uint8 [B, H, W, 3] to a network's input, float32 [B, 3, H, W] in [-1, 1]."""
    images = torch.from_numpy(images_BHWC).to(device).permute(0, 3, 1, 2)
    return images.float().sub_(127.5).div_(127.5).contiguous()


def ahead(load: Callable[[T], R], items: Iterable[T], *, batch_size: int, threads: int) -> Iterator[list[R]]:
    """Yield `load(item)` of all items in order, in batches of `batch_size` (the last one can be smaller).

    Threads keep two batches ready. An error of `load` is raised at its batch and ends the iteration.
    """
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads)
    waiting: deque[list[Future[R]]] = deque()
    try:
        while batch := list(islice(remaining, batch_size)):
            waiting.append([pool.submit(load, item) for item in batch])
            if len(waiting) > _BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
