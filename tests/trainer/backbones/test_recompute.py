"""Computing blocks again in the backward pass changes no value, gradient or statistic, and keeps less."""

import pytest
import torch

from trainer.backbones import build
from trainer.backbones.iresnet import IResNetConfig
from trainer.backbones.lgaf import LGAFConfig, MHMSConfig
from trainer.backbones.vit import ViTConfig

NETWORKS = {
    "iresnet": IResNetConfig(blocks=(1, 2, 1, 1), width=8, embedding_size=16, dropout=0.3),
    "lgaf": LGAFConfig(
        blocks=(1, 2, 1, 1),
        width=8,
        embedding_size=16,
        dropout=0.3,
        mhms=MHMSConfig(heads=((1, 3), (5,)), divergence=0.1, head_drop=0.3),
    ),
    "vit": ViTConfig(embedding_size=16, dropout=0.3, size="T", patch=8, drop_path=0.5),
}


def step(config, recompute, images):
    """Values, gradients and statistics of a training step, and the bytes kept for its backward pass."""
    torch.manual_seed(0)
    net = build(config.model_copy(update={"recompute": recompute}), 32).train()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        emb_BD, norm_BK, _, penalty = net(images)
        loss = (emb_BD * torch.linspace(-1, 1, 16)).sum() + (0 if penalty is None else penalty)
    after_forward = [buffer.clone() for buffer in net.buffers()]
    loss.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(map(torch.equal, after_forward, net.buffers()))
    return (
        [emb_BD, norm_BK, loss, *grads, *net.buffers()],
        sum(size for pointer, size in kept.items() if pointer not in own),
        len(grads),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_with_less_kept(name):
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected, kept, grads = step(NETWORKS[name], False, images)
    found, kept_less, _ = step(NETWORKS[name], True, images)
    assert grads > 20
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert kept_less < 0.5 * kept


def test_without_gradients_nothing_is_prepared():
    net = build(NETWORKS["lgaf"].model_copy(update={"recompute": True}), 32).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 32, 32)).emb_BD.grad_fn is None
