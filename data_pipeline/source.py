"""Where training samples come from: datasets with a catalog, or shards that are streamed from afar.

What a run asks of either: how many classes, what tells it from another, a loader from a step on, and some
faces to show. The two differ in what a run has to remember: of a catalog nothing but the step, of a stream
the cursor, in which every rank has a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data_pipeline.batch import RankSlice
from data_pipeline.config import DataConfig
from data_pipeline.formats.container import RecordError
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.indexed.loader import Loader
from data_pipeline.quarantine import Quarantine
from data_pipeline.streaming.loader import RemoteLoader
from data_pipeline.streaming.samples import first_cursor, shard_urls


class LoaderContext(NamedTuple):
    """Where a loader runs and begins; `cursor` [ranks, 2] is that of a checkpoint, None without one."""

    rank_slice: RankSlice
    seed: int
    first_step: int
    cursor: list[list[int]] | None
    ranks_on_node: int
    device_id: int | None


class Source(Protocol):
    """A training set. `images` is None where only its end would tell how many they are."""

    num_classes: int
    images: int | None
    identity: dict[str, int]

    def loader(
        self,
        context: LoaderContext,
        quarantine: Quarantine,
        gather_labels: Callable[[torch.Tensor], torch.Tensor],
    ) -> Loader | RemoteLoader: ...

    def faces(self, count: int) -> list[tuple[bytes, str]]:
        """Encoded images from all over the set with their captions; none of a stream."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that the configuration names. Raises ValueError for what cannot be trained on."""
    return RemoteSource(config) if config.shards else CatalogSource(config)


class CatalogSource:
    """Datasets whose records can be found by number."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._catalog = open_catalog(config.path, config.num_classes, config.catalog_dir)
        self.num_classes = self._catalog.num_classes
        self.images: int | None = len(self._catalog)
        self.identity = self._catalog.identity

    def loader(
        self,
        context: LoaderContext,
        quarantine: Quarantine,
        gather_labels: Callable[[torch.Tensor], torch.Tensor],
    ) -> Loader:
        return Loader(
            self._config,
            self._catalog,
            context.rank_slice,
            seed=context.seed,
            first_step=context.first_step,
            ranks_on_node=context.ranks_on_node,
            device_id=context.device_id,
            quarantine=quarantine,
        )

    def faces(self, count: int) -> list[tuple[bytes, str]]:
        """Two of each of some identities, if they have as many."""
        label_N, found = self._catalog.label_N, []
        for record in np.linspace(0, len(label_N) - 1, count // 2).astype(int).tolist():
            same = np.flatnonzero(label_N == label_N[record]).tolist()
            other = next((other for other in same if other != record), record)
            for chosen in (record, other):
                try:
                    image = self._catalog.image(chosen).tobytes()
                except RecordError:
                    continue  # it is in quarantine, which says more
                found.append((image, f"identity {label_N[chosen]}"))
        return found


class RemoteSource:
    """Shards of which nothing is known before they are read."""

    images: int | None = None

    def __init__(self, config: DataConfig) -> None:
        assert config.num_classes is not None
        self._config, self._urls = config, shard_urls(config.shards)
        self.num_classes = config.num_classes
        urls_crc32 = zlib.crc32("\n".join(self._urls).encode())
        self.identity = {
            "shards": len(self._urls),
            "classes": config.num_classes,
            "urls_crc32": urls_crc32,
        }

    def loader(
        self,
        context: LoaderContext,
        quarantine: Quarantine,
        gather_labels: Callable[[torch.Tensor], torch.Tensor],
    ) -> RemoteLoader:
        new = first_cursor(context.rank_slice.world_size)
        cursor_W2 = new if context.cursor is None else np.array(context.cursor, np.int64)
        return RemoteLoader(
            self._config,
            self._urls,
            self.num_classes,
            context.rank_slice,
            seed=context.seed,
            cursor_W2=cursor_W2,
            ranks_on_node=context.ranks_on_node,
            device_id=context.device_id,
            quarantine=quarantine,
            gather_labels=gather_labels,
        )

    def faces(self, count: int) -> list[tuple[bytes, str]]:
        return []
