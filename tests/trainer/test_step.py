"""A step of W ranks in A micro-batches is a step of one rank on the whole batch: backbone and head alike."""

import pytest
import torch
import torch.distributed as dist

from data_pipeline.loader import Batch
from partial_fc.config import HeadConfig
from partial_fc.head import PartialFC
from tests.ranks import run_ranks
from tests.trainer.test_engine import TinyBackbone
from trainer.config import EngineConfig, OptimizerConfig
from trainer.engine import Engine
from trainer.step import seed_dropout, train_step

GLOBAL_BATCH, CLASSES, STEPS = 12, 7, 3


class WithNorms(TinyBackbone):
    """Two branches' norms, of which the statistics are the mean."""

    branches = 2

    def forward(self, images_BCHW):
        emb_BD, _ = super().forward(images_BCHW)
        halves = torch.stack([emb_BD[:, :2].norm(dim=1), emb_BD[:, 2:].norm(dim=1)], dim=1)
        return type(super().forward(images_BCHW))(emb_BD, halves.detach())

    def update_statistics(self, norm_GK):
        self.counted.copy_(norm_GK.mean(0))


def trained(rank, accumulation):
    world_size = dist.get_world_size()
    micro = GLOBAL_BATCH // world_size // accumulation
    model = WithNorms()
    engine = Engine(
        model,
        EngineConfig(precision="fp32"),
        OptimizerConfig(weight_decay=0.05),
        micro_batch=micro,
        group=dist.group.WORLD,
        device=torch.device("cpu"),
    )
    head = PartialFC(
        HeadConfig(scale=8.0, weight_decay=0.05),
        num_classes=CLASSES,
        embedding_size=5,
        seed=2,
        group=dist.group.WORLD,
        device="cpu",
    )
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
    return losses, {**state["weight"], **rows, "norms": model.counted.clone()}


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
