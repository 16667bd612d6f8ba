"""Margins over all cosines: value, closed-form derivatives, statistics, continuation beyond phi = pi."""

import math

import pytest
import torch

from partial_fc import margin
from partial_fc.config import HeadConfig

POLE = margin.NEAR_POLE
KINDS = {
    "no margin": {"kind": "arcface", "m": 0.0},
    "arcface 0.3": {"kind": "arcface", "m": 0.3},
    "arcface 0.5": {"kind": "arcface", "m": 0.5},
    "arcface 1.5": {"kind": "arcface", "m": 1.5},
    "cosface": {"kind": "cosface", "m": 0.4},
    "combined": {"kind": "combined"},
    "sphereface 1.5": {"kind": "combined", "m1": 1.5, "m2": 0, "m3": 0},
    "combined 4": {"kind": "combined", "m1": 4, "m2": 0.5, "m3": 0.3},
    "adaface": {"kind": "adaface", "m": 0.4, "h": 8.0},
    "magface": {"kind": "magface"},
    "curricularface": {"kind": "curricularface"},
}
NORMS = (0.0, 1e-4, 3.0, 14.0, 20.0, 25.0, 60.0, 100.0, 200.0)


def build(kind, **changed):
    return HeadConfig(margin={**KINDS.get(kind, {"kind": kind}), **changed}).margin.build("cpu")


def norms_like(cos_G, norm=14.0):
    return torch.full_like(cos_G, norm)


def cosines():
    """All of [-1, 1], denser towards its ends, and a little beyond, where rounding leads."""
    theta = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    near = 10.0 ** torch.linspace(-12, -3, 40, dtype=torch.float64)
    beyond = 1 + torch.tensor([1e-7, 1e-6], dtype=torch.float64)
    return torch.cat([theta.cos(), 1 - near, near - 1, beyond, -beyond]).sort().values


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_derivatives_are_those_of_autograd(kind, norm):
    cos_G = cosines().requires_grad_()
    norm_G = norms_like(cos_G, norm).detach().requires_grad_()
    target = build(kind).target(cos_G, norm_G)
    dlogit_dcos_G, by_norm_G = torch.autograd.grad(
        target.logit_G.sum(), [cos_G, norm_G], allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(target.dlogit_dcos_G, dlogit_dcos_G, rtol=1e-7, atol=1e-9)
    found_G = torch.zeros_like(by_norm_G) if target.by_norm_G is None else target.by_norm_G
    torch.testing.assert_close(found_G, by_norm_G, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_is_that_of_finite_differences(kind):
    cos_G, h = torch.linspace(-0.999, 0.999, 2000, dtype=torch.float64), 1e-6
    norm_G, target = norms_like(cos_G), build(kind).target
    rise_G = (target(cos_G + h, norm_G).logit_G - target(cos_G - h, norm_G).logit_G) / (2 * h)
    torch.testing.assert_close(target(cos_G, norm_G).dlogit_dcos_G, rise_G, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logit_rises_with_the_cosine_without_jumps(kind):
    cos_G = cosines()
    logit_G, slope_G, _ = build(kind).target(cos_G, norms_like(cos_G))
    steps_G = logit_G.diff()
    falls = cos_G[1:][steps_G < -1e-14]
    assert not len(falls), f"the logit falls at the cosines {falls[:3].tolist()}, see margin._moved"
    assert (steps_G <= torch.maximum(slope_G[1:], slope_G[:-1]) * cos_G.diff() * 1.01 + 1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_is_finite_at_and_beyond_the_poles(kind, dtype):
    cos_G = torch.tensor([-1.000001, -1, -0.9999999, 0, 0.9999999, 1, 1.000001], dtype=dtype)
    for norm in NORMS:
        logit_G, slope_G, _ = build(kind).target(cos_G, norms_like(cos_G, norm))
        assert logit_G.isfinite().all()
        assert slope_G.isfinite().all()
        assert slope_G.max() < 4 / math.sqrt(POLE)
        assert logit_G.dtype == slope_G.dtype == dtype


@pytest.mark.parametrize("m", [0.3, 0.5, 1.5])
def test_arcface_is_the_cosine_of_the_moved_angle_as_far_as_pi(m):
    theta_G = torch.linspace(math.sqrt(2 * POLE) * 1.01, math.pi - m, 1000, dtype=torch.float64)
    logit_G = build("arcface", m=m).target(theta_G.cos(), theta_G).logit_G
    torch.testing.assert_close(logit_G, (theta_G + m).cos(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [0.3, 0.5, 1.5])
def test_arcface_beyond_pi_goes_on_falling_with_the_angle(m):
    theta_G = torch.linspace(
        math.pi - m + 1e-6, math.pi - math.sqrt(2 * POLE) * 1.01, 1000, dtype=torch.float64
    )
    logit_G, slope_G, _ = build("arcface", m=m).target(theta_G.cos(), theta_G)
    torch.testing.assert_close(logit_G, -2 - (theta_G + m).cos(), rtol=0, atol=1e-9)
    assert (slope_G > 0).all()
    assert (logit_G < -1).all()


@pytest.mark.parametrize("m", [0.3, 0.5, 1.5])
def test_arcface_has_neither_jump_nor_kink_at_the_seam(m):
    seam = -math.cos(m)
    around = torch.tensor([seam - 1e-9, seam + 1e-9], dtype=torch.float64)
    logit, slope, _ = build("arcface", m=m).target(around, around)
    torch.testing.assert_close(logit, torch.full_like(logit, -1), rtol=0, atol=1e-8)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-7)


def test_the_straight_through_margin_has_arcfaces_logit_and_a_derivative_of_one():
    cos_G = cosines().requires_grad_()
    found = build("arcface-straight-through", m=0.5).target(cos_G, cos_G)
    expected = build("arcface 0.5").target(cos_G, cos_G)
    torch.testing.assert_close(found.logit_G, expected.logit_G, rtol=0, atol=1e-12)
    assert (found.dlogit_dcos_G == 1).all()
    (by_autograd_G,) = torch.autograd.grad(found.logit_G.sum(), cos_G)
    assert (by_autograd_G == 1).all()


def test_cosface_takes_the_margin_off():
    cos_G = torch.tensor([-1.0, 0.2, 1.0])
    logit_G, slope_G, _ = build("cosface", m=0.35).target(cos_G, cos_G)
    torch.testing.assert_close(logit_G, torch.tensor([-1.35, -0.15, 0.65]))
    assert (slope_G == 1).all()


def test_the_three_margins_are_combined():
    theta_G = torch.linspace(0.1, 1.5, 50, dtype=torch.float64)
    combined = build("combined", **{"m1": 1.2, "m2": 0.3, "m3": 0.2})
    logit_G = combined.target(theta_G.cos(), theta_G).logit_G
    torch.testing.assert_close(logit_G, (1.2 * theta_G + 0.3).cos() - 0.2)


def test_sphereface_falls_in_every_turn():
    theta_G = torch.linspace(0.01, math.pi - 0.01, 1000, dtype=torch.float64)
    sphere = build("combined", **{"m1": 3, "m2": 0, "m3": 0})
    logit_G = sphere.target(theta_G.cos(), theta_G).logit_G
    expected_G = [(-1) ** (k := int(3 * theta / math.pi)) * math.cos(3 * theta) - 2 * k for theta in theta_G]
    torch.testing.assert_close(logit_G, torch.tensor(expected_G, dtype=torch.float64))


@pytest.mark.parametrize(
    ("norm", "quality"), [(20.0, 0.0), (20 + 100.001 / 2, 0.5 * 0.333), (1e5, 80 / 100.001 * 0.333)]
)
def test_adaface_shifts_angle_and_cosine_by_the_standardised_norm(norm, quality):
    theta_G = torch.linspace(0.2, 2.5, 50, dtype=torch.float64)
    ada = build("adaface", **{"h": 0.333})
    logit_G = ada.target(theta_G.cos(), norms_like(theta_G, norm)).logit_G
    torch.testing.assert_close(logit_G, (theta_G - 0.4 * quality).cos() - 0.4 * (1 + quality))


def test_adaface_follows_mean_and_deviation_of_the_counted_norms():
    ada = build("adaface", **{"momentum": 0.25})
    norm_G = torch.tensor([10.0, 14.0, 18.0, 1e6])
    is_counted_G = torch.tensor([True, True, True, False])
    ada.observe(norm_G * 0, norm_G, is_counted_G)
    assert ada.state["norm_mean"].item() == pytest.approx(20 + 0.25 * (14 - 20))
    assert ada.state["norm_std"].item() == pytest.approx(100 + 0.25 * (4 - 100))
    before = {name: value.item() for name, value in ada.state.items()}
    ada.observe(norm_G * 0, norm_G, torch.tensor([True, False, False, False]))
    assert {name: value.item() for name, value in ada.state.items()} == before


@pytest.mark.parametrize(
    ("norm", "m"), [(1.0, 0.45), (10.0, 0.45), (60.0, 0.625), (110.0, 0.8), (500.0, 0.8)]
)
def test_magfaces_margin_is_a_line_over_the_norm(norm, m):
    theta_G = torch.linspace(0.2, 2.3, 50, dtype=torch.float64)
    logit_G = build("magface").target(theta_G.cos(), norms_like(theta_G, norm)).logit_G
    torch.testing.assert_close(logit_G, (theta_G + m).cos())


def test_magfaces_penalty_falls_up_to_the_highest_norm():
    norm_G = torch.linspace(1, 200, 500, dtype=torch.float64, requires_grad=True)
    value_G, by_norm_G = build("magface").penalty(norm_G)
    (expected_G,) = torch.autograd.grad(value_G.sum(), norm_G)
    torch.testing.assert_close(by_norm_G, expected_G)
    assert (value_G.diff() <= 0).all()
    assert value_G[-1].item() == pytest.approx(35 * 2 / 110)


def test_curricularface_bends_the_hard_negatives_alone():
    curricular = build("curricularface", **{"momentum": 0.5})
    curricular.observe(torch.tensor([0.2, 0.6, 5.0]), torch.ones(3), torch.tensor([True, True, False]))
    assert curricular.state["t"].item() == pytest.approx(0.2)
    cos_GT = torch.linspace(-1, 1, 2001, dtype=torch.float64).repeat(2, 1).requires_grad_()
    bound_G = torch.tensor([-0.3005, 0.5005], dtype=torch.float64)
    bent_GT, slope_GT = curricular.others(cos_GT, bound_G)
    (expected_GT,) = torch.autograd.grad(bent_GT.sum(), cos_GT)
    torch.testing.assert_close(slope_GT, expected_GT)
    is_hard_GT = cos_GT > bound_G[:, None]
    torch.testing.assert_close(bent_GT, torch.where(is_hard_GT, cos_GT * (0.2 + cos_GT), cos_GT))


def test_no_counted_row_leaves_the_curriculum_where_it_is():
    curricular = build("curricularface")
    curricular.observe(torch.tensor([0.2]), torch.ones(1), torch.tensor([False]))
    assert curricular.state["t"].item() == 0
