"""Write a checkpoint with two ranks, or read one: started under every Python that there is.

python -m tests.trainer.checkpoint.across_pythons write|read RUN_DIR
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from partial_fc.collectives import logical
from partial_fc.partition import class_range
from tests.ranks import run_ranks
from trainer.checkpoint import sharded
from trainer.checkpoint.directory import Header

CLASSES = 7


def state(rank: int, size: int, *, is_blank: bool) -> sharded.State:
    """Tensors of several dtypes, one without dimensions, and rows that are divided over the ranks."""
    rows_CD = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(1))
    mine = class_range(CLASSES, rank, size)
    tensors = {
        "weight": rows_CD[mine.start : mine.stop],
        "momentum": rows_CD.bfloat16()[mine.start : mine.stop],
    }
    whole = {
        "backbone_weight": {"é.weight": rows_CD.T.contiguous()},
        "backbone_buffer": {"n": torch.tensor(3)},
    }
    if is_blank:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        whole = {part: {n: torch.zeros_like(t) for n, t in group.items()} for part, group in whole.items()}
    group = dist.group.WORLD
    return {**whole, "head": {name: logical(tensor, CLASSES, group) for name, tensor in tensors.items()}}


def write(rank: int, run_dir: Path) -> None:
    """Save the state on two ranks."""
    part = sharded.share_out(state(rank, 2, is_blank=False), rank, 2)
    header = Header(4, {"run_dir": str(run_dir)}, {"images": 7}, {"python": sys.version})
    sharded.save(run_dir, part, header, keep=1, group=dist.group.WORLD)


def read(rank: int, size: int, run_dir: Path) -> None:
    """Load the saved state and compare it bit for bit."""
    found, expected = state(rank, size, is_blank=True), state(rank, size, is_blank=False)
    sharded.load(sharded.locate(run_dir, group=dist.group.WORLD), found, group=dist.group.WORLD)
    for part, tensors in expected.items():
        for name, tensor in tensors.items():
            other = found[part][name]
            if hasattr(tensor, "to_local"):
                tensor, other = tensor.to_local(), other.to_local()
            assert torch.equal(other, tensor), (part, name)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        run_ranks(write, 2, Path(sys.argv[2]))
    else:
        for size in (1, 3):
            run_ranks(read, size, size, Path(sys.argv[2]))
