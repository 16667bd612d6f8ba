"""The loader for data without a catalog: micro-batches of samples that are streamed from remote shards.

Each rank takes the samples of its own shards in the order of their arrival; a step consists of the next
samples of every rank. A sample that cannot be decoded is replaced by the next one of its micro-batch.
"""

from __future__ import annotations

import numpy as np
import torch

from data_pipeline import augment
from data_pipeline.config import DataConfig
from data_pipeline.decode import EncodedBatch
from data_pipeline.loader import GatherLabels, LoaderBase, LoaderContext
from data_pipeline.quarantine import BadRecord, Quarantine, QuarantineError
from data_pipeline.streaming.connection import RemoteError
from data_pipeline.streaming.samples import RemoteSamples, Sample


class RemoteLoader(LoaderBase):
    """Loader of the samples of streamed shards, from the context's cursor on.

    `cursor` is this rank's row of the run's cursor after the batches returned so far; `sample_B` of a batch
    encodes the shard's position and the sample's number in it (position * 2^32 + number). `gather_labels`
    gathers the labels int64 [n] of a step from all ranks on every rank.

    Raises RemoteError if a shard cannot be read, or a label is outside the classes.
    """

    def __init__(
        self,
        config: DataConfig,
        urls: list[str],
        num_classes: int,
        context: LoaderContext,
        quarantine: Quarantine,
        gather_labels: GatherLabels,
    ) -> None:
        self._num_classes, self._gather_labels = num_classes, gather_labels
        self._samples = RemoteSamples(
            urls,
            seed=context.seed,
            rank=context.rank_slice.rank,
            world_size=context.rank_slice.world_size,
            window=config.shards_window,
            max_sample_bytes=config.max_sample_mb << 20,
            cursor=None if context.cursor is None else np.array(context.cursor, np.int64),
        )
        self.cursor = self._samples.start
        self._rows: dict[int, list[Sample]] = {}  # micro-batches that were read and not yet returned
        self._chosen: dict[int, list[Sample]] = {}  # micro-batches in decoding, bad rows replaced
        self._read = 0
        super().__init__(config, context, quarantine, first=0)

    def labels_of_step(self, step: int) -> torch.Tensor:
        """Return the labels int64 of all samples of the next step, for all ranks."""
        numbers = range(self._next, self._next + self._slice.accumulation)
        return self._gather_labels(torch.tensor([row.label for i in numbers for row in self._micro_batch(i)]))

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._samples.close()

    def _micro_batch(self, i: int) -> list[Sample]:
        while self._read <= i:
            self._rows[self._read] = [
                self._checked(next(self._samples)) for _ in range(self._slice.micro_batch)
            ]
            self._read += 1
        return self._rows[i]

    def _checked(self, sample: Sample) -> Sample:
        if sample.label >= self._num_classes:
            raise RemoteError(
                f"{sample.name}: label {sample.label} is outside the {self._num_classes} classes of "
                f"data.num_classes (0 to {self._num_classes - 1}); set it to the number of identities"
            )
        return sample

    def _usable(self, rows: list[Sample]) -> list[Sample]:
        """Return the rows, each bad row replaced by the next good one, cyclically."""
        good = [row for row in rows if _position(row) not in self._quarantine]
        if not good:
            raise QuarantineError(
                f"no image of the {len(rows)} from {rows[0].name} on can be decoded; repair the shard"
            )
        following, usable = good[0], []
        for row in reversed(rows):
            following = row if _position(row) not in self._quarantine else following
            usable.append(following)
        return usable[::-1]

    def _encoded(self, i: int) -> EncodedBatch:
        rows = self._micro_batch(i)
        self._chosen[i] = self._usable(rows)
        position_B = np.array([_position(row) for row in rows])
        images = [row.encoded for row in self._chosen[i]]
        return images, augment.of_samples(self._config.augment, self._seed, position_B)

    def _labels_and_samples(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rows = self._chosen.pop(i), self._rows.pop(i)
        self.cursor = rows[-1].after
        return torch.tensor([row.label for row in chosen]), torch.tensor([_position(row) for row in rows])

    def _name_of(self, i: int, row: int) -> str:
        return self._chosen[i][row].name

    def _exclude(self, i: int, row: int, reason: str) -> None:
        bad = self._chosen[i][row]
        self._quarantine.add(_position(bad), BadRecord(bad.name, bad.number, bad.shard, reason))


def _position(sample: Sample) -> int:
    return sample.shard << 32 | sample.number
