"""A suite of protocols: which they are, from a file; what they say of a network, all ranks together.

    suite = Suite(settings.load(SuiteConfig, Path("configs/eval/standard.toml"), ["folder=/data"]))
    results = suite.evaluate(embedder)          # on rank 0; empty on the others

Every protocol's lists are read at the beginning, so that a file that is missing is known before anything is
embedded. Their pictures are embedded one protocol after the other; rank 0 then scores the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from trainer.config import Strict, files_by_name
from trainer.evaluation.protocol import Protocol, Results, Scores
from trainer.evaluation.protocols.ijb import IJB
from trainer.evaluation.protocols.megaface import MegaFace
from trainer.evaluation.protocols.pairs import TASK, PairVerification
from trainer.evaluation.protocols.scface import SCFace
from trainer.evaluation.protocols.tinyface import TinyFace
from trainer.inference.embedder import Embedder

# By the keys of SuiteConfig, in the order in which they are evaluated.
_KINDS: dict[str, Callable[[Path], Protocol]] = {
    "pairs": PairVerification,
    "tinyface": TinyFace,
    "scface": SCFace,
    "ijb": IJB,
    "megaface": MegaFace,
}


class ProtocolConfig(Strict):
    """A protocol and where its files are."""

    name: str = Field(min_length=1, description="how results call it")
    path: Path = Field(description="its file or folder, below the suite's folder if relative")


class AverageConfig(Strict):
    """The mean accuracy of some of the pair sets."""

    name: str = Field(min_length=1, description="how results call it")
    of: list[str] = Field(min_length=1, description="names of [[pairs]]")


class SuiteConfig(Strict):
    """Protocols of each kind, and where their files are."""

    folder: Path = Field(Path("data/evaluation"), description="folder below which relative paths are")
    pairs: list[ProtocolConfig] = Field([], description="verification files (.bin)")
    average: list[AverageConfig] = Field([], description="mean accuracies of verification files")
    tinyface: list[ProtocolConfig] = Field([], description="TinyFace's Testing_Set")
    scface: list[ProtocolConfig] = Field([], description="SCFace's SCface_database")
    ijb: list[ProtocolConfig] = Field([], description="IJB-B's or IJB-C's folder of loose_crop and meta")
    megaface: list[ProtocolConfig] = Field([], description="MegaFace's folder of images and devkit")

    @model_validator(mode="after")
    def _names_are_known_and_different(self) -> SuiteConfig:
        names = [entry.name for kind in _KINDS for entry in self.of_kind(kind)]
        names += [average.name for average in self.average]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected different names, found {', '.join(twice)} more than once; rename one")
        pairs = [entry.name for entry in self.pairs]
        for average in self.average:
            unknown = [name for name in average.of if name not in pairs]
            if unknown:
                raise ValueError(
                    f"average {average.name!r}: expected names of [[pairs]] ({', '.join(pairs)}), "
                    f"found {', '.join(unknown)}"
                )
        return self

    def of_kind(self, kind: str) -> list[ProtocolConfig]:
        """The entries under one key."""
        entries: list[ProtocolConfig] = getattr(self, kind)
        return entries


def suite_of_pairs(files: Sequence[Path]) -> SuiteConfig:
    """Verification files alone, called by their names. Raises ValueError if two have one name."""
    pairs = [ProtocolConfig(name=name, path=path) for name, path in files_by_name(files).items()]
    return SuiteConfig(folder=Path(), pairs=pairs)


class Suite:
    """The protocols of a suite, ready to be evaluated. Raises ValueError for files that are no such data."""

    def __init__(self, config: SuiteConfig) -> None:
        self._averages = config.average
        self._protocols = {
            entry.name: kind(config.folder / entry.path)
            for key, kind in _KINDS.items()
            for entry in config.of_kind(key)
        }

    @property
    def names(self) -> list[str]:
        """How results call the protocols, in their order; averages last."""
        return [*self._protocols, *(average.name for average in self._averages)]

    def evaluate(self, embedder: Embedder) -> Results:
        """Every protocol's scores, on rank 0; all ranks call it together, and the others get nothing.

        Raises what `Embedder.embed` and `Protocol.score` raise.
        """
        results: Results = {}
        for name, protocol in self._protocols.items():
            emb_ND = embedder.embed(protocol.faces)
            if emb_ND is not None:
                results[name] = protocol.score(emb_ND)
        return results | {a.name: _average(a, results) for a in self._averages if results}


def _average(average: AverageConfig, results: Results) -> dict[str, Scores]:
    accuracies = [results[name][TASK].figures["accuracy"] for name in average.of]
    convention = f"{average.name}: mean of {', '.join(average.of)}"
    return {TASK: Scores({"accuracy": float(np.mean(accuracies))}, convention)}
