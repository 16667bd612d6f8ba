"""The base of both loaders: micro-batches decoded ahead, and decoded again without the rows that fail.

`indexed/loader.py` reads samples by position, `streaming/loader.py` as they come. A sample whose record
cannot be read or decoded is replaced by another; see `quarantine`.
"""

from __future__ import annotations

import torch

from data_pipeline.batch import RankSlice, default_threads
from data_pipeline.config import DataConfig
from data_pipeline.decode import Decoder, EncodedBatch, UndecodableError
from data_pipeline.quarantine import Quarantine


class LoaderBase:
    """What loaders rank_slice: micro-batches asked for by number, decoded ahead, and again without bad rows.

    A subclass says what micro-batch i holds (`_encoded`), what a row of it is called (`_name_of`), and keeps
    a bad row out from then on (`_exclude`). `first` is the number of the first micro-batch.
    """

    def __init__(
        self,
        config: DataConfig,
        rank_slice: RankSlice,
        *,
        first: int,
        ranks_on_node: int,
        device_id: int | None,
        quarantine: Quarantine,
    ) -> None:
        self._config, self._slice, self._device_id = config, rank_slice, device_id
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
            batch_size=self._slice.micro_batch,
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
            self._quarantine.count_seen(self._slice.micro_batch)
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
