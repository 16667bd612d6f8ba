"""The loader for data with a catalog: it combines order, catalog, container and decoder.

`batch.RankSlice` gives the samples of a micro-batch. A sample whose record cannot be read or decoded is
replaced by another one of its step; see `quarantine`.
"""

from __future__ import annotations

import numpy as np
import torch

from data_pipeline import augment, shuffle
from data_pipeline.augment import Augmentation
from data_pipeline.config import DataConfig
from data_pipeline.decode import EncodedBatch
from data_pipeline.formats.container import RecordError
from data_pipeline.indexed.catalog import Catalog
from data_pipeline.loader import LoaderBase, LoaderContext
from data_pipeline.quarantine import Quarantine, QuarantineError, substitutes

# Number of samples whose records and augmentation are computed at once.
_PLANNED = 8192


class Loader(LoaderBase):
    """Loader of the samples of a catalog, from the first micro-batch of the context's `first_step` on."""

    def __init__(
        self, config: DataConfig, catalog: Catalog, context: LoaderContext, quarantine: Quarantine
    ) -> None:
        self._catalog, self._blocks = catalog, config.shuffle_blocks()
        self._plan: tuple[int, np.ndarray, Augmentation] | None = None
        self._chosen: dict[int, np.ndarray] = {}  # records of the micro-batches that are being decoded
        first = context.first_step * context.rank_slice.accumulation
        super().__init__(config, context, quarantine, first=first)

    def labels_of_step(self, step: int) -> torch.Tensor:
        """Return the labels int64 [global batch] of all samples of a step, for all ranks."""
        start = step * self._slice.global_batch
        sample_N = np.arange(start, start + self._slice.global_batch, dtype=np.int64)
        return torch.from_numpy(self._catalog.label_N[self._records(sample_N)])

    def _records(self, sample_B: np.ndarray) -> np.ndarray:
        return shuffle.record_of(self._seed, sample_B, len(self._catalog), self._blocks)

    def _encoded(self, i: int) -> EncodedBatch:
        sample_B = self._slice.samples(i)
        record_B, augmentation = self._planned(i)
        images = []
        for row, record in enumerate(record_B):
            image = self._readable(record)
            if image is None:
                record_B[row], image = self._substitute(int(sample_B[row]))
            images.append(image)
        self._chosen[i] = record_B
        return images, augmentation

    def _labels_and_samples(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        label_B = self._catalog.label_N[self._chosen.pop(i)]
        return torch.from_numpy(label_B), torch.from_numpy(self._slice.samples(i))

    def _planned(self, i: int) -> tuple[np.ndarray, Augmentation]:
        """Return records and augmentation of a micro-batch, computed for many at once, which is cheaper."""
        size = self._slice.micro_batch
        count = max(1, _PLANNED // size)
        first = i - i % count
        if self._plan is None or self._plan[0] != first:
            sample_N = np.concatenate([self._slice.samples(k) for k in range(first, first + count)])
            changes = augment.of_samples(self._config.augment, self._seed, sample_N)
            self._plan = first, self._records(sample_N), changes
        rows = slice((i - first) * size, (i - first + 1) * size)
        return self._plan[1][rows].copy(), self._plan[2].rows(rows)

    def _readable(self, record: np.int64) -> np.ndarray | None:
        """Return the record's encoded image; None if the record is or was now put into quarantine."""
        if int(record) in self._quarantine:
            return None
        try:
            return self._catalog.image(int(record))
        except RecordError as error:
            self._quarantine_record(record, str(error))
            return None

    def _substitute(self, sample: int) -> tuple[np.int64, np.ndarray]:
        """Return another record of the sample's step, and its image."""
        for other in substitutes(sample, self._slice.global_batch):
            record = self._records(np.array([other]))[0]
            image = self._readable(record)
            if image is not None:
                return record, image
        raise QuarantineError(
            f"no sample of step {sample // self._slice.global_batch} can be read; copy the dataset again, or "
            "run `lgaf data validate` on it"
        )

    def _name_of(self, i: int, row: int) -> str:
        return self._catalog.name_of(int(self._chosen[i][row]))

    def _exclude(self, i: int, row: int, reason: str) -> None:
        self._quarantine_record(self._chosen[i][row], reason)

    def _quarantine_record(self, record: np.int64, reason: str) -> None:
        self._quarantine.add(int(record), self._catalog.bad(int(record), reason))
