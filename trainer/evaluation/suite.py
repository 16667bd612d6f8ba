"""A suite of protocols, configured in a file, and its evaluation on all ranks together.

    suite = Suite(config_file.load(SuiteConfig, Path("configs/eval/standard.toml"), ["folder=/data"]))
    results = suite.evaluate(embedder)          # on rank 0; empty on the others

The constructor reads the lists of all protocols, so that a missing file is reported before the first image is
embedded. The evaluation embeds one protocol after the other; rank 0 scores the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from trainer.config import Strict, files_by_name
from trainer.evaluation.protocol import EvaluationProtocol, Results, Scores
from trainer.evaluation.protocols.ijb import IJB
from trainer.evaluation.protocols.megaface import MegaFace
from trainer.evaluation.protocols.pairs import TASK, PairVerification
from trainer.evaluation.protocols.scface import SCFace
from trainer.evaluation.protocols.tinyface import TinyFace
from trainer.inference.embedder import Embedder


class ProtocolConfig(Strict):
    """A protocol and the path of its files."""

    name: str = Field(min_length=1, description="name in the results")
    path: Path = Field(description="its file or folder; a relative path is below the suite's folder")


class AverageConfig(Strict):
    """The mean accuracy of several verification files."""

    name: str = Field(min_length=1, description="name in the results")
    of: list[str] = Field(min_length=1, description="names of [[pairs]]")


class SuiteConfig(Strict):
    """The protocols of a suite, and the folder of their files.

    A key's annotation holds the class of its protocols; they are evaluated in the order of the keys.
    """

    folder: Path = Field(Path("data/evaluation"), description="base folder of relative paths")
    pairs: Annotated[list[ProtocolConfig], PairVerification] = Field(
        [], description="verification files (.bin)"
    )
    average: list[AverageConfig] = Field([], description="mean accuracies of verification files")
    tinyface: Annotated[list[ProtocolConfig], TinyFace] = Field([], description="TinyFace's Testing_Set")
    scface: Annotated[list[ProtocolConfig], SCFace] = Field([], description="SCFace's SCface_database")
    ijb: Annotated[list[ProtocolConfig], IJB] = Field(
        [], description="IJB-B's or IJB-C's folder with loose_crop and meta"
    )
    megaface: Annotated[list[ProtocolConfig], MegaFace] = Field(
        [], description="MegaFace's folder with images and devkit"
    )

    @model_validator(mode="after")
    def _names_are_known_and_different(self) -> SuiteConfig:
        names = [entry.name for entry, _ in self.protocols()]
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
                    f"found {', '.join(unknown)}; correct the name"
                )
        return self

    def protocols(self) -> Iterator[tuple[ProtocolConfig, Callable[[Path], EvaluationProtocol]]]:
        """Yield every protocol with its class, in the order of evaluation."""
        for key, field in type(self).model_fields.items():
            for protocol in field.metadata:
                yield from ((entry, protocol) for entry in getattr(self, key))


def suite_of_pairs(files: Sequence[Path]) -> SuiteConfig:
    """Return a suite of verification files, named by the files. Raises ValueError if two names are equal."""
    pairs = [ProtocolConfig(name=name, path=path) for name, path in files_by_name(files).items()]
    return SuiteConfig(folder=Path(), pairs=pairs)


class Suite:
    """The protocols of a suite, ready for evaluation. Raises ValueError for missing or invalid files."""

    def __init__(self, config: SuiteConfig) -> None:
        self._averages = config.average
        self._protocols = {
            entry.name: protocol(config.folder / entry.path) for entry, protocol in config.protocols()
        }

    @property
    def names(self) -> list[str]:
        """Names of the protocols in the results, in order; averages last."""
        return [*self._protocols, *(average.name for average in self._averages)]

    def evaluate(self, embedder: Embedder) -> Results:
        """Return every protocol's scores on rank 0, and an empty dictionary on the others.

        All ranks call it together. Raises the errors of `Embedder.embed` and `EvaluationProtocol.score`.
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
