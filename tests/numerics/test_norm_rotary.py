"""RMS norms and rotary embedding against their formulas."""

from __future__ import annotations

import cmath

import pytest
import torch

from oryx_megatron.ops import Rope, gated_rms_norm, rms_norm, rotary

pytestmark = pytest.mark.usefixtures("poisoned")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def formula(o, gate, weight, eps):
    y = o / torch.sqrt((o**2).sum(-1, keepdim=True) / o.shape[-1] + eps) * weight
    return y if gate is None else y * gate / (1 + torch.exp(-gate))


@pytest.mark.parametrize("gated", [True, False])
def test_norms_equal_the_formula(gated):
    o, gate, weight = random(2, 7, 3, 10), random(2, 7, 3, 10, seed=1) if gated else None, random(10, seed=2)
    want = formula(o, gate, weight, 1e-3)
    inputs = [x for x in (o, gate, weight) if x is not None]
    gradients = torch.autograd.grad(want.square().sum(), inputs)
    results = [gated_rms_norm(o, gate, weight, 1e-3)] + ([] if gated else [rms_norm(o, weight, 1e-3)])
    for got in results:
        torch.testing.assert_close(got, want)
        for x, y in zip(torch.autograd.grad(got.square().sum(), inputs), gradients):
            torch.testing.assert_close(x, y)


def test_norms_of_bf16_are_computed_in_fp32():
    o, gate, weight = (random(4, 64, seed=i).detach().bfloat16() for i in range(3))
    weight = weight[0].float()
    wide = formula(o.double(), gate.double(), weight.double(), 1e-5)
    got = gated_rms_norm(o, gate, weight, 1e-5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wide, rtol=2**-8, atol=1e-6)
    got = rms_norm(o * 1e16, weight, 1e-5)  # a sum of squares of 1e34
    torch.testing.assert_close(got.double(), formula(o.double(), None, weight.double(), 0.0), rtol=2**-7, atol=1e-6)


def test_norms_of_zero_are_finite():
    o = torch.zeros(3, 8, requires_grad=True)
    y = gated_rms_norm(o, torch.zeros(3, 8), torch.ones(8), 1e-5)
    y.sum().backward()
    assert not y.any()
    assert o.grad.isfinite().all()


def test_rotary_turns_pairs_of_both_halves():
    x, base = random(2, 5, 3, 8), 100.0
    positions = torch.tensor([0, 1, 2, 7, 1000])
    got = rotary(x, positions, Rope(base))
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            turn = cmath.exp(1j * position * base ** (-i / 4))
            pair = torch.complex(x[:, t, :, i], x[:, t, :, i + 4]) * turn
            torch.testing.assert_close(got[:, t, :, i], pair.real)
            torch.testing.assert_close(got[:, t, :, i + 4], pair.imag)


def test_rotary_scores_depend_on_distance_alone():
    q, k = random(1, 1, 2, 16), random(1, 1, 2, 16, seed=1)

    def score(i: int, j: int) -> torch.Tensor:
        return (rotary(q, torch.tensor([i]), Rope(1e4)) * rotary(k, torch.tensor([j]), Rope(1e4))).sum(-1)

    torch.testing.assert_close(score(9, 4), score(1009, 1004))
    assert (score(9, 4) - score(9, 5)).abs().min() > 1e-3


def test_rotary_positions_per_row():
    x = random(2, 4, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3], [5, 0, 1, 2]])
    got = rotary(x, positions, Rope(1e4))
    for row in range(2):
        torch.testing.assert_close(got[row], rotary(x[row : row + 1], positions[row], Rope(1e4))[0])
    assert torch.autograd.gradcheck(lambda y: rotary(y, positions, Rope(1e4)), (x,))


def test_rotary_keeps_the_format_and_computes_in_fp32():
    x = random(1, 6, 2, 8).detach()
    positions = torch.arange(6) + 4000
    want = rotary(x.bfloat16().double(), positions, Rope(1e4))
    got = rotary(x.bfloat16(), positions, Rope(1e4))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2e-3)
