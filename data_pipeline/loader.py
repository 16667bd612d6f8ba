"""From a step number to a decoded batch: order, catalog, container and decoder, joined.

Step t is the samples [t * G, (t + 1) * G) of one infinite sequence, G the global batch. It is cut into
accumulation micro-batches m, and each of those over the W ranks:

    t * G                                                    (t + 1) * G
    | m = 0: rank 0 | rank 1 | ... | rank W-1 | m = 1: rank 0 | ... |

so that the samples of a step are the same on any number of ranks.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline import augment, order
from data_pipeline.catalog import Catalog
from data_pipeline.config import DataConfig
from data_pipeline.decode import Decoder, EncodedBatch


class Batch(NamedTuple):
    """One micro-batch of one rank: images float32 [B, 3, H, W] RGB in [-1, 1], labels and sample positions
    int64 [B]; labels are on the images' device, positions on the CPU."""

    images_BCHW: torch.Tensor
    label_B: torch.Tensor
    sample_B: torch.Tensor


class Share(NamedTuple):
    """Which part of every global batch is this rank's."""

    rank: int
    world_size: int
    global_batch: int
    micro_batch: int

    @property
    def accumulation(self) -> int:
        """Micro-batches per step. Raises ValueError if the global batch cannot be split evenly."""
        per_round = self.world_size * self.micro_batch
        if self.global_batch % per_round:
            raise ValueError(
                f"a global batch of {self.global_batch} does not divide into micro-batches of "
                f"{self.micro_batch} on {self.world_size} ranks: it must be a multiple of {per_round}, "
                f"such as {max(1, self.global_batch // per_round) * per_round}"
            )
        return self.global_batch // per_round

    def samples(self, micro_batch_number: int) -> np.ndarray:
        """Sample positions int64 [micro_batch] of this rank's n-th micro-batch, counted from step 0."""
        step, round_number = divmod(micro_batch_number, self.accumulation)
        start = step * self.global_batch
        start += (round_number * self.world_size + self.rank) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


class Loader:
    """Iterates once, without end, over this rank's micro-batches, from the first of `first_step` on.

    `device_id` is the GPU's number, None for the CPU; `ranks_on_node` divides the node's cores.
    """

    def __init__(
        self,
        config: DataConfig,
        catalog: Catalog,
        share: Share,
        *,
        seed: int,
        first_step: int,
        ranks_on_node: int,
        device_id: int | None,
    ) -> None:
        self._config, self._catalog, self._share, self._seed = config, catalog, share, seed
        self._first = self._next = first_step * share.accumulation
        self._decoder = Decoder(
            self._encoded,
            self._name_of,
            batch_size=share.micro_batch,
            image_size=config.image_size,
            threads=config.threads or default_threads(ranks_on_node),
            prefetch_batches=config.prefetch_batches,
            device_id=device_id,
            changes=config.augment,
            hw_decoder_load=config.hw_decoder_load,
        )

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        images_BCHW = next(self._decoder)
        sample_B = self._share.samples(self._next)
        self._next += 1
        label_B = torch.from_numpy(self._catalog.label_N[self._records(sample_B)])
        return Batch(
            images_BCHW, label_B.to(images_BCHW.device, non_blocking=True), torch.from_numpy(sample_B)
        )

    def labels_of_step(self, step: int) -> torch.Tensor:
        """Labels int64 [global batch] of all samples of a step, those of the other ranks too."""
        start = step * self._share.global_batch
        sample_N = np.arange(start, start + self._share.global_batch, dtype=np.int64)
        return torch.from_numpy(self._catalog.label_N[self._records(sample_N)])

    def _records(self, sample_B: np.ndarray) -> np.ndarray:
        return order.record_of(self._seed, sample_B, len(self._catalog))

    def _encoded(self, i: int) -> EncodedBatch:
        sample_B = self._share.samples(self._first + i)
        images = [self._catalog.image(record) for record in self._records(sample_B)]
        return images, augment.of_samples(self._config.augment, self._seed, sample_B)

    def _name_of(self, i: int, row: int) -> str:
        sample = self._share.samples(self._first + i)[row]
        return f"{self._catalog.name_of(self._records(np.array([sample]))[0])} (sample {sample})"


def default_threads(ranks_on_node: int) -> int:
    """Decode threads of one rank: its part of the node's cores, or fewer if it is bound to fewer."""
    return min(len(os.sched_getaffinity(0)), max(1, (os.cpu_count() or 1) // ranks_on_node))
