"""Pooling of faces into templates: a known answer by hand, and plain loops as a twin."""

import numpy as np
import pytest

from trainer.evaluation.metrics import similarity
from trainer.evaluation.metrics.templates import pooled


def test_known_answer_by_hand():
    emb = np.array([[2, 0], [4, 0], [0, 8], [1, 1]], np.float32)
    # Template 0: a medium of two frames, one of them of half confidence, and an image. Template 1: one image.
    template = pooled(emb, np.array([0, 0, 0, 1]), np.array([5, 5, 6, 6]), np.array([1, 0.5, 1, 1]))
    np.testing.assert_allclose(template, [[(2 + 2) / 2, 8], [1, 1]])


@pytest.mark.parametrize("rows", [16384, 7])
def test_equals_plain_loops_whatever_the_order_and_the_chunks(rows, monkeypatch):
    monkeypatch.setattr(similarity.chunks, "__defaults__", (rows,))
    rng = np.random.default_rng(0)
    template, medium = rng.permutation(np.repeat(np.arange(20), 15)), rng.integers(0, 4, 300)
    emb, confidence = rng.normal(size=(300, 8)).astype(np.float32), rng.random(300)
    twin = np.zeros((20, 8))
    for t in range(20):
        for m in range(4):
            chosen = (template == t) & (medium == m)
            if chosen.any():
                twin[t] += (emb[chosen] * confidence[chosen, None]).mean(0)
    np.testing.assert_allclose(pooled(emb, template, medium, confidence), twin, rtol=1e-4, atol=1e-5)
