"""Row optimizers against torch's, on slices and on rows picked by number."""

import pytest
import torch

from partial_fc.optim import RowAdamWConfig, RowSGDConfig

CONFIGS = {
    "sgd": RowSGDConfig(momentum=0.8, weight_decay=0.01),
    "adamw": RowAdamWConfig(beta1=0.8, beta2=0.99, weight_decay=0.01),
}
RATES = (0.1, 0.2, 0.3, 0.05)


def torch_optimizer(config, parameter):
    if config.kind == "adamw":
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW([parameter], lr=1.0, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD([parameter], lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay)


def torch_rows(config, weight_RD, steps):
    """Every row a parameter of its own, which torch steps when it has a gradient."""
    parameters = [torch.nn.Parameter(row.clone()) for row in weight_RD]
    optimizers = [torch_optimizer(config, parameter) for parameter in parameters]
    for rows, grad_TD, rate in steps:
        for row, grad_D in zip(rows, grad_TD, strict=True):
            parameters[row].grad = grad_D
            optimizers[row].param_groups[0]["lr"] = rate
            optimizers[row].step()
    return torch.stack([parameter.data for parameter in parameters])


@pytest.mark.parametrize("name", CONFIGS)
def test_all_rows_in_slices_are_torchs(name):
    weight_RD, grads = torch.randn(5, 3), torch.randn(4, 5, 3)
    ours = weight_RD.clone()
    optimizer = CONFIGS[name].build(ours)
    for grad_RD, rate in zip(grads, RATES, strict=True):
        for part in (slice(0, 2), slice(2, 5)):
            optimizer.update(part, grad_RD[part].clone(), rate)
    steps = [(range(5), grad_RD, rate) for grad_RD, rate in zip(grads, RATES, strict=True)]
    torch.testing.assert_close(ours, torch_rows(CONFIGS[name], weight_RD, steps))


@pytest.mark.parametrize("name", CONFIGS)
def test_picked_rows_are_torchs_and_the_others_rest(name):
    weight_RD = torch.randn(9, 3)
    ours, steps = weight_RD.clone(), []
    optimizer = CONFIGS[name].build(ours)
    for number, rate in enumerate(RATES):
        rows = torch.tensor([[0, 4, 7], [1, 4, 5], [0, 1, 4], [4, 5, 7]][number])
        grad_TD = torch.randn(3, 3)
        steps.append((rows.tolist(), grad_TD.clone(), rate))
        optimizer.update(rows, grad_TD, rate)
    torch.testing.assert_close(ours, torch_rows(CONFIGS[name], weight_RD, steps))
    assert torch.equal(ours[[2, 3, 6, 8]], weight_RD[[2, 3, 6, 8]])


@pytest.mark.parametrize(
    "config",
    [RowSGDConfig(moments="bf16"), RowAdamWConfig(beta2=0.99, moments="bf16")],
    ids=lambda config: config.kind,
)
def test_moments_of_bfloat16_take_half_the_memory_and_the_same_way(config):
    """Over 100 steps down a bowl, the rows end where those with float32 moments do, within a hundredth."""
    weight_RD = torch.randn(50, 8)
    short, full = weight_RD.clone(), weight_RD.clone()
    optimizers = [
        (short, config.build(short)),
        (full, config.model_copy(update={"moments": "fp32"}).build(full)),
    ]
    for _ in range(100):
        for weights, optimizer in optimizers:
            optimizer.update(slice(0, 50), weights.clone(), 0.002)
    moments = {name: value.dtype for name, value in optimizers[0][1].state.items() if name != "updates"}
    assert set(moments.values()) == {torch.bfloat16}
    assert (full - weight_RD).abs().mean() > 0.1
    assert (short - full).abs().max() < 0.02 * (full - weight_RD).abs().max()
