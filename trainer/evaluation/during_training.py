"""Evaluation of a run while it trains, on the verification sets of its configuration and on its suite."""

from __future__ import annotations

from pathlib import Path

from trainer import config_file
from trainer.evaluation.metrics.verification import VerificationResult
from trainer.evaluation.protocol import Results
from trainer.evaluation.protocols.pairs import TASK, PairVerification, scores_of
from trainer.evaluation.suite import Suite, SuiteConfig
from trainer.inference.embedder import Embedder


class Evaluation:
    """Verification sets by name, and a suite. Raises ValueError for invalid files or equal names.

    verified: the last evaluation's verification results, by the names of the sets. results: its scores of
    sets and suite. Both are filled on rank 0 only.
    """

    def __init__(self, sets: dict[str, Path], suite: Path | None, image_size: int, batch_size: int) -> None:
        self.image_size, self.batch_size = image_size, batch_size
        self.sets = {name: PairVerification(path) for name, path in sets.items()}
        self.suite = Suite(config_file.load(SuiteConfig, suite) if suite else SuiteConfig())
        self.verified: dict[str, VerificationResult] = {}
        self.results: Results = {}
        both = [name for name in self.sets if name in self.suite.names]
        if both:
            raise ValueError(
                f"{suite}: expected other names than those of evaluation.sets, found {', '.join(both)}; "
                "rename it there, or remove it from evaluation.sets"
            )

    @property
    def names(self) -> list[str]:
        """Names of the sets, followed by those of the suite."""
        return [*self.sets, *self.suite.names]

    def run(self, embedder: Embedder) -> None:
        """Evaluate sets and suite, all ranks together; if it is interrupted, the previous results remain."""
        verified = {}
        for name, pairs in self.sets.items():
            emb_ND = embedder.embed(pairs.faces)
            if emb_ND is not None:
                verified[name] = pairs.judge(emb_ND)
        of_suite = self.suite.evaluate(embedder)
        self.verified = verified
        self.results = {name: {TASK: scores_of(result)} for name, result in verified.items()} | of_suite
