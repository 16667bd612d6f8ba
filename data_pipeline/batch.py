"""A micro-batch, and the division of a step's samples among ranks.

Step t consists of the samples [t * G, (t + 1) * G) of one infinite sequence, where G is the global batch. The
step is split into accumulation micro-batches m, and each of them over the W ranks:

    t * G                                                    (t + 1) * G
    | m = 0: rank 0 | rank 1 | ... | rank W-1 | m = 1: rank 0 | ... |

The samples of a step are therefore the same on any number of ranks.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """One micro-batch of one rank: images float32 [B, 3, H, W] RGB in [-1, 1], labels and sample positions
    int64 [B]; labels are on the images' device, positions on the CPU."""

    images_BCHW: torch.Tensor
    label_B: torch.Tensor
    sample_B: torch.Tensor


class RankSlice(NamedTuple):
    """The part of every global batch that belongs to this rank."""

    rank: int
    world_size: int
    global_batch: int
    micro_batch: int

    @property
    def accumulation(self) -> int:
        """Number of micro-batches per step. Raises ValueError if the global batch cannot be split evenly."""
        per_round = self.world_size * self.micro_batch
        if self.global_batch % per_round:
            raise ValueError(
                f"a global batch of {self.global_batch} does not divide into micro-batches of "
                f"{self.micro_batch} on {self.world_size} ranks: it must be a multiple of {per_round}, "
                f"such as {max(1, self.global_batch // per_round) * per_round}"
            )
        return self.global_batch // per_round

    def samples(self, micro_batch_number: int) -> np.ndarray:
        """Return the sample positions int64 [micro_batch] of this rank's n-th micro-batch since step 0."""
        step, round_number = divmod(micro_batch_number, self.accumulation)
        start = step * self.global_batch
        start += (round_number * self.world_size + self.rank) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


def default_threads(ranks_on_node: int) -> int:
    """Return the decode threads of one rank: its share of the node's cores, or the cores it is bound to."""
    return min(len(os.sched_getaffinity(0)), max(1, (os.cpu_count() or 1) // ranks_on_node))
