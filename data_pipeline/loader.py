"""The base class of both loaders: it decodes micro-batches ahead, and again without the rows that fail.

`indexed/loader.py` reads samples by position, `streaming/loader.py` in the order of their arrival. A sample
whose record cannot be read or decoded is replaced by another sample; see `quarantine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch

from data_pipeline.batch import Batch, RankSlice, default_threads
from data_pipeline.config import DataConfig
from data_pipeline.decode import Decoder, EncodedBatch, UndecodableError
from data_pipeline.quarantine import Quarantine

GatherLabels = Callable[[torch.Tensor], torch.Tensor]


class LoaderContext(NamedTuple):
    """The rank and the start of a loader.

    `cursor` [ranks, 2] comes from a checkpoint, None without one. `ranks_on_node` ranks share the node's
    cores. `device_id` is the GPU's number, None for the CPU.
    """

    rank_slice: RankSlice
    seed: int
    first_step: int
    cursor: list[list[int]] | None
    ranks_on_node: int
    device_id: int | None


class LoaderBase:
    """Single-use, endless iterator over this rank's micro-batches, which are decoded ahead by number.

    A subclass returns the encoded images of micro-batch i (`_encoded`), its labels and sample positions once
    it is decoded (`_labels_and_samples`) and the name of a row for messages (`_name_of`), and excludes a bad
    row from then on (`_exclude`). `first` is the number of the first micro-batch. Bad records go to
    `quarantine`, which raises QuarantineError if they exceed its limit.
    """

    def __init__(
        self, config: DataConfig, context: LoaderContext, quarantine: Quarantine, *, first: int
    ) -> None:
        self._config, self._quarantine = config, quarantine
        self._slice, self._seed, self._device_id = context.rank_slice, context.seed, context.device_id
        self._threads = config.threads or default_threads(context.ranks_on_node)
        self._next = self._asked = first
        self._decoder = self._new_decoder()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        i, images_BCHW = self._decoded()
        label_B, sample_B = self._labels_and_samples(i)
        return Batch(images_BCHW, label_B.to(images_BCHW.device, non_blocking=True), sample_B)

    def _encoded(self, i: int) -> EncodedBatch:
        raise NotImplementedError

    def _labels_and_samples(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
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
            max_side=self._config.max_image_side,
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
