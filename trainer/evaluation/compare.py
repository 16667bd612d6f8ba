"""Two pictures compared: how similar, how good each is, and the similarity by which a run parts people."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.evaluation.metrics.verification import cosine_similarity
from trainer.inference.embed import look, read_picture
from trainer.inference.network import Network
from trainer.monitoring.metrics_log import read


class Threshold(NamedTuple):
    """The similarity from which on two pictures show one person, and who says so."""

    value: float
    source: str


def compare(network: Network, first: Path, second: Path) -> tuple[float, list[float]]:
    """Cosine similarity of two pictures, with flip test, and the quality of each.

    Raises DecodeError, naming the file, if one is no picture.
    """
    pictures = [read_picture(path, network.image_size) for path in (first, second)]
    columns = look(network.model, np.stack(pictures), flip=True)
    return float(cosine_similarity(columns["embedding"])[0]), columns["quality"].tolist()


def known_threshold(checkpoint: Path, step: int) -> Threshold | None:
    """The mean of the thresholds that the run's sets were judged by at `step`; None if it was not evaluated.

    `checkpoint` is a run directory, or a checkpoint in one. What the run recorded is asked, not its
    result.json, which knows the last step only.
    """
    if checkpoint.is_file():
        return None  # a network alone may lie anywhere, in another run's folder too
    for run_dir in (checkpoint, checkpoint.resolve().parent.parent):
        records = [r for r in read(run_dir) if (r["kind"], r["step"]) == ("evaluation", step)]
        threshold_of = {record["set"]: record["threshold"] for record in records if "threshold" in record}
        if threshold_of:
            mean = sum(threshold_of.values()) / len(threshold_of)
            return Threshold(mean, f"evaluation on {', '.join(threshold_of)} at step {step} of {run_dir}")
    return None
