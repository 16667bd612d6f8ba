"""Verification sets, embedded by all ranks together and judged by the pair protocol.

Every rank decodes and embeds an equal, contiguous part of the images, as they are and mirrored (the flip
test: both embeddings are added); the parts are gathered in order, so the result does not depend on the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.decode import decode_all
from data_pipeline.loader import default_threads
from data_pipeline.verification import PairSet, read_pairs
from trainer.distributed import Ranks
from trainer.evaluation.pair_protocol import VerificationResult, verify

Embed = Callable[[torch.Tensor], torch.Tensor]


class PairSets:
    """Verification sets by name, ready to be evaluated. Raises VerificationFileError for a bad file."""

    def __init__(self, files: dict[str, Path], *, image_size: int, batch_size: int, ranks: Ranks) -> None:
        self.sets: dict[str, PairSet] = {name: read_pairs(path) for name, path in files.items()}
        self._files, self._image_size, self._batch_size, self._ranks = files, image_size, batch_size, ranks

    def evaluate(self, embed: Embed) -> dict[str, VerificationResult]:
        """Result of every set, on every rank; all ranks call it together.

        `embed` maps images_BCHW to emb_BD on the ranks' device. Raises DecodeError, naming the file and the
        image, or ValueError if a set is too small for ten folds.
        """
        return {
            name: verify(self._embeddings(name, embed), pairs.issame_P) for name, pairs in self.sets.items()
        }

    def _embeddings(self, name: str, embed: Embed) -> np.ndarray:
        images = self.sets[name].images
        # Equal parts, so that all ranks embed equally often; the surplus at the end is cut off again.
        part = -(-len(images) // self._ranks.world_size)
        start = part * self._ranks.rank
        mine = [images[min(i, len(images) - 1)] for i in range(start, start + part)]
        emb_ND = torch.cat([_with_flip(embed, batch) for batch in self._decoded(mine, start, name)])
        gathered = [torch.empty_like(emb_ND) for _ in range(self._ranks.world_size)]
        dist.all_gather(gathered, emb_ND, group=self._ranks.group)
        return torch.cat(gathered)[: len(images)].cpu().numpy()

    def _decoded(self, images: list[bytes], first: int, name: str) -> Iterable[torch.Tensor]:
        return decode_all(
            images,
            str(self._files[name]),
            first=first,
            batch_size=self._batch_size,
            image_size=self._image_size,
            threads=default_threads(self._ranks.placement.local_world_size),
            device_id=self._ranks.device_id,
        )


def _with_flip(embed: Embed, images_BCHW: torch.Tensor) -> torch.Tensor:
    return embed(images_BCHW) + embed(images_BCHW.flip(3))
