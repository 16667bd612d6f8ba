"""LGAF: its modules against values by hand, its running statistics, and the network as a whole."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from trainer.backbones import build, parameter_groups
from trainer.backbones.lgaf import (
    GLOBAL,
    LGF,
    LOCAL,
    MHMS,
    SE,
    LANet,
    LGAFConfig,
    LGFConfig,
    MHMSConfig,
    MSNet,
    batch_statistics,
    similarity,
)


def set_weights(module: nn.Module, **values: object) -> None:
    """Set parameters by dotted name, `__` for the dot, filling each in the order of its shape."""
    for name, value in values.items():
        parameter = module.get_parameter(name.replace("__", "."))
        parameter.data = torch.tensor(value, dtype=torch.float32).reshape(parameter.shape)


def test_lanet_scales_each_cell_by_what_its_channels_say():
    lanet = LANet(2, reduction=2)
    set_weights(lanet, squeeze__weight=[1, -1], squeeze__bias=[0.5], excite__weight=[2], excite__bias=[-1])
    map_BCHW = torch.tensor([[[[1.0, 0.0]], [[0.5, 3.0]]]])
    # cell 0: relu(1 - 0.5 + 0.5) = 1, sigmoid(2 - 1); cell 1: relu(0 - 3 + 0.5) = 0, sigmoid(-1)
    attention = torch.tensor([0.7310586, 0.2689414])
    torch.testing.assert_close(lanet(map_BCHW), attention.reshape(1, 1, 1, 2))


def test_shared_attention_gives_the_others_what_some_cells_lose():
    lanet = LANet(1, reduction=1, shared=True)
    set_weights(lanet, squeeze__weight=[1], squeeze__bias=[0], excite__weight=[1], excite__bias=[0])
    # sigmoid(0) = 1/2 where there is nothing, sigmoid(log 3) = 3/4 where there is
    map_BCHW = torch.tensor([0.0, 1.0986123, 1.0986123, 0.0]).reshape(1, 1, 2, 2)
    expected = torch.tensor([0.8, 1.2, 1.2, 0.8]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(lanet(map_BCHW), expected, rtol=0.01, atol=0)
    assert lanet(torch.randn(3, 1, 5, 5)).mean((1, 2, 3)).sub(1).abs().max() < 0.01


def test_the_local_branch_alone_has_no_later_stages_and_no_attention(config, images):
    net = build(config.model_copy(update={"local_only": True, "lgf": LGFConfig(branch_share=0.4)}), 32)
    assert net.global_branch is net
    assert not any("layer4" in name or "trunk.fc" in name for name, _ in net.named_parameters())
    fusion = net.fuse(images)
    assert fusion.weight_BK.eq(1).all()
    assert fusion.weight_BK.shape == (6, 1)
    features = net(images)
    assert features.branch_BKD is None  # it would be the embedding once more
    assert net.loss_shares == (1,)
    features.emb_BD.square().sum().backward()
    net.update_statistics(fusion.norm_BK)
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_se_scales_each_channel_by_what_all_means_say():
    se = SE(2, reduction=2)
    set_weights(se, squeeze__weight=[1, 2], squeeze__bias=[-1], excite__weight=[1, -1], excite__bias=[0, 0.5])
    map_BCHW = torch.tensor([[[[1.0, 3.0]], [[0.0, 1.0]]]])
    # means 2 and 0.5: relu(2 + 1 - 1) = 2; sigmoid(2) and sigmoid(-1.5)
    attention = torch.tensor([0.8807971, 0.1824255])
    torch.testing.assert_close(se(map_BCHW), map_BCHW * attention[:, None, None])


def test_msnet_sees_as_far_as_its_largest_kernel_and_keeps_the_size():
    msnet = MSNet(3, 4, (1, 5)).eval()
    map_BCHW = torch.zeros(1, 3, 9, 9, requires_grad=True)
    out = msnet(map_BCHW)
    assert out.shape == (1, 4, 9, 9)
    out[0, :, 4, 4].sum().backward()
    seen_HW = map_BCHW.grad.abs().sum((0, 1)) > 0
    expected_HW = torch.zeros(9, 9, dtype=torch.bool)
    expected_HW[2:7, 2:7] = True
    assert seen_HW.equal(expected_HW)
    assert [scale[0].kernel_size for scale in msnet.scales] == [(1, 1), (5, 5)]


def test_similarity_by_hand():
    # Image 0: cosines 1, 0 and 0 of three heads; image 1: all alike, whatever the size of the attention.
    attention_BHN = torch.tensor(
        [[[0.2, 0.0], [0.9, 0.0], [0.0, 0.5]], [[0.1, 0.1], [0.8, 0.8], [0.5, 0.5]]], requires_grad=True
    )
    found = similarity(attention_BHN)
    torch.testing.assert_close(found, torch.tensor((1 / 3 + 1) / 2))
    found.backward()
    # It does not fall when a head looks at everything less.
    along_BH = (attention_BHN.grad * attention_BHN.detach()).sum(2)
    torch.testing.assert_close(along_BH, torch.zeros(2, 3), atol=1e-6, rtol=0)


def with_mhms(config, **changed):
    torch.manual_seed(0)
    return build(config.model_copy(update={"mhms": config.mhms.model_copy(update=changed)}), 32)


def test_divergence_is_a_term_of_the_loss_in_training_alone(config, lgaf, images):
    net = with_mhms(config, divergence=0.5)
    penalty = net.train()(images).penalty
    attention_BHN = net.mhms(net.trunk.maps(images)[1])[1]
    torch.testing.assert_close(penalty, 0.5 * similarity(attention_BHN))
    assert net.eval()(images).penalty is None
    assert lgaf.train()(images).penalty is None
    for head in net.mhms.heads:
        nn.init.normal_(head.lanet.excite.weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=1)
    net.train()
    for _ in range(20):
        optimizer.zero_grad()
        net(images).penalty.backward()
        optimizer.step()
    assert net(images).penalty < 0.9 * penalty


def test_one_head_cannot_diverge():
    with pytest.raises(ValidationError, match=r"divergence = 0\.1, .* at least two heads, found one"):
        MHMSConfig(heads=((1, 3),), divergence=0.1)


def test_dropped_heads_leave_the_others_scaled_and_the_expectation(config):
    mhms = MHMS(8, 4, 16, MHMSConfig(heads=((1,), (3,), (5,), (7,)), head_drop=0.25, grid=2))
    map_BCHW = torch.randn(1, 8, 4, 4).expand(4000, 8, 4, 4)
    mhms.fc = nn.Identity()
    mhms.fc.weight = torch.zeros(1)
    mhms.features = nn.Identity()
    for head in mhms.heads:
        head.eval()
    torch.manual_seed(1)
    dropped_BHN = mhms(map_BCHW)[0].unflatten(1, (4, -1))
    whole_HN = mhms.eval()(map_BCHW[:1])[0].unflatten(1, (4, -1))[0]
    factor_BH = (dropped_BHN * whole_HN).sum(2) / whole_HN.square().sum(1)
    torch.testing.assert_close(dropped_BHN, factor_BH[:, :, None] * whole_HN)
    assert torch.isclose(factor_BH, torch.tensor(4 / 3)).logical_or(factor_BH == 0).all()
    torch.testing.assert_close(factor_BH.mean(0), torch.ones(4), atol=0.05, rtol=0)
    mhms.head_drop.train()
    torch.manual_seed(1)
    assert mhms(map_BCHW)[0].unflatten(1, (4, -1)).equal(dropped_BHN)


def test_lgf_by_hand():
    lgf = LGF(2, 2, LGFConfig(attention_scale=2, clip=1.5))
    lgf.norm_mean.copy_(torch.tensor([4.0, 10.0]))
    lgf.norm_std.copy_(torch.tensor([1.999, 3.999]))  # 0.001 is added
    feature_BKD = torch.tensor([[[3.0, 4.0], [0.0, 8.0]], [[100.0, 0.0], [6.0, 8.0]]])
    fusion = lgf(feature_BKD)
    torch.testing.assert_close(fusion.norm_BK, torch.tensor([[5.0, 8.0], [100.0, 10.0]]))
    torch.testing.assert_close(fusion.quality_BK, torch.tensor([[0.5, -0.5], [1.5, 0.0]]))
    # softmax of (1, -1) and of (3, 0)
    weight_BK = torch.tensor([[0.8807971, 0.1192029], [0.9525741, 0.0474259]])
    torch.testing.assert_close(fusion.weight_BK, weight_BK)
    # unit features (0.6, 0.8) and (0, 1); (1, 0) and (0.6, 0.8)
    direction_BD = torch.tensor([[0.5284783, 0.8238406], [0.9810296, 0.0379407]])
    length_B1 = torch.tensor([[5 * 0.8807971 + 8 * 0.1192029], [100 * 0.9525741 + 10 * 0.0474259]])
    torch.testing.assert_close(fusion.emb_BD, length_B1 * F.normalize(direction_BD))


@settings(max_examples=50, deadline=None)
@given(norms=st.lists(st.floats(0.1, 60), min_size=2, max_size=2))
def test_attention_sums_to_one_and_leans_to_the_better_branch(norms):
    lgf = LGF(4, 2, LGFConfig())
    lgf.norm_mean.copy_(torch.tensor([20.0, 12.0]))
    lgf.norm_std.copy_(torch.tensor([4.0, 2.0]))
    fusion = lgf(torch.ones(1, 2, 4) / 2 * torch.tensor(norms)[:, None])
    assert fusion.weight_BK.sum().item() == pytest.approx(1)
    quality, weight = fusion.quality_BK[0], fusion.weight_BK[0]
    assert (weight[GLOBAL] > weight[LOCAL]) == (quality[GLOBAL] > quality[LOCAL])


def test_without_scale_the_branches_are_equal():
    fusion = LGF(4, 2, LGFConfig(attention_scale=0))(torch.randn(5, 2, 4))
    assert fusion.weight_BK.eq(0.5).all()


def test_attention_starts_near_equal_weights(lgaf, images):
    assert (lgaf.fuse(images).weight_BK - 0.5).abs().max() < 0.1


def test_forward_reads_the_statistics_and_only_the_update_changes_them(lgaf, images):
    before = lgaf.lgf.norm_mean.clone(), lgaf.lgf.norm_std.clone()
    norm_BK = lgaf.train()(images).norm_BK
    assert lgaf.lgf.norm_mean.equal(before[0])
    assert lgaf.lgf.norm_std.equal(before[1])
    lgaf.update_statistics(norm_BK)
    torch.testing.assert_close(lgaf.lgf.norm_mean, 0.9 * before[0] + 0.1 * norm_BK.mean(0))
    torch.testing.assert_close(lgaf.lgf.norm_std, 0.9 * before[1] + 0.1 * norm_BK.std(0, correction=0))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 300))
def test_statistics_do_not_depend_on_the_order_of_the_batch(seed, batch):
    generator = torch.Generator().manual_seed(seed)
    norm_GK = torch.rand(batch, 2, generator=generator) * 20 + 10
    for got, expected in zip(
        batch_statistics(norm_GK[torch.randperm(batch, generator=generator)]),
        batch_statistics(norm_GK),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert got.equal(expected)


def test_loss_reaches_both_branches_but_not_through_their_norms(lgaf, images):
    feature_BKD = torch.randn(3, 2, 16, requires_grad=True)
    (lgaf.lgf(feature_BKD).emb_BD * torch.randn(3, 16)).sum().backward()
    assert (feature_BKD.grad.norm(dim=2) > 0.01).all()
    along_BK = (feature_BKD.grad * F.normalize(feature_BKD, dim=2)).sum(2)
    torch.testing.assert_close(along_BK, torch.zeros(3, 2), atol=1e-5, rtol=0)
    emb_BD, norm_BK, branch_BKD, _ = lgaf(images)
    assert not norm_BK.requires_grad
    assert branch_BKD is None
    (emb_BD * torch.randn(6, 16)).sum().backward()
    for name, parameter in lgaf.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


def test_norms_that_learn_have_the_gradient_of_the_attention():
    lgf = LGF(4, 2, LGFConfig(learned=True, attention_scale=1.0))
    lgf.norm_std.fill_(1.0)
    feature_BKD = torch.randn(3, 2, 4, dtype=torch.float64) * 0.5 + 1
    wanted_BD = torch.randn(3, 4, dtype=torch.float64)

    def loss(feature_BKD):
        # The length takes no part: a direction has no gradient along itself.
        return (F.normalize(lgf.double()(feature_BKD).emb_BD, dim=1) * wanted_BD).sum()

    assert torch.autograd.gradcheck(loss, feature_BKD.requires_grad_())


def test_a_share_of_the_loss_falls_to_each_branch(config, images):
    lgf = LGFConfig(branch_share=0.4)
    net = build(config.model_copy(update={"lgf": lgf}), 32)
    features, fusion = net(images), net.fuse(images)
    assert net.loss_shares == pytest.approx((0.6, 0.2, 0.2))
    torch.testing.assert_close(F.normalize(features.branch_BKD, dim=2), fusion.unit_BKD)
    length_BK = features.emb_BD.norm(dim=1, keepdim=True).expand(-1, 2)
    torch.testing.assert_close(features.branch_BKD.norm(dim=2), length_BK)
    features.branch_BKD.sum().backward()
    assert net.trunk.fc.weight.grad.any()
    assert net.mhms.fc.weight.grad.any()


def test_every_trained_parameter_is_in_one_group(lgaf):
    decayed, plain = parameter_groups(lgaf, 5e-4)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (5e-4, 0)
    ids = [id(parameter) for parameter in decayed["params"] + plain["params"]]
    assert sorted(ids) == sorted(id(p) for p in lgaf.parameters() if p.requires_grad)
    matrices = {id(m.weight) for m in lgaf.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == matrices


def test_autocast_keeps_norms_and_fusion_in_float32(lgaf, images):
    expected = lgaf.eval().fuse(images)
    with torch.autocast("cpu", torch.bfloat16):
        fusion = lgaf.fuse(images)
    for value, wanted in zip(fusion, expected, strict=True):
        assert value.dtype == torch.float32
        assert F.cosine_similarity(value, wanted, dim=-1).min() > 0.98
    # A norm that had been rounded to bfloat16 would have 16 zeros at its end.
    assert (fusion.norm_BK.view(torch.int32) & 0xFFFF).any()
    with torch.autocast("cpu", torch.bfloat16):
        lgaf.train()(images).emb_BD.sum().backward()


def test_an_image_is_embedded_the_same_alone_and_in_a_batch(lgaf, images):
    lgaf.eval()
    alone = lgaf(images[2:3])
    torch.testing.assert_close(alone.emb_BD, lgaf(images).emb_BD[2:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.emb_BD, lgaf.fuse(images[2:3]).emb_BD)


def test_channels_last_changes_no_value(config, lgaf, images):
    expected = lgaf.eval()(images)
    lgaf.to(memory_format=torch.channels_last)
    found = lgaf(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found.emb_BD, expected.emb_BD, rtol=1e-4, atol=1e-4)


def test_copies_and_loaded_states_are_the_same_network(config, lgaf, images):
    lgaf.update_statistics(lgaf(images).norm_BK)
    fresh = build(config, 32)
    fresh.load_state_dict(lgaf.state_dict())
    expected = lgaf.eval().fuse(images)
    for twin in (copy.deepcopy(lgaf), fresh.eval()):
        for value, wanted in zip(twin.fuse(images), expected, strict=True):
            assert value.equal(wanted)


@pytest.mark.parametrize(("stage", "channels", "side"), [(2, 16, 8), (3, 32, 4), (4, 64, 2)])
@pytest.mark.parametrize("grid", [1, 3])
def test_the_heads_can_read_any_later_stage(config, images, stage, channels, side, grid):
    mhms = MHMSConfig(stage=stage, grid=grid, head_reduction=4, heads=((1, 3), (5,)))
    net = build(config.model_copy(update={"mhms": mhms}), 32)
    assert net.mhms.fc.in_features == 2 * (channels // 4) * min(grid, side) ** 2
    assert net(images).emb_BD.shape == (6, 16)


@torch.no_grad()
def test_the_local_branch_costs_little():
    net = build(LGAFConfig(depth=100), 112).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 112, 112))
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    assert flops["LGAF.trunk.layer1.0"] > 0
    assert 0.01 < flops["LGAF.mhms"] / (flops["LGAF"] - flops["LGAF.mhms"]) < 0.10
    # R100 is published as 12.1 G multiply-adds, each of them two operations.
    assert (flops["LGAF"] - flops["LGAF.mhms"]) / 2e9 == pytest.approx(12.1, abs=0.1)


@pytest.mark.parametrize("heads", [[[3, 4]], [[3], []], [[-1]]])
def test_kernels_without_a_centre_are_refused(heads):
    with pytest.raises(ValidationError, match=r"kernel size.* each odd and positive"):
        MHMSConfig(heads=heads)


def test_heads_begin_as_the_trunk_does(lgaf):
    weights = dict(lgaf.named_parameters())
    assert weights["mhms.heads.0.msnet.scales.1.0.weight"].std().item() == pytest.approx(0.1, rel=0.1)
    for name, parameter in lgaf.mhms.named_parameters():
        if name.endswith(("squeeze.bias", "excite.bias")):
            assert parameter.eq(0).all(), name
    assert weights["mhms.features.weight"].eq(1).all()
    assert not weights["mhms.features.weight"].requires_grad
