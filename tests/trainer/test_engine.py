"""The engine on several ranks is one plain step of torch on the whole batch, at every ZeRO stage."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import run_ranks
from trainer.backbones import Backbone, Features, build
from trainer.backbones.lgaf import LGAFConfig
from trainer.config import AdamWConfig, EngineConfig, SGDConfig
from trainer.engine import Engine

RANKS, MICRO_BATCH, ACCUMULATION, STEPS = 2, 4, 2, 3
OPTIMIZERS = {
    "sgd": SGDConfig(momentum=0.9, weight_decay=0.05),
    # Some gradients are longer than clip_norm, and some are not.
    "adamw": AdamWConfig(beta1=0.8, beta2=0.95, weight_decay=0.5, clip_norm=17.0),
}
MOMENTS = {
    "sgd": {"backbone_momentum": "momentum_buffer"},
    "adamw": {"backbone_first_moment": "exp_avg", "backbone_second_moment": "exp_avg_sq"},
}
CASES = [(kind, stage) for kind in OPTIMIZERS for stage in (0, 1, 2, 3)]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")


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
        penalty = 0.5 * emb_BD.square().sum(1).mean()
        return Features(emb_BD, emb_BD.new_empty(len(emb_BD), 0), penalty=penalty)


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


def new_engine(stage, kind="sgd", **engine):
    return Engine(
        TinyBackbone(),
        EngineConfig(**{"zero_stage": stage, "precision": "fp32"} | engine),
        OPTIMIZERS[kind],
        micro_batch=MICRO_BATCH,
        group=dist.group.WORLD,
        device=torch.device("cpu"),
    )


def trained_at_all_stages(rank):
    """For each case: the state after all steps, and the same with a new engine made in between, and with the
    state in between loaded again."""
    found = {}
    for kind, stage in CASES:
        engine = new_engine(stage, kind)
        fresh = copied(engine.state())
        train(engine, rank, range(1))
        state = copied(engine.state())
        train(engine, rank, range(1, STEPS))
        straight = copied(engine.state())
        again = new_engine(stage, kind)
        again.load_state(state)
        train(again, rank, range(1, STEPS))
        engine.load_state(state)
        train(engine, rank, range(1, STEPS))
        image = next(micro_batches(0))[0]
        found[kind, stage] = (
            fresh,
            straight,
            copied(again.state()),
            again.embed(image),
            copied(engine.state()),
        )
    return found


def trained_with(rank, **engine):
    """The state after all steps, and an embedding."""
    model = new_engine(1, **engine)
    train(model, rank, range(STEPS))
    return copied(model.state()), model.embed(next(micro_batches(0))[0])


def in_other_ways(rank):
    """What is said where no compiler is; training plainly and compiled; in both layouts."""
    return (
        without_a_compiler(),
        [trained_with(rank, compile=compile) for compile in (False, True)],
        [convolutional(rank, channels_last) for channels_last in (False, True)],
    )


def without_a_compiler():
    import torch._inductor.config as inductor

    with (
        inductor.patch("cpp.cxx", (None, "/nowhere/g++")),
        pytest.raises(ValueError, match="compiler") as caught,
    ):
        new_engine(1, compile=True)
    return str(caught.value)


def convolutional(rank, channels_last):
    """State and embedding after two steps of a convolutional network, and whether a map inside had its
    channels last each time."""
    torch.manual_seed(0)
    engine = Engine(
        build(LGAFConfig(blocks=(1, 1, 1, 1), width=16, embedding_size=16), 32),
        EngineConfig(precision="fp32", channels_last=channels_last),
        OPTIMIZERS["sgd"],
        micro_batch=4,
        group=dist.group.WORLD,
        device=torch.device("cpu"),
    )
    layouts = []
    engine.model.trunk.layer3[0].register_forward_hook(
        lambda _, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    for _ in range(2):
        engine.train()
        features = engine.forward(images)
        engine.backward(features.emb_BD, torch.linspace(-1, 1, 16).expand(4, 16))
        engine.step(0.01)
    return copied(engine.state()), engine.embed(images), layouts


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
    """One process, torch's optimizers, whole batches."""
    return {kind: trained_plainly(kind) for kind in OPTIMIZERS}


def trained_plainly(kind):
    model = TinyBackbone()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    if kind == "sgd":
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    else:
        groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    norms = []
    for step in range(STEPS):
        for images, grad in micro_batches(step):
            emb_BD = model(images).emb_BD
            # The penalty by hand: the mean over all images of half the squared length.
            emb_BD.backward(grad + emb_BD.detach() / len(emb_BD) / ACCUMULATION)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        if OPTIMIZERS[kind].clip_norm:
            norms.append(
                torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZERS[kind].clip_norm).item()
            )
        optimizer.step()
        optimizer.zero_grad()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {
        part: {name: optimizer.state[p][key] for name, p in named.items()}
        for part, key in MOMENTS[kind].items()
    }
    return model, named, moments, norms


def test_a_gradient_is_cut_where_it_is_too_long_and_only_there(plain):
    norms = plain["adamw"][3]
    assert min(norms) < OPTIMIZERS["adamw"].clip_norm < max(norms), norms


@every_case
def test_ranks_equal_one_plain_process(by_rank, plain, case):
    model, weights, moments, _ = plain[case[0]]
    for found in by_rank:
        _, straight, _, embedded, _ = found[case]
        straight = dict(straight)
        for name, weight in weights.items():
            torch.testing.assert_close(
                straight["backbone_weight"][name], weight.detach(), rtol=1e-5, atol=1e-6
            )
            for part, moment in moments.items():
                torch.testing.assert_close(straight[part][name], moment[name], rtol=1e-5, atol=1e-5)
        for part in ("backbone_weight", *moments):
            assert straight.pop(part).keys() == weights.keys()
        assert straight.pop("backbone_buffer").keys() == {"counted"}
        assert straight == ({"backbone_updates": {"count": STEPS}} if case[0] == "adamw" else {})
        expected = model(next(micro_batches(0))[0]).emb_BD.detach()
        torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-5)


@every_case
def test_a_state_taken_between_steps_goes_on_to_the_same_bits(by_rank, case):
    for found in by_rank:
        _, straight, again, _, back = found[case]
        assert straight.keys() == again.keys() == back.keys()
        for part, tensors in straight.items():
            for name, tensor in tensors.items():
                assert torch.equal(again[part][name], tensor)
                assert torch.equal(back[part][name], tensor)


@every_case
def test_a_state_taken_before_the_first_step(by_rank, case):
    fresh = by_rank[0][case][0]
    initial = dict(TinyBackbone().named_parameters())
    assert all(torch.equal(tensor, initial[name]) for name, tensor in fresh["backbone_weight"].items())
    for part in (*MOMENTS[case[0]], *({"backbone_updates"} & fresh.keys())):
        assert not any(tensor.any() for tensor in fresh[part].values())


def assert_alike(found, expected, tolerance):
    for part, tensors in expected[0].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[0][part][name], tensor, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def other_ways():
    if " " in torch.__file__:
        pytest.skip("torch's compiler does not work in a path with spaces")
    return run_ranks(in_other_ways, 1)[0]


def test_who_does_not_compile_does_not_wait_for_the_compiler():
    code = """
        import sys
        from trainer import engine
        from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
        from deepspeed.runtime.zero.muon.original_muon import muon_update
        assert muon_update.__name__ == "muon_update"
        assert "torch._inductor" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=True)


def test_a_missing_compiler_is_named(other_ways):
    assert "engine.compile needs a C++ compiler, found none: install g++" in other_ways[0]


def test_a_compiled_network_computes_the_same(other_ways):
    expected, found = other_ways[1]
    assert found[0]["backbone_weight"].keys() == expected[0]["backbone_weight"].keys()
    assert_alike(found, expected, 1e-5)


def test_channels_last_computes_the_same(other_ways):
    expected, found = other_ways[2]
    assert expected[2] == [False] * 3
    assert found[2] == [True] * 3
    assert_alike(found, expected, 1e-3)


def test_with_bf16_products_gradients_are_still_summed_in_float32():
    # Gradients of a bf16 product come out of it rounded; their sums over micro-batches and ranks do not.
    for shares in run_ranks(momentum_in_bfloat16, RANKS):
        assert all(share < 0.7 for share in shares.values()), shares
