"""Templates: several images and video frames of one person, pooled into one embedding.

Frames of one medium are averaged, then media are summed. Each face is weighted by its embedding's norm and
the detector's confidence, as in "N1D1F2" of InsightFace's recognition/_evaluation_/ijb/ijb_11.py.

Shapes: N faces, D dimensions, T templates.
"""

from __future__ import annotations

import numpy as np

from trainer.evaluation.metrics.similarity import chunks


def pooled(
    emb_ND: np.ndarray, template_N: np.ndarray, medium_N: np.ndarray, confidence_N: np.ndarray
) -> np.ndarray:
    """Return the templates' embeddings, float32 [T, D], not normalised: the norm measures their quality.

    template_N: template numbers from 0 to T - 1. medium_N: numbers of media, unique within a template.
    emb_ND: may be a memory map.
    """
    order_N = np.lexsort((medium_N, template_N))
    template_N, medium_N = template_N[order_N], medium_N[order_N]
    new_N = np.append(True, (np.diff(template_N) != 0) | (np.diff(medium_N) != 0))
    frames = np.diff(np.append(np.flatnonzero(new_N), len(new_N)))
    # The sum over media of the mean over frames is one weighted sum over faces.
    weight_N = (confidence_N[order_N] / np.repeat(frames, frames)).astype(np.float32)
    template_TD = np.zeros((int(template_N[-1]) + 1, emb_ND.shape[1]), np.float32)
    for part in chunks(len(order_N)):
        starts = np.flatnonzero(np.append(True, np.diff(template_N[part]) != 0))
        weighted_ND = emb_ND[order_N[part]] * weight_N[part, None]
        template_TD[template_N[part][starts]] += np.add.reduceat(weighted_ND, starts, axis=0)
    return template_TD
