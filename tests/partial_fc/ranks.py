"""The work of one rank in the jobs that test_ranks.py compares.

Every rank runs every case among the first `world` ranks and returns what it saw, by case. Spawning costs
seconds, so all cases share one spawn.
"""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from partial_fc import collectives
from partial_fc.config import HeadConfig
from partial_fc.head import PartialFC


def make_head(case, group):
    return PartialFC(
        HeadConfig(**case["head"]),
        num_classes=case["classes"],
        embedding_size=case["width"],
        seed=3,
        group=group,
        device="cpu",
        dtype=getattr(torch, case["dtype"]),
    )


def whole_batch(case, step):
    """The rows and labels of a step, of all ranks and micro-batches: labels repeat, some are ignored."""
    dice = torch.Generator().manual_seed(step)
    rows = case["rows"]
    emb_ND = torch.randn(rows, case["width"], generator=dice, dtype=torch.float64) * 3
    label_N = torch.randint(0, case["classes"], (rows,), generator=dice)
    label_N[1] = label_N[0]
    label_N[rows - case["ignored"] :] = -1
    return emb_ND.to(getattr(torch, case["dtype"])), label_N


def run_steps(head, case, group, steps, micro_batches):
    """Losses of the steps, complete gradients of this rank's rows, and this rank's state afterwards."""
    rank, size = collectives.rank_and_size(group)
    losses, grads = [], []
    for step in steps:
        emb_ND, label_N = whole_batch(case, step)
        head.begin_step(step, label_N)
        loss = 0
        for emb_GD, label_G in zip(emb_ND.chunk(micro_batches), label_N.chunk(micro_batches), strict=True):
            mine = slice(rank * len(emb_GD) // size, (rank + 1) * len(emb_GD) // size)
            gathered = collectives.gather(emb_GD[mine], label_G[mine], emb_GD[mine, :0], group)
            micro_loss, grad_GD = head.forward_backward(
                gathered.emb_GD, gathered.label_G, share=1 / micro_batches
            )
            loss += micro_loss / micro_batches
            grads.append(collectives.scatter(grad_GD, group))
        losses.append(loss)
        head.step(case["learning_rate"])
    state = head.logical_state()
    is_shard = {name: hasattr(tensor, "to_local") for name, tensor in state.items()}
    return {
        "loss": torch.stack(losses),
        "grad": torch.stack(grads),
        "rows": {
            name: (tensor.to_local() if is_shard[name] else tensor).clone()
            for name, tensor in state.items()
            if tensor.ndim
        },
        "statistics": {name: tensor.clone() for name, tensor in state.items() if not tensor.ndim},
    }


def run_twins(case, groups):
    """Three steps on the first `world` ranks; and on rank 0 the same alone, each step's batch in one piece.

    With ignored rows the pieces stay: they average over their own counted rows.
    """
    group, micro_batches = groups[case["world"]], case["micro_batches"]
    seen = {"sharded": run_steps(make_head(case, group), case, group, range(3), micro_batches)}
    if dist.get_rank() == 0:
        pieces = micro_batches if case["ignored"] else 1
        seen["alone"] = run_steps(make_head(case, None), case, None, range(3), pieces)
        seen["start"] = make_head(case, None).weight_RD
    return seen


def run_gather(case, groups):
    """Embeddings of any bits, labels and norms from all ranks, and a sum that every rank gets its rows of."""
    group = groups[case["world"]]
    dice = torch.Generator().manual_seed(dist.get_rank())
    bits = torch.randint(-(2**15), 2**15, (5, 3), generator=dice, dtype=torch.int16)
    sent = (
        bits.view(torch.bfloat16),
        torch.randint(-1, 2**62, (5,), generator=dice),
        torch.rand(5, case["norms"], generator=dice),
    )
    partial_GD = torch.rand(5 * case["world"], 3, generator=dice)
    return {
        "sent": sent,
        "received": tuple(collectives.gather(*sent, group)),
        "partial": partial_GD,
        "scattered": collectives.scatter(partial_GD, group),
    }


def run_checkpoint(case, groups):
    """Save after one step on all ranks; compute the next step here, and on fewer ranks after loading."""
    everyone = groups[case["world"]]
    head = make_head(case, everyone)
    run_steps(head, case, everyone, range(1), 1)
    dcp.save(head.logical_state(), checkpoint_id=case["folder"], process_group=everyone)
    seen = {str(case["world"]): run_steps(head, case, everyone, range(1, 2), 1)}
    if dist.get_rank() < 2:
        pair = groups[2]
        head = make_head(case, pair)
        dcp.load(head.logical_state(), checkpoint_id=case["folder"], process_group=pair)
        seen["2"] = run_steps(head, case, pair, range(1, 2), 1)
    if dist.get_rank() == 0:
        head = make_head(case, None)
        dcp.load(head.logical_state(), checkpoint_id=case["folder"], no_dist=True)
        seen["1"] = run_steps(head, case, None, range(1, 2), 1)
    return seen


def run_cases(rank, cases):
    groups = {size: dist.new_group(list(range(size))) for size in range(1, dist.get_world_size() + 1)}
    runs = {"twins": run_twins, "gather": run_gather, "checkpoint": run_checkpoint}
    return {name: runs[case["run"]](case, groups) for name, case in cases.items() if rank < case["world"]}
