"""The head's collectives: the only module of the package that calls torch.distributed.

    gather           emb_BD, label_B, norm_BK -> those of all ranks        one all-gather
    reduce_targets   target cosines of a shard -> those of all classes     one all-reduce of 8 G bytes
    reduce_softmax   lse_G, target_G of a shard -> those of all classes    one all-reduce of 16 G bytes
    scatter          partial grad_GD -> complete grad_BD                   one reduce-scatter
    logical          rows of a shard -> the one tensor of all classes      no communication

Shapes: B rows of a rank, G = W x B rows of all W ranks, R of C classes. No byte count depends on C.
Every function takes its `group`; None means a single process, and nothing is sent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# PyTorch 2.13 renamed these two and warns at every call of the old names, the only ones of PyTorch 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gathered(NamedTuple):
    """Rows of all ranks: rank 0's first, then rank 1's, and so on."""

    emb_GD: Tensor
    label_G: Tensor
    norm_GK: Tensor


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in the group and the group's size."""
    return (0, 1) if group is None else (group.rank(), group.size())


def gather(emb_BD: Tensor, label_B: Tensor, norm_BK: Tensor, group: dist.ProcessGroup | None) -> Gathered:
    """Return embeddings, labels and K further numbers per row (K may be 0) of all ranks, bit for bit.

    All ranks must pass the same shapes and dtypes.
    """
    # Latency dominates, so there is one collective: the three parts are packed as the bytes of one row.
    parts = (emb_BD.detach(), label_B[:, None], norm_BK.detach())
    if group is None:
        return Gathered(parts[0], label_B, parts[2])
    packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
    packed_G = packed.new_empty(group.size() * len(packed), packed.shape[1])
    _all_gather(packed_G, packed, group=group)
    widths = [part.shape[1] * part.element_size() for part in parts]
    emb_GD, label_G1, norm_GK = (
        _unpack(piece, part) for piece, part in zip(packed_G.split(widths, dim=1), parts, strict=True)
    )
    return Gathered(emb_GD, label_G1[:, 0], norm_GK)


def _unpack(bytes_GN: Tensor, like_BM: Tensor) -> Tensor:
    """Return the numbers [G, M] stored in a column of bytes, copied to memory aligned for their dtype."""
    numbers_GM = like_BM.new_empty(len(bytes_GN), like_BM.shape[1])
    numbers_GM.view(torch.uint8).copy_(bytes_GN)
    return numbers_GM


def scatter(grad_GD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `grad_GD` over the ranks and return this rank's B rows."""
    if group is None:
        return grad_GD
    grad_BD = grad_GD.new_empty(len(grad_GD) // group.size(), *grad_GD.shape[1:])
    _reduce_scatter(grad_BD, grad_GD.contiguous(), group=group)
    return grad_BD


def reduce_targets(cos_G: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the target cosines, float64 [G], on all ranks.

    `cos_G` holds those of this shard, and 0 for rows whose target is on another rank.
    """
    cos_G = cos_G.double()
    if group is not None:
        dist.all_reduce(cos_G, group=group)
    return cos_G


def reduce_softmax(
    others_lse_G: Tensor, target_G: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over all classes but the target and the target logit, both float64 [G].

    A shard without other classes passes lse -inf; a shard that does not own a row's target passes target 0.
    """
    # In float64 the exponential of any logit that HeadConfig allows is in range: a plain sum reduces both,
    # and no common maximum has to be reduced first.
    sums_2G = torch.stack([others_lse_G.double().exp(), target_G.double()])
    if group is not None:
        dist.all_reduce(sums_2G, group=group)
    return sums_2G[0].log(), sums_2G[1]


def logical(local_RD: Tensor, num_classes: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return the [C, D] tensor of which `local_RD` is this rank's shard; both share memory.

    With a group it is a DTensor, which torch.distributed.checkpoint writes and reads in ranges. Without a
    group it is `local_RD` itself.
    """
    if group is None:
        return local_RD
    mesh = DeviceMesh.from_group(group, local_RD.device.type)
    shape = torch.Size([num_classes, *local_RD.shape[1:]])
    return DTensor.from_local(
        local_RD, mesh, [Shard(0)], run_check=False, shape=shape, stride=local_RD.stride()
    )
