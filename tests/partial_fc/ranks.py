"""One rank of the jobs that test_ranks.py compares; run as `ranks.py RANK WORLD FOLDER`.

FOLDER holds cases.json. Every rank runs every case among the first `world` ranks and leaves what it saw in
rank{RANK}.pt, by case. Spawning costs seconds, so all cases share one spawn.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from partial_fc import collectives
from partial_fc.config import HeadConfig
from partial_fc.head import PartialFC

LEARNING_RATE = 0.5


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


def micro_batch(case, step, micro):
    """The rows [G, D] and labels [G] of all ranks together: labels repeat, and some are ignored."""
    dice = torch.Generator().manual_seed(1000 * step + micro)
    rows = case["rows"]
    emb_GD = torch.randn(rows, case["width"], generator=dice, dtype=torch.float64) * 3
    label_G = torch.randint(0, case["classes"], (rows,), generator=dice)
    label_G[1] = label_G[0]
    label_G[rows - case["ignored"] :] = -1
    return emb_GD.to(getattr(torch, case["dtype"])), label_G


def run_steps(head, case, group, steps):
    """Losses, complete gradients of this rank's rows, and this rank's state, after `steps`."""
    rank, size = collectives.rank_and_size(group)
    losses, grads = [], []
    for step in steps:
        for micro in range(case["micro_batches"]):
            emb_GD, label_G = micro_batch(case, step, micro)
            mine = slice(rank * len(emb_GD) // size, (rank + 1) * len(emb_GD) // size)
            gathered = collectives.gather(emb_GD[mine], label_G[mine], emb_GD[mine, :0], group)
            loss, grad_GD = head.forward_backward(
                gathered.emb_GD, gathered.label_G, share=1 / case["micro_batches"]
            )
            losses.append(loss)
            grads.append(collectives.scatter(grad_GD, group))
        head.step(LEARNING_RATE)
    return {
        "loss": torch.stack(losses),
        "grad": torch.stack(grads),
        **{
            name: tensor.to_local().clone() if group else tensor.clone()
            for name, tensor in head.logical_state().items()
        },
    }


def run_twins(case, groups):
    """Three steps on the first `world` ranks, and on rank 0 the same alone on the whole batch."""
    group = groups[case["world"]]
    seen = {"sharded": run_steps(make_head(case, group), case, group, range(3))}
    if dist.get_rank() == 0:
        seen["alone"] = run_steps(make_head(case, None), case, None, range(3))
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
    """Save after one step on all ranks; the next step here, and on fewer ranks that load what was saved."""
    everyone = groups[case["world"]]
    head = make_head(case, everyone)
    run_steps(head, case, everyone, range(1))
    dcp.save(head.logical_state(), checkpoint_id=case["folder"], process_group=everyone)
    seen = {str(case["world"]): run_steps(head, case, everyone, range(1, 2))}
    if dist.get_rank() < 2:
        pair = groups[2]
        head = make_head(case, pair)
        dcp.load(head.logical_state(), checkpoint_id=case["folder"], process_group=pair)
        seen["2"] = run_steps(head, case, pair, range(1, 2))
    if dist.get_rank() == 0:
        head = make_head(case, None)
        dcp.load(head.logical_state(), checkpoint_id=case["folder"], no_dist=True)
        seen["1"] = run_steps(head, case, None, range(1, 2))
    return seen


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    runs = {"twins": run_twins, "gather": run_gather, "checkpoint": run_checkpoint}
    cases = json.loads((folder / "cases.json").read_text())
    seen = {name: runs[case["run"]](case, groups) for name, case in cases.items() if rank < case["world"]}
    torch.save(seen, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
