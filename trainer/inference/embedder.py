"""Embeddings of any list of faces, computed by all ranks together, in the order of the list.

    load        each rank takes an equal, contiguous part; threads read and align its images ahead
    network     embeds each batch and its mirror images, and adds both embeddings (flip test)
    gather      every few batches, rank 0 gathers all embeddings into one array, and the ranks agree whether
                one of them has received a signal to stop

Each rank holds only a few batches of images. Only rank 0 holds embeddings, in a temporary file if they are
large. The result does not depend on the number of ranks.

Shapes: N faces, D dimensions, B images of a batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.batch import default_threads
from trainer.evaluation.protocol import Face
from trainer.inference.alignment import aligned
from trainer.inference.images import ahead, open_image, resized, to_network
from trainer.runtime.ranks import Ranks

Network = Callable[[torch.Tensor], torch.Tensor]
# Batches from one gather to the next: about a second of a GPU's time, and megabytes of embeddings.
_GATHER_EVERY = 8
# Larger arrays are memory-mapped from a file, whose pages the system can evict.
_MOST_IN_MEMORY = 1 << 28


class Interrupted(Exception):  # noqa: N818
    """A rank has received signal `number`; raised on all ranks."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@dataclass(frozen=True)
class Embedder:
    """A network on all ranks that embeds faces.

    network: maps images_BCHW on the ranks' device to float32 [B, D]. signal: returns the signal that this
    rank has received, 0 if none. progress: called with the numbers of faces done and of all faces.
    """

    network: Network
    image_size: int
    batch_size: int
    ranks: Ranks
    signal: Callable[[], int] = lambda: 0
    progress: Callable[[int, int], None] = lambda done, total: None

    def embed(self, faces: Sequence[Face]) -> np.ndarray | None:
        """Return embeddings float32 [N, D] of N >= 1 faces, not normalised, on rank 0; None on other ranks.

        All ranks call it together, and all call `network` equally often. Raises DecodeError on a rank whose
        image cannot be read, ValueError for landmarks that determine no transform, and Interrupted on all
        ranks.
        """
        # Equal parts: the last ranks can embed the last face several times, and the extra rows are dropped.
        part = -(-len(faces) // self.ranks.world_size)
        start = part * self.ranks.rank
        mine = (faces[min(i, len(faces) - 1)] for i in range(start, start + part))
        embedded = self._embedded(mine)
        emb_ND, done = None, 0
        while batches := list(islice(embedded, _GATHER_EVERY)):
            emb_BD = torch.cat(batches).cpu()
            gathered = self._gather(emb_BD)
            for rank, rows in enumerate(gathered):
                if emb_ND is None:
                    emb_ND = _array(len(faces), emb_BD.shape[1])
                first = part * rank + done
                emb_ND[first : first + len(rows)] = rows[: max(0, len(faces) - first)].numpy()
            done += len(emb_BD)
            self.progress(min(done * self.ranks.world_size, len(faces)), len(faces))
        return emb_ND

    def _embedded(self, faces: Iterator[Face]) -> Iterator[torch.Tensor]:
        threads = default_threads(self.ranks.placement.local_world_size)
        for images in ahead(self._pixels, faces, batch_size=self.batch_size, threads=threads):
            images_BCHW = to_network(np.stack(images), self.ranks.device)
            yield self.network(images_BCHW) + self.network(images_BCHW.flip(3))

    def _pixels(self, face: Face) -> np.ndarray:
        """Return the face as uint8 [S, S, 3], aligned by its landmarks, or resized if it has none."""
        image = open_image(face.path, face.encoded)
        if face.landmark_52 is None:
            return np.asarray(resized(image, self.image_size))
        return np.asarray(aligned(image, face.landmark_52, self.image_size, str(face.path)))

    def _gather(self, emb_BD: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of every rank, on rank 0.

        The collectives use host memory (gloo), where a failed rank interrupts the others.
        """
        signal = torch.tensor(self.signal())
        dist.all_reduce(signal, op=dist.ReduceOp.MAX, group=self.ranks.group)
        if signal:
            raise Interrupted(int(signal))
        all_ranks = range(self.ranks.world_size)
        gathered = [torch.empty_like(emb_BD) for _ in all_ranks] if self.ranks.is_first else []
        dist.gather(emb_BD, gathered or None, group=self.ranks.group, group_dst=0)
        return gathered


def _array(rows: int, columns: int) -> np.ndarray:
    if 4 * rows * columns <= _MOST_IN_MEMORY:
        return np.empty((rows, columns), np.float32)
    file = tempfile.TemporaryFile()  # without a name, so that it is removed with the array
    try:
        # Allocated now: on a full disk, a write to a memory-mapped file would kill the process by SIGBUS.
        os.posix_fallocate(file.fileno(), 0, 4 * rows * columns)
    except OSError as error:
        raise OSError(
            f"{tempfile.gettempdir()}: expected {4e-9 * rows * columns:.1f} GB of free space for embeddings, "
            f"found less ({error.strerror}); set TMPDIR to a folder on a larger disk"
        ) from error
    return np.memmap(file, np.float32, "r+", shape=(rows, columns))
