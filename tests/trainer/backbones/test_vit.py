"""ViT: InsightFace's names and shapes, the computation of the layers, masking and stochastic depth."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from trainer.backbones import build, parameter_groups
from trainer.backbones.vit import Block, ViTConfig

# Width and blocks of arcface_torch's vit_t, vit_s, vit_b_dp005_mask_005 and vit_l_dp005_mask_005.
PUBLISHED = {"T": (256, 12), "S": (512, 12), "B": (512, 24), "L": (768, 24)}


def published(width, depth, tokens=144, patch=9, embedding=512):
    """Names and shapes of a state dict of InsightFace, in its order, written down from its naming."""

    def linear(name, inputs, outputs):
        yield f"{name}.weight", (outputs, inputs)
        yield f"{name}.bias", (outputs,)

    def layer_norm(name):
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    def batch_norm(name, size):
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{part}", (size,)
        yield f"{name}.num_batches_tracked", ()

    yield "pos_embed", (1, tokens, width)
    yield "mask_token", (1, 1, width)
    yield "patch_embed.proj.weight", (width, 3, patch, patch)
    yield "patch_embed.proj.bias", (width,)
    for number in range(depth):
        block = f"blocks.{number}"
        yield from layer_norm(f"{block}.norm1")
        yield f"{block}.attn.qkv.weight", (3 * width, width)
        yield from linear(f"{block}.attn.proj", width, width)
        yield from layer_norm(f"{block}.norm2")
        yield from linear(f"{block}.mlp.fc1", width, 4 * width)
        yield from linear(f"{block}.mlp.fc2", 4 * width, width)
    yield from layer_norm("norm")
    yield "feature.0.weight", (width, width * tokens)
    yield from batch_norm("feature.1", width)
    yield "feature.2.weight", (embedding, width)
    yield from batch_norm("feature.3", embedding)


def reference(state, x, depth, patch):
    """The embedding in evaluation, computed from a state dict by name alone."""

    def layer_norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def batch_norm(name, x):
        parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts, training=False, eps=2e-5)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def attention(name, x):
        images, tokens, width = x.shape
        parts = linear(f"{name}.qkv", x).reshape(images, tokens, 3, 8, width // 8)
        heads = []
        for head in range(8):
            q, k, v = parts[:, :, 0, head], parts[:, :, 1, head], parts[:, :, 2, head]
            heads.append((q @ k.transpose(1, 2) / (width // 8) ** 0.5).softmax(2) @ v)
        return linear(f"{name}.proj", torch.cat(heads, dim=2))

    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, state["patch_embed.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"]
    for number in range(depth):
        block = f"blocks.{number}"
        x = x + attention(f"{block}.attn", layer_norm(f"{block}.norm1", x))
        inner = linear(f"{block}.mlp.fc1", layer_norm(f"{block}.norm2", x))
        x = x + linear(f"{block}.mlp.fc2", inner.clamp(0, 6))
    x = layer_norm("norm", x).flatten(1)
    return batch_norm("feature.3", linear("feature.2", batch_norm("feature.1", linear("feature.0", x))))


@pytest.fixture
def small(monkeypatch):
    """A transformer of width 16 and two blocks, over 9 tokens."""
    monkeypatch.setattr(ViTConfig, "shape", (16, 2))
    torch.manual_seed(0)

    def make(**changed):
        return build(ViTConfig(embedding_size=8, patch=5, **changed), 17)

    return make


@pytest.fixture
def images():
    return torch.randn(4, 3, 17, 17, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(size):
    expected = list(published(*PUBLISHED[size]))
    with torch.device("meta"):
        net = build(ViTConfig(size=size), 112)
        net.load_state_dict({name: torch.empty(shape) for name, shape in expected})
    assert [(name, tuple(tensor.shape)) for name, tensor in net.state_dict().items()] == expected


def test_a_published_state_dict_is_computed_as_its_names_say(small, images):
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(shape, generator=generator) + 0.5
        if name.endswith("running_var")
        else torch.randn(shape, generator=generator) * 0.5
        for name, shape in published(16, 2, tokens=9, patch=5, embedding=8)
    }
    net = small().eval()
    net.load_state_dict(state)
    emb_BD, norm_BK, _, penalty = net(images)
    torch.testing.assert_close(emb_BD, reference(state, images, 2, 5), rtol=1e-4, atol=1e-4)
    assert norm_BK.shape == (4, 0)
    assert penalty is None


def test_initial_values_are_the_recipes(small):
    weights = {name: parameter.detach() for name, parameter in small().named_parameters()}
    for name in ("feature.0.weight", "blocks.1.mlp.fc1.weight", "pos_embed"):
        assert weights[name].std() == pytest.approx(0.02, rel=0.2)
        assert weights[name].mean() == pytest.approx(0, abs=5e-3)
    assert weights["mask_token"].abs().max() > 0
    assert weights["blocks.0.attn.proj.bias"].eq(0).all()


def test_positions_and_the_mask_are_not_decayed(small):
    net = small()
    decayed, plain = parameter_groups(net, 0.1)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        name
        for name in names.values()
        if name.endswith("weight")
        and "norm" not in name
        and name not in ("feature.1.weight", "feature.3.weight")
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_hidden_tokens_reach_no_block_and_are_filled_in(small, images):
    net = small(mask_ratio=0.5, drop_path=0).train()
    seen, filled = [], []
    net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net.feature[0].register_forward_pre_hook(lambda _, inputs: filled.append(inputs[0]))
    torch.manual_seed(3)
    net(images).emb_BD.sum().backward()
    assert seen[0].shape == (4, 4, 16)  # int(9 x 0.5) of 9
    token_BNE = filled[0].unflatten(1, (9, 16))
    hidden_BN = (token_BNE == net.mask_token).all(2)
    assert hidden_BN.sum(1).tolist() == [5, 5, 5, 5]
    assert len({tuple(row) for row in hidden_BN.tolist()}) > 1
    # Every token that was seen is at its own place.
    whole_BNE = net.patch_embed["proj"](images).flatten(2).transpose(1, 2) + net.pos_embed
    torch.testing.assert_close(
        seen[0].sort(1).values, whole_BNE[~hidden_BN].unflatten(0, (4, 4)).sort(1).values
    )
    at_B4 = (seen[0][:, :, None] - whole_BNE[:, None]).abs().sum(3).argmin(2)
    for image, places in enumerate(at_B4.tolist()):
        assert {*range(9)} - set(places) == set(hidden_BN[image].nonzero().flatten().tolist())
    torch.manual_seed(3)
    net(images)
    assert torch.equal(seen[1], seen[0])
    net.eval()(images)
    assert seen[2].shape == (4, 9, 16)


def test_blocks_are_left_out_for_some_images_and_scaled_up_for_the_others():
    torch.manual_seed(0)
    block = Block(8, dropout=0.0, drop_path=0.25)
    block.mlp.fc2.weight.data.zero_()
    block.mlp.fc2.bias.data.zero_()
    token_BNE = torch.randn(1, 3, 8).expand(4000, 3, 8)
    whole = block.eval()(token_BNE[:1]) - token_BNE[:1]
    change = block.train()(token_BNE) - token_BNE
    factor_B = (change * whole).sum((1, 2)) / whole.square().sum()
    torch.testing.assert_close(change, factor_B[:, None, None] * whole, atol=1e-5, rtol=1e-4)
    assert torch.isclose(factor_B, torch.tensor(4 / 3), atol=1e-4).logical_or(factor_B.abs() < 1e-6).all()
    assert factor_B.mean().item() == pytest.approx(1, abs=0.05)


def test_every_parameter_is_trained_and_bf16_stays_near(small, images):
    net = small(mask_ratio=0.3).train()
    (net(images).emb_BD * torch.randn(4, 8)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    expected = net.eval()(images).emb_BD
    with torch.autocast("cpu", torch.bfloat16):
        found = net(images).emb_BD
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found, expected).min() > 0.99


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(
        ValueError, match=r"backbone\.patch: expected at most data\.image_size, 17 pixels, found 20"
    ):
        build(ViTConfig(patch=20), 17)


def test_an_unknown_size_lists_the_known_ones():
    with pytest.raises(ValidationError, match="'T', 'S', 'B' or 'L'"):
        ViTConfig(size="H")
