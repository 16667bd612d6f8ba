"""Sources of training samples: datasets with a catalog, and shards streamed from a server.

Either kind has a number of classes and a fingerprint that a resumed run compares; it creates
a loader that starts at a given step, and returns some images to show. They differ in the state that a
checkpoint must hold: for a catalog only the step, for a stream also the cursor, which has a row per rank.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np

from data_pipeline.common.redaction import canonical
from data_pipeline.config import DataConfig
from data_pipeline.formats.container import RecordError
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.indexed.loader import Loader
from data_pipeline.loader import GatherLabels, LoaderContext
from data_pipeline.quarantine import Quarantine
from data_pipeline.streaming.loader import RemoteLoader
from data_pipeline.streaming.samples import shard_urls


class Source(Protocol):
    """A training set. `images` is the number of images, None if it is unknown before the end of a stream."""

    num_classes: int
    images: int | None
    fingerprint: dict[str, int]

    def loader(
        self, context: LoaderContext, quarantine: Quarantine, gather_labels: GatherLabels
    ) -> Loader | RemoteLoader: ...

    def faces(self, count: int) -> list[tuple[bytes, str]]:
        """Return encoded images spread over the set, with captions; an empty list for a stream."""
        ...


def open_source(config: DataConfig) -> Source:
    """Return the source that the configuration names. Raises ValueError if it cannot be used for training."""
    return RemoteSource(config) if config.shards else CatalogSource(config)


class CatalogSource:
    """Datasets with random access: a record is found by its number."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._catalog = open_catalog(config.path, config.num_classes, config.catalog_dir)
        self.num_classes = self._catalog.num_classes
        self.images: int | None = len(self._catalog)
        self.fingerprint = self._catalog.fingerprint

    def loader(self, context: LoaderContext, quarantine: Quarantine, gather_labels: GatherLabels) -> Loader:
        return Loader(self._config, self._catalog, context, quarantine)

    def faces(self, count: int) -> list[tuple[bytes, str]]:
        """Return two images each of identities spread over the set; a single image is returned twice."""
        label_N, found = self._catalog.label_N, []
        for record in np.linspace(0, len(label_N) - 1, count // 2).astype(int).tolist():
            same = np.flatnonzero(label_N == label_N[record]).tolist()
            other = next((other for other in same if other != record), record)
            for chosen in (record, other):
                try:
                    image = self._catalog.image(chosen).tobytes()
                except RecordError:
                    continue  # training lists bad records in quarantine.jsonl
                found.append((image, f"identity {label_N[chosen]}"))
        return found


class RemoteSource:
    """Streamed shards, whose number of samples is unknown."""

    images: int | None = None

    def __init__(self, config: DataConfig) -> None:
        assert config.num_classes is not None
        self._config, self._urls = config, shard_urls(config.shards)
        self.num_classes = config.num_classes
        # Without credentials, which may differ when the run resumes.
        urls_crc32 = zlib.crc32("\n".join(map(canonical, self._urls)).encode())
        self.fingerprint = {
            "shards": len(self._urls),
            "classes": config.num_classes,
            "urls_crc32": urls_crc32,
        }

    def loader(
        self, context: LoaderContext, quarantine: Quarantine, gather_labels: GatherLabels
    ) -> RemoteLoader:
        return RemoteLoader(self._config, self._urls, self.num_classes, context, quarantine, gather_labels)

    def faces(self, count: int) -> list[tuple[bytes, str]]:
        return []
