"""IResNet: InsightFace's names and shapes, the computation of the layers, and the accepted image sizes."""

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from trainer.backbones import build
from trainer.backbones.iresnet import IResNetConfig
from trainer.backbones.lgaf import LGAFConfig

# arcface_torch's iresnet18 to iresnet200.
PUBLISHED_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}


def published(blocks, width=64, side=7, embedding=512) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a state dict of InsightFace, in its order, written down from its naming."""

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{part}", (channels,)
        yield f"{name}.num_batches_tracked", ()

    yield "conv1.weight", (width, 3, 3, 3)
    yield from norm("bn1", width)
    yield "prelu.weight", (width,)
    inputs = width
    for stage, count in enumerate(blocks, 1):
        channels = width * 2 ** (stage - 1)
        for number in range(count):
            block = f"layer{stage}.{number}"
            yield from norm(f"{block}.bn1", inputs)
            yield f"{block}.conv1.weight", (channels, inputs, 3, 3)
            yield from norm(f"{block}.bn2", channels)
            yield f"{block}.prelu.weight", (channels,)
            yield f"{block}.conv2.weight", (channels, channels, 3, 3)
            yield from norm(f"{block}.bn3", channels)
            if number == 0:
                yield f"{block}.downsample.0.weight", (channels, inputs, 1, 1)
                yield from norm(f"{block}.downsample.1", channels)
            inputs = channels
    yield from norm("bn2", inputs)
    yield "fc.weight", (embedding, inputs * side * side)
    yield "fc.bias", (embedding,)
    yield from norm("features", embedding)


def reference(state: dict[str, Tensor], blocks, x: Tensor) -> Tensor:
    """The embedding in evaluation, computed from a state dict by name alone."""

    def norm(name, x):
        parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts, training=False, eps=1e-5)

    def conv(name, x, stride):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = F.prelu(norm("bn1", conv("conv1", x, 1)), state["prelu.weight"])
    for stage, count in enumerate(blocks, 1):
        for number in range(count):
            block, stride = f"layer{stage}.{number}", 2 if number == 0 else 1
            out = norm(f"{block}.bn2", conv(f"{block}.conv1", norm(f"{block}.bn1", x), 1))
            out = conv(f"{block}.conv2", F.prelu(out, state[f"{block}.prelu.weight"]), stride)
            if number == 0:
                x = norm(f"{block}.downsample.1", conv(f"{block}.downsample.0", x, stride))
            x = x + norm(f"{block}.bn3", out)
    x = F.linear(norm("bn2", x).flatten(1), state["fc.weight"], state["fc.bias"])
    return norm("features", x)


@pytest.mark.parametrize("depth", PUBLISHED_BLOCKS)
def test_names_and_shapes_are_the_published_ones(depth):
    expected = list(published(PUBLISHED_BLOCKS[depth]))
    with torch.device("meta"):
        net = build(IResNetConfig(depth=depth), 112)
        net.load_state_dict({name: torch.empty(shape) for name, shape in expected})
    assert [(name, tuple(tensor.shape)) for name, tensor in net.state_dict().items()] == expected
    # A block: two kernels, a slope, three norms of five tensors each. A stage: the kernel and norm of its
    # projection. Around them: a kernel, a slope, fc's two, three norms.
    blocks = {18: 8, 34: 16, 50: 24, 100: 49, 200: 98}[depth]
    assert len(expected) == 18 * blocks + 4 * 6 + 19


def test_norms_average_as_the_published_ones():
    norms = [m for m in build(LGAFConfig(blocks=(1, 1, 1, 1)), 32).modules() if hasattr(m, "momentum")]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


def test_a_published_state_dict_loads_and_is_computed_as_its_names_say():
    blocks, generator = (1, 2, 1, 1), torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(shape, generator=generator) + 0.5
        if name.endswith("running_var")
        else torch.randn(shape, generator=generator) * 0.2
        for name, shape in published(blocks, width=4, side=2, embedding=8)
    }
    net = build(IResNetConfig(blocks=blocks, width=4, embedding_size=8), 32).eval()
    net.load_state_dict(state)
    images_BCHW = torch.randn(3, 3, 32, 32, generator=generator)
    emb_BD, norm_BK, branch_BKD, penalty = net(images_BCHW)
    assert branch_BKD is penalty is None
    torch.testing.assert_close(emb_BD, reference(state, blocks, images_BCHW))
    assert norm_BK.shape == (3, 0)
    net.update_statistics(norm_BK)


def test_initial_values_are_the_recipes():
    net = build(IResNetConfig(depth=18), 112)
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    assert weights["layer3.0.conv1.weight"].std() == pytest.approx(0.1, rel=0.01)
    assert weights["layer3.0.conv1.weight"].mean() == pytest.approx(0, abs=1e-3)
    for name in ("bn1", "layer1.0.bn3", "features"):
        assert weights[f"{name}.weight"].eq(1).all()
        assert weights[f"{name}.bias"].eq(0).all()
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["features.weight"]


@pytest.mark.parametrize("image_size", [112, 100, 33, 16])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_any_image_size(image_size, stem_stride):
    config = LGAFConfig(blocks=(1, 1, 1, 1), width=4, embedding_size=8, stem_stride=stem_stride)
    assert build(config, image_size).eval()(torch.zeros(1, 3, image_size, image_size)).emb_BD.shape == (1, 8)


def test_images_of_another_size_are_refused(lgaf):
    with pytest.raises(ValueError, match=r"expected images of 32x32 pixels, .*found 32x40.*data\.image_size"):
        lgaf(torch.zeros(1, 3, 32, 40))


def test_an_unknown_depth_lists_the_known_ones():
    with pytest.raises(ValidationError, match="18, 34, 50, 100 or 200"):
        LGAFConfig(depth=101)


def test_a_stage_without_blocks_is_refused():
    with pytest.raises(ValidationError, match=r"at least one block .* found \[1, 0, 1, 1\]"):
        LGAFConfig(blocks=(1, 0, 1, 1))
