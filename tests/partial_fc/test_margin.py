"""Margins over all cosines: value, closed-form derivative, and what holds beyond theta + m = pi."""

import math

import pytest
import torch

from partial_fc import margin
from partial_fc.config import MarginConfig

MARGINS = [("arcface", 0.0), ("arcface", 0.3), ("arcface", 0.5), ("arcface", 1.5), ("cosface", 0.4)]
POLE = margin.ArcFace.NEAR_POLE


def build(kind, m):
    return margin.build(MarginConfig(kind=kind, m=m))


def cosines():
    """All of [-1, 1], denser towards its ends, and a little beyond, where rounding leads."""
    theta = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    near = 10.0 ** torch.linspace(-12, -3, 40, dtype=torch.float64)
    beyond = 1 + torch.tensor([1e-7, 1e-6], dtype=torch.float64)
    return torch.cat([theta.cos(), 1 - near, near - 1, beyond, -beyond]).sort().values


@pytest.mark.parametrize(("kind", "m"), MARGINS)
def test_the_derivative_is_that_of_autograd(kind, m):
    cos_G = cosines().requires_grad_()
    logit_G, slope_G = build(kind, m).target(cos_G)
    (expected_G,) = torch.autograd.grad(logit_G.sum(), cos_G)
    torch.testing.assert_close(slope_G, expected_G, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("kind", "m"), MARGINS)
def test_the_derivative_is_that_of_finite_differences(kind, m):
    cos_G, h = torch.linspace(-0.999, 0.999, 2000, dtype=torch.float64), 1e-6
    target = build(kind, m).target
    rise_G = (target(cos_G + h)[0] - target(cos_G - h)[0]) / (2 * h)
    torch.testing.assert_close(target(cos_G)[1], rise_G, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "m"), MARGINS)
def test_the_logit_rises_with_the_cosine_without_jumps(kind, m):
    cos_G = cosines()
    logit_G, slope_G = build(kind, m).target(cos_G)
    steps_G = logit_G.diff()
    assert (steps_G >= 0).all()
    assert (steps_G <= torch.maximum(slope_G[1:], slope_G[:-1]) * cos_G.diff() * 1.01 + 1e-6).all()


@pytest.mark.parametrize("m", [0.3, 0.5, 1.5])
def test_arcface_is_the_cosine_of_the_moved_angle_as_far_as_pi(m):
    theta_G = torch.linspace(math.sqrt(2 * POLE) * 1.01, math.pi - m, 1000, dtype=torch.float64)
    logit_G, _ = build("arcface", m).target(theta_G.cos())
    torch.testing.assert_close(logit_G, (theta_G + m).cos(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [0.3, 0.5, 1.5])
def test_arcface_beyond_pi_goes_on_falling_with_the_angle(m):
    theta_G = torch.linspace(
        math.pi - m + 1e-6, math.pi - math.sqrt(2 * POLE) * 1.01, 1000, dtype=torch.float64
    )
    logit_G, slope_G = build("arcface", m).target(theta_G.cos())
    torch.testing.assert_close(logit_G, -2 - (theta_G + m).cos(), rtol=0, atol=1e-9)
    assert (slope_G > 0).all()
    assert (logit_G < -1).all()


@pytest.mark.parametrize("m", [0.3, 0.5, 1.5])
def test_arcface_has_neither_jump_nor_kink_at_the_seam(m):
    seam = -math.cos(m)
    around = torch.tensor([seam - 1e-9, seam + 1e-9], dtype=torch.float64)
    logit, slope = build("arcface", m).target(around)
    torch.testing.assert_close(logit, torch.full_like(logit, -1), rtol=0, atol=1e-8)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kind", "m"), MARGINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_is_finite_at_and_beyond_the_poles(kind, m, dtype):
    cos_G = torch.tensor([-1.000001, -1, -0.9999999, 0, 0.9999999, 1, 1.000001], dtype=dtype)
    logit_G, slope_G = build(kind, m).target(cos_G)
    assert logit_G.isfinite().all()
    assert slope_G.isfinite().all()
    assert slope_G.max() < 1 / math.sqrt(POLE)
    assert logit_G.dtype == slope_G.dtype == dtype


def test_cosface_takes_the_margin_off():
    logit_G, slope_G = build("cosface", 0.35).target(torch.tensor([-1.0, 0.2, 1.0]))
    torch.testing.assert_close(logit_G, torch.tensor([-1.35, -0.15, 0.65]))
    assert (slope_G == 1).all()
