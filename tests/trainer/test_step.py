"""A step of W ranks in A micro-batches is a step of one rank on the whole batch: backbone and head alike."""

import pytest
import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from partial_fc.config import HeadConfig
from partial_fc.head import PartialFC
from tests.ranks import run_ranks
from tests.trainer.test_engine import TinyBackbone
from trainer.config import AdamWConfig, EngineConfig, SGDConfig
from trainer.engine import Engine
from trainer.step import seed_dropout, train_step

GLOBAL_BATCH, CLASSES, STEPS = 12, 7, 3
OPTIMIZERS = {"sgd": SGDConfig, "adamw": AdamWConfig}
STAGES_AND_KINDS = [(stage, kind) for stage in (0, 1, 2, 3) for kind in OPTIMIZERS]


class WithNorms(TinyBackbone):
    """Two branches, each half of the embedding; the statistics are the mean of their norms."""

    branches = 2
    loss_shares = (0.5, 0.2, 0.3)

    def forward(self, images_BCHW):
        features = super().forward(images_BCHW)
        is_first_D = torch.arange(features.emb_BD.shape[1]) < 2
        branch_BKD = torch.stack([features.emb_BD * is_first_D, features.emb_BD * ~is_first_D], dim=1)
        return features._replace(norm_BK=branch_BKD.detach().norm(dim=2), branch_BKD=branch_BKD)

    def update_statistics(self, norm_GK):
        self.counted.copy_(norm_GK.mean(0))


def fresh_head(group):
    config = HeadConfig(scale=8.0, optimizer={"weight_decay": 0.05})
    return PartialFC(config, num_classes=CLASSES, embedding_size=5, seed=2, group=group, device="cpu")


def trained(rank, accumulation):
    world_size = dist.get_world_size()
    micro = GLOBAL_BATCH // world_size // accumulation
    model = WithNorms()
    engine = Engine(
        model,
        EngineConfig(precision="fp32"),
        SGDConfig(weight_decay=0.05),
        micro_batch=micro,
        group=dist.group.WORLD,
        device=torch.device("cpu"),
    )
    head = fresh_head(dist.group.WORLD)
    losses = []
    for step in range(STEPS):
        outcome = train_step(
            engine,
            head,
            batches(step, rank, world_size, micro),
            step=step,
            label_N=global_batch(step)[1],
            accumulation=accumulation,
            learning_rate=0.1,
            group=dist.group.WORLD,
        )
        losses.append(outcome.loss.item())
    state = engine.state()
    rows = {name: tensor.full_tensor() for name, tensor in head.logical_state().items()}
    return losses, {**state["backbone_weight"], **rows, "norms": model.counted.clone()}


def global_batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 2, 2, generator=generator)
    return images, torch.randint(CLASSES, (GLOBAL_BATCH,), generator=generator)


def batches(step, rank, world_size, micro):
    """This rank's micro-batches, cut from the global batch as the loader does."""
    images, labels = global_batch(step)
    for start in range(rank * micro, GLOBAL_BATCH, world_size * micro):
        part = slice(start, start + micro)
        yield Batch(images[part], labels[part], torch.arange(start, start + micro))


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(trained, 1, 1)[0]


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (3, 2), (1, 3)])
def test_the_same_step_on_any_number_of_ranks(one_rank, ranks, accumulation):
    losses, tensors = one_rank
    for found_losses, found in run_ranks(trained, ranks, accumulation):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_loss_is_divided_over_embedding_and_branches(one_rank):
    images, label_G = global_batch(0)
    features, head = WithNorms()(images), fresh_head(None)
    head.begin_step(0, None)
    parts = [
        head.forward_backward(emb_GD.contiguous(), label_G)[0].item()
        for emb_GD in (features.emb_BD, *features.branch_BKD.unbind(1))
    ]
    expected = 0.5 * parts[0] + 0.2 * parts[1] + 0.3 * parts[2]
    assert one_rank[0][0] == pytest.approx(expected, rel=1e-5)


def test_it_learns(one_rank):
    initial = dict(WithNorms().named_parameters())
    assert not torch.equal(one_rank[1]["layers.0.weight"], initial["layers.0.weight"])
    assert one_rank[1]["norms"].all()


def drawn(seed, step, rank):
    seed_dropout(seed, step, rank)
    return torch.rand(4).tolist()


def test_dropout_is_a_function_of_seed_step_and_rank():
    keys = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 500) for rank in (0, 1)]
    found = [drawn(*key) for key in keys]
    assert found == [drawn(*key) for key in keys]
    assert len({tuple(numbers) for numbers in found}) == len(keys)


def message_for_a_bad_label(rank):
    """Return the error of step 5 if sample 10 of its 12 has an invalid label."""
    engine = Engine(
        WithNorms(),
        EngineConfig(precision="fp32"),
        SGDConfig(),
        micro_batch=3,
        group=dist.group.WORLD,
        device=torch.device("cpu"),
    )
    head = PartialFC(
        HeadConfig(), num_classes=CLASSES, embedding_size=5, seed=2, group=dist.group.WORLD, device="cpu"
    )
    mine = list(batches(5, rank, 2, 3))
    for batch in mine:
        batch.label_B[batch.sample_B == 10] = CLASSES
    try:
        train_step(
            engine,
            head,
            mine,
            step=5,
            label_N=None,
            accumulation=2,
            learning_rate=0.1,
            group=dist.group.WORLD,
        )
    except ValueError as error:
        return str(error)


def test_a_label_out_of_range_names_the_sample_on_all_ranks():
    expected = "sample 70, in step 5, has label 7: expected 0 to 6, or -1 to ignore the row"
    for message in run_ranks(message_for_a_bad_label, 2):
        assert message.startswith(expected)


class WithBatchNorm(WithNorms):
    """Statistics that a forward pass leaves behind, and a gradient that can be spoilt on the way."""

    def __init__(self):
        super().__init__()
        self.layers.append(torch.nn.BatchNorm1d(5))
        self.spoil = False
        self.layers[0].weight.register_hook(lambda grad: grad * torch.inf if self.spoil else None)


def one_step(engine, head, rank, step, fault=None):
    """A step; with a fault, one that befalls rank 1 alone, in the last of two micro-batches."""
    is_mine = rank == 1 and fault is not None
    mine = list(batches(step, rank, 2, 3))
    if is_mine and fault == "images":
        mine[1].images_BCHW[0] = torch.nan
    if is_mine and fault == "rows":
        rows = head.weight_RD.clone()
        head.weight_RD[0] = torch.inf

    def spoiling():
        yield mine[0]
        engine.model.spoil = is_mine and fault == "gradient"
        yield mine[1]

    outcome = train_step(
        engine,
        head,
        spoiling(),
        step=step,
        label_N=global_batch(step)[1],
        accumulation=2,
        learning_rate=0.1,
        group=dist.group.WORLD,
    )
    engine.model.spoil = False
    if is_mine and fault == "rows":
        head.weight_RD.copy_(rows)
    return outcome


def with_and_without_faults(rank):
    """For each ZeRO stage and optimizer: outcomes of faulty steps between two good ones; states after, and
    without them."""
    found = {}
    for stage, kind in STAGES_AND_KINDS:
        states, outcomes = [], []
        for faults in (("images", "rows", "gradient"), ()):
            engine = Engine(
                WithBatchNorm(),
                EngineConfig(precision="fp32", zero_stage=stage),
                OPTIMIZERS[kind](weight_decay=0.05, clip_norm=1.0),
                micro_batch=3,
                group=dist.group.WORLD,
                device=torch.device("cpu"),
            )
            head = PartialFC(
                HeadConfig(scale=8.0, sample_rate=0.5, margin={"kind": "adaface", "m": 0.4}),
                num_classes=CLASSES,
                embedding_size=5,
                seed=2,
                group=dist.group.WORLD,
                device="cpu",
            )
            one_step(engine, head, rank, 0)
            outcomes += [tuple(one_step(engine, head, rank, 1, fault)) for fault in faults]
            last = one_step(engine, head, rank, 2)
            assert not last.is_skipped
            engine.synchronize_statistics()
            rows = {
                name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
                for name, tensor in head.logical_state().items()
            }
            state = {
                f"{part} {name}": t.clone()
                for part, named in engine.state().items()
                for name, t in named.items()
            }
            states.append({**state, **rows, "loss": last.loss})
        found[stage, kind] = outcomes, *states
    return found


@pytest.fixture(scope="module")
def faulty():
    return run_ranks(with_and_without_faults, 2)


@pytest.mark.parametrize(("stage", "kind"), STAGES_AND_KINDS)
def test_all_ranks_skip_what_is_not_finite_on_one_and_nothing_moves(faulty, stage, kind):
    for outcomes, after_faults, without_faults in (ranks[stage, kind] for ranks in faulty):
        assert [is_skipped for _, is_skipped, _ in outcomes] == [True, True, True]
        assert [loss.isfinite().item() for loss, *_ in outcomes] == [False, False, True]
        assert after_faults.keys() == without_faults.keys()
        for name, tensor in without_faults.items():
            assert tensor.isfinite().all(), name
            assert torch.equal(after_faults[name], tensor), name
