"""Comparison of two images: their similarity, the quality of each, and the decision threshold of a run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.evaluation.metrics.verification import cosine_similarity
from trainer.inference.embed import look, read_image
from trainer.inference.network import Network
from trainer.monitoring.metrics_log import is_number, read


class Threshold(NamedTuple):
    """The lowest similarity at which two images are judged as one person, and the source of this value."""

    value: float
    source: str


def compare(network: Network, first: Path, second: Path) -> tuple[float, list[float]]:
    """Return the cosine similarity of two images, with flip test, and the quality of each.

    Raises DecodeError, naming the file, if one cannot be read as an image.
    """
    images = [read_image(path, network.image_size) for path in (first, second)]
    columns = look(network.model, np.stack(images), flip=True)
    return float(cosine_similarity(columns["embedding"])[0]), columns["quality"].tolist()


def known_threshold(checkpoint: Path, step: int) -> Threshold | None:
    """Return the mean of the thresholds of the run's sets at `step`; None if `step` was not evaluated.

    checkpoint: a run directory, or a checkpoint in one. The thresholds are read from the run's records, since
    its result.json holds only the last step.
    """
    if checkpoint.is_file():
        return None  # a file with a network can be anywhere, even in another run's folder
    for run_dir in (checkpoint, checkpoint.resolve().parent.parent):
        records = [r for r in read(run_dir) if (r["kind"], r["step"]) == ("evaluation", step)]
        threshold_of = {
            str(record.get("set")): record["threshold"]
            for record in records
            if is_number(record.get("threshold"))
        }
        if threshold_of:
            mean = sum(threshold_of.values()) / len(threshold_of)
            return Threshold(mean, f"evaluation on {', '.join(threshold_of)} at step {step} of {run_dir}")
    return None
