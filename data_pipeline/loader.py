"""The base class of both loaders: it decodes micro-batches ahead, and again without the rows that fail.

`indexed/loader.py` reads samples by position, `streaming/loader.py` in the order of their arrival. A sample
whose record cannot be read or decoded is replaced by another sample; see `quarantine`.
"""

from __future__ import annotations

import torch

from data_pipeline.batch import RankSlice, default_threads
from data_pipeline.config import DataConfig
from data_pipeline.decode import Decoder, EncodedBatch, UndecodableError
from data_pipeline.quarantine import Quarantine


class LoaderBase:
    """Base of the loaders: decodes micro-batches ahead by number, and decodes again without bad rows.

    A subclass returns the encoded images of micro-batch i (`_encoded`) and the name of a row for messages
    (`_name_of`), and excludes a bad row from then on (`_exclude`). `first` is the number of the first
    micro-batch.
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
        """Return the number of the next micro-batch and its images."""
        while True:
            try:
                images_BCHW = next(self._decoder)
            except UndecodableError as error:
                for row, reason in error.reasons.items():
                    self._exclude(self._next, row, reason)
                # The new decoder requests this micro-batch and the following ones again, without these rows.
                self._decoder = self._new_decoder()
            else:
                self._next += 1
                return self._next - 1, images_BCHW
