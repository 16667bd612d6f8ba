"""Real ranks for tests: processes with a gloo group, started once for as many checks as one likes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.runtime.ranks import leave


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns on each rank; its exceptions come out here.

    `function` must be importable by name. The results must be what torch can pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (function, world_size, folder, arguments), nprocs=world_size)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)  # written by the lines below
            for rank in range(world_size)
        ]


def _enter(
    rank: int, function: Callable[..., Any], world_size: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    # As a launcher sets them; some libraries read these for themselves.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    leave(0)  # as ranks of `lgaf` do
