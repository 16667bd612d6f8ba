"""From a step number to a decoded batch: order, catalog, container and decoder, joined.

Step t is the samples [t * G, (t + 1) * G) of one infinite sequence, G the global batch. It is cut into
accumulation micro-batches m, and each of those over the W ranks:

    t * G                                                    (t + 1) * G
    | m = 0: rank 0 | rank 1 | ... | rank W-1 | m = 1: rank 0 | ... |

so that the samples of a step are the same on any number of ranks. A sample whose record cannot be read or
decoded is replaced by another of its step; see `quarantine`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline import augment
from data_pipeline import shuffle as order
from data_pipeline.augment import Augmentation
from data_pipeline.config import DataConfig
from data_pipeline.decode import Decoder, EncodedBatch, UndecodableError
from data_pipeline.formats.recordio import RecordError
from data_pipeline.indexed.catalog import Catalog
from data_pipeline.quarantine import Quarantine, QuarantineError, substitutes

# Samples whose records and augmentation are found at once.
_PLANNED = 8192


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


class Decoding:
    """What loaders share: micro-batches asked for by number, decoded ahead, and again without bad rows.

    A subclass says what micro-batch i holds (`_encoded`), what a row of it is called (`_name_of`), and keeps
    a bad row out from then on (`_exclude`). `first` is the number of the first micro-batch.
    """

    def __init__(
        self,
        config: DataConfig,
        share: Share,
        *,
        first: int,
        ranks_on_node: int,
        device_id: int | None,
        quarantine: Quarantine,
    ) -> None:
        self._config, self._share, self._device_id = config, share, device_id
        self._threads = config.threads or default_threads(ranks_on_node)
        self._quarantine = quarantine
        self._next = self._asked = first
        self._decoder = self._new_decoder()

    def _encoded(self, i: int) -> EncodedBatch:
        raise NotImplementedError

    def _name_of(self, i: int, row: int) -> str:
        raise NotImplementedError

    def _exclude(self, i: int, row: int, reason: str) -> None:
        raise NotImplementedError

    def _new_decoder(self) -> Decoder:
        first = self._next
        return Decoder(
            lambda i: self._counted(first + i),
            lambda i, row: self._name_of(first + i, row),
            batch_size=self._share.micro_batch,
            image_size=self._config.image_size,
            threads=self._threads,
            prefetch_batches=self._config.prefetch_batches,
            device_id=self._device_id,
            changes=self._config.augment,
            hw_decoder_load=self._config.hw_decoder_load,
        )

    def _counted(self, i: int) -> EncodedBatch:
        if i >= self._asked:
            self._asked = i + 1
            self._quarantine.count_seen(self._share.micro_batch)
        return self._encoded(i)

    def _decoded(self) -> tuple[int, torch.Tensor]:
        """The number of the next micro-batch, and its images."""
        while True:
            try:
                images_BCHW = next(self._decoder)
            except UndecodableError as error:
                for row, reason in error.reasons.items():
                    self._exclude(self._next, row, reason)
                # Asks once more for this micro-batch and those after it, now without these rows.
                self._decoder = self._new_decoder()
            else:
                self._next += 1
                return self._next - 1, images_BCHW


class Loader(Decoding):
    """Iterates once, without end, over this rank's micro-batches, from the first of `first_step` on.

    `device_id` is the GPU's number, None for the CPU; `ranks_on_node` divides the node's cores. Bad records
    go to `quarantine`, which raises QuarantineError when they are too many.
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
        quarantine: Quarantine,
    ) -> None:
        self._catalog, self._seed, self._blocks = catalog, seed, config.shuffle_blocks()
        self._plan: tuple[int, np.ndarray, Augmentation] | None = None
        self._chosen: dict[int, np.ndarray] = {}  # records of the micro-batches that are being decoded
        super().__init__(
            config,
            share,
            first=first_step * share.accumulation,
            ranks_on_node=ranks_on_node,
            device_id=device_id,
            quarantine=quarantine,
        )

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        i, images_BCHW = self._decoded()
        label_B = torch.from_numpy(self._catalog.label_N[self._chosen.pop(i)])
        return Batch(
            images_BCHW,
            label_B.to(images_BCHW.device, non_blocking=True),
            torch.from_numpy(self._share.samples(i)),
        )

    def labels_of_step(self, step: int) -> torch.Tensor:
        """Labels int64 [global batch] of all samples of a step, those of the other ranks too."""
        start = step * self._share.global_batch
        sample_N = np.arange(start, start + self._share.global_batch, dtype=np.int64)
        return torch.from_numpy(self._catalog.label_N[self._records(sample_N)])

    def _records(self, sample_B: np.ndarray) -> np.ndarray:
        return order.record_of(self._seed, sample_B, len(self._catalog), self._blocks)

    def _encoded(self, i: int) -> EncodedBatch:
        sample_B = self._share.samples(i)
        record_B, augmentation = self._planned(i)
        images = []
        for row, record in enumerate(record_B):
            image = self._readable(record)
            if image is None:
                record_B[row], image = self._substitute(int(sample_B[row]))
            images.append(image)
        self._chosen[i] = record_B
        return images, augmentation

    def _planned(self, i: int) -> tuple[np.ndarray, Augmentation]:
        """Records and augmentation of a micro-batch; found for many at once, which costs little more."""
        size = self._share.micro_batch
        count = max(1, _PLANNED // size)
        first = i - i % count
        if self._plan is None or self._plan[0] != first:
            sample_N = np.concatenate([self._share.samples(k) for k in range(first, first + count)])
            changes = augment.of_samples(self._config.augment, self._seed, sample_N)
            self._plan = first, self._records(sample_N), changes
        rows = slice((i - first) * size, (i - first + 1) * size)
        return self._plan[1][rows].copy(), self._plan[2].rows(rows)

    def _readable(self, record: np.int64) -> np.ndarray | None:
        """The record's encoded image; None if it is in quarantine, now or already."""
        if int(record) in self._quarantine:
            return None
        try:
            return self._catalog.image(int(record))
        except RecordError as error:
            self._quarantine_record(record, str(error))
            return None

    def _substitute(self, sample: int) -> tuple[np.int64, np.ndarray]:
        """Another record of the sample's step, and its image."""
        for other in substitutes(sample, self._share.global_batch):
            record = self._records(np.array([other]))[0]
            image = self._readable(record)
            if image is not None:
                return record, image
        raise QuarantineError(f"no sample of step {sample // self._share.global_batch} can be read")

    def _name_of(self, i: int, row: int) -> str:
        return self._catalog.name_of(int(self._chosen[i][row]))

    def _exclude(self, i: int, row: int, reason: str) -> None:
        self._quarantine_record(self._chosen[i][row], reason)

    def _quarantine_record(self, record: np.int64, reason: str) -> None:
        self._quarantine.add(int(record), self._catalog.bad(int(record), reason))


def default_threads(ranks_on_node: int) -> int:
    """Decode threads of one rank: its part of the node's cores, or fewer if it is bound to fewer."""
    return min(len(os.sched_getaffinity(0)), max(1, (os.cpu_count() or 1) // ranks_on_node))
