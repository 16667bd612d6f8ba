"""The loader for data without a catalog: micro-batches of samples that are streamed from remote shards.

Each rank takes the samples of its own shards in the order of their arrival; a step consists of the next
samples of every rank. A sample that cannot be decoded is replaced by the next one of its micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from data_pipeline import augment
from data_pipeline.batch import Batch, RankSlice
from data_pipeline.config import DataConfig
from data_pipeline.decode import EncodedBatch
from data_pipeline.loader import LoaderBase
from data_pipeline.quarantine import BadRecord, Quarantine, QuarantineError
from data_pipeline.streaming.connection import RemoteError
from data_pipeline.streaming.samples import RemoteSamples, Sample, resume


class RemoteLoader(LoaderBase):
    """Single-use, endless iterator over this rank's micro-batches, from `cursor_W2` on.

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
        rank_slice: RankSlice,
        *,
        seed: int,
        cursor_W2: np.ndarray,
        ranks_on_node: int,
        device_id: int | None,
        quarantine: Quarantine,
        gather_labels: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        cursor_W2 = resume(cursor_W2, rank_slice.world_size)
        self._seed, self._num_classes = seed, num_classes
        self._gather_labels = gather_labels
        self._samples = RemoteSamples(
            urls,
            seed=seed,
            rank=rank_slice.rank,
            world_size=rank_slice.world_size,
            window=config.shards_window,
            cursor=cursor_W2,
        )
        self._rows: dict[int, list[Sample]] = {}  # micro-batches that were read and not yet returned
        self._chosen: dict[int, list[Sample]] = {}  # micro-batches in decoding, bad rows replaced
        self._read = 0
        self.cursor: tuple[int, int] = (
            int(cursor_W2[rank_slice.rank, 0]),
            int(cursor_W2[rank_slice.rank, 1]),
        )
        super().__init__(
            config,
            rank_slice,
            first=0,
            ranks_on_node=ranks_on_node,
            device_id=device_id,
            quarantine=quarantine,
        )

    def __iter__(self) -> RemoteLoader:
        return self

    def __next__(self) -> Batch:
        i, images_BCHW = self._decoded()
        label_B = torch.tensor([row.label for row in self._chosen.pop(i)])
        rows = self._rows.pop(i)
        self.cursor = rows[-1].after
        return Batch(
            images_BCHW,
            label_B.to(images_BCHW.device, non_blocking=True),
            torch.tensor([_position(row) for row in rows]),
        )

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

    def _name_of(self, i: int, row: int) -> str:
        return self._chosen[i][row].name

    def _exclude(self, i: int, row: int, reason: str) -> None:
        bad = self._chosen[i][row]
        self._quarantine.add(_position(bad), BadRecord(bad.name, bad.number, bad.shard, reason))


def _position(sample: Sample) -> int:
    return sample.shard << 32 | sample.number
