"""The engine on several ranks is one plain SGD step on the whole batch, at every ZeRO stage."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import run_ranks
from trainer.backbones import Backbone, Features
from trainer.config import EngineConfig, OptimizerConfig
from trainer.engine import Engine

RANKS, MICRO_BATCH, ACCUMULATION, STEPS = 2, 4, 2, 3
OPTIMIZER = OptimizerConfig(momentum=0.9, weight_decay=0.05)


class TinyBackbone(Backbone):
    """No batch statistics, so that ranks see what one process sees; a frozen parameter, as iresnet has; a
    penalty, as lgaf can have."""

    embedding_size, branches = 5, 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(12, 7), nn.PReLU(7), nn.Linear(7, 5))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("counted", torch.zeros(2))

    def forward(self, images_BCHW):
        emb_BD = self.layers(images_BCHW.flatten(1)) * self.frozen
        return Features(emb_BD, emb_BD.new_empty(len(emb_BD), 0), 0.5 * emb_BD.square().sum(1).mean())


def micro_batches(step):
    """Images and gradients of the whole micro-batches of a step, over all ranks."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(ACCUMULATION):
        yield (
            torch.randn(RANKS * MICRO_BATCH, 3, 2, 2, generator=generator),
            torch.randn(RANKS * MICRO_BATCH, 5, generator=generator),
        )


def rate(step):
    return 0.1 / (step + 1)


def train(engine, rank, steps):
    mine = slice(rank * MICRO_BATCH, (rank + 1) * MICRO_BATCH)
    engine.train()
    for step in steps:
        for images, grad in micro_batches(step):
            features = engine.forward(images[mine])
            engine.backward(features.emb_BD, grad[mine], features.penalty, share=1 / ACCUMULATION)
        engine.step(rate(step))


def new_engine(stage, model=None, momentum=None, precision="fp32"):
    return Engine(
        model or TinyBackbone(),
        EngineConfig(zero_stage=stage, precision=precision),
        OPTIMIZER,
        micro_batch=MICRO_BATCH,
        group=dist.group.WORLD,
        device=torch.device("cpu"),
        momentum=momentum,
    )


def trained_at_all_stages(rank):
    """For each stage: the state after all steps, and the same with a new engine made in between, and with the
    state in between loaded again."""
    found = {}
    for stage in (0, 1, 2, 3):
        engine = new_engine(stage)
        fresh = copied(engine.state())
        train(engine, rank, range(1))
        state = copied(engine.state())
        train(engine, rank, range(1, STEPS))
        straight = copied(engine.state())
        model = TinyBackbone()
        model.load_state_dict({**model.state_dict(), **state["backbone_weight"]})
        again = new_engine(stage, model, state["backbone_momentum"])
        train(again, rank, range(1, STEPS))
        engine.load_state(state)
        train(engine, rank, range(1, STEPS))
        image = next(micro_batches(0))[0]
        found[stage] = fresh, straight, copied(again.state()), again.embed(image), copied(engine.state())
    return found


def momentum_in_bfloat16(rank):
    """Share of the numbers of the momentum that bfloat16 would hold, after a step with bf16 products."""
    shares = {}
    for stage in (0, 1, 2):
        engine = new_engine(stage, precision="bf16")
        train(engine, rank, range(1))
        momentum = torch.cat([tensor.flatten() for tensor in engine.state()["backbone_momentum"].values()])
        shares[stage] = (momentum == momentum.bfloat16()).float().mean().item()
    return shares


def copied(state):
    return {
        part: {name: t.detach().clone() for name, t in tensors.items()} for part, tensors in state.items()
    }


@pytest.fixture(scope="module")
def by_rank():
    return run_ranks(trained_at_all_stages, RANKS)


@pytest.fixture(scope="module")
def plain():
    """One process, torch's SGD, whole batches."""
    model = TinyBackbone()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    sgd = torch.optim.SGD([{"params": decayed, "weight_decay": 0.05}, {"params": others}], momentum=0.9)
    for step in range(STEPS):
        for images, grad in micro_batches(step):
            emb_BD = model(images).emb_BD
            # The penalty by hand: the mean over all images of half the squared length.
            emb_BD.backward(grad + emb_BD.detach() / len(emb_BD) / ACCUMULATION)
        for group in sgd.param_groups:
            group["lr"] = rate(step)
        sgd.step()
        sgd.zero_grad()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model, named, {name: sgd.state[p]["momentum_buffer"] for name, p in named.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_equal_one_plain_process(by_rank, plain, stage):
    model, weights, momenta = plain
    for found in by_rank:
        _, straight, _, embedded, _ = found[stage]
        for name, weight in weights.items():
            torch.testing.assert_close(
                straight["backbone_weight"][name], weight.detach(), rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                straight["backbone_momentum"][name], momenta[name], rtol=1e-5, atol=1e-5
            )
        assert straight["backbone_weight"].keys() == straight["backbone_momentum"].keys() == weights.keys()
        assert straight["backbone_buffer"].keys() == {"counted"}
        expected = model(next(micro_batches(0))[0]).emb_BD.detach()
        torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_taken_between_steps_goes_on_to_the_same_bits(by_rank, stage):
    for found in by_rank:
        _, straight, again, _, back = found[stage]
        for part in ("backbone_weight", "backbone_momentum"):
            for name, tensor in straight[part].items():
                assert torch.equal(again[part][name], tensor)
                assert torch.equal(back[part][name], tensor)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_taken_before_the_first_step(by_rank, stage):
    fresh = by_rank[0][stage][0]
    initial = dict(TinyBackbone().named_parameters())
    assert all(torch.equal(tensor, initial[name]) for name, tensor in fresh["backbone_weight"].items())
    assert not any(tensor.any() for tensor in fresh["backbone_momentum"].values())


def test_with_bf16_products_gradients_are_still_summed_in_float32():
    # Gradients of a bf16 product come out of it rounded; their sums over micro-batches and ranks do not.
    for shares in run_ranks(momentum_in_bfloat16, RANKS):
        assert all(share < 0.7 for share in shares.values()), shares
