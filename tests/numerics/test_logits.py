"""Soft-capped logits and the z-loss against their formulas in fp64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from test_model import ROWS, VOCABULARY, build, config, forward, random_plan, random_tokens
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.model import SequenceInfo
from oryx_megatron.model.logits import softcapped
from oryx_megatron.train.step import Totals, sum_loss

pytestmark = pytest.mark.usefixtures("one_rank")
LENGTH = 19


def expected(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Per token [b, s]: cross-entropy, and weight · log² Σ exp."""
    normaliser = logits.exp().sum(-1).log()
    return normaliser - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1), weight * normaliser.square()


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_loss_and_gradients(cap: float | None, weight: float) -> None:
    """The loss is fp32 inside megatron-core; the reference starts from logits in fp64."""
    model = config("gdn", logit_softcap=cap)
    chunk = build(model)
    chunk.config.z_loss = weight
    tokens, labels, plan = random_tokens(LENGTH), random_tokens(LENGTH, seed=8), random_plan(model, LENGTH)
    mask = (torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.7).float()

    captured: list[Tensor] = []
    hook = chunk.output_layer.register_forward_hook(lambda m, i, o: captured.append(o[0]), prepend=True)
    forward(chunk, tokens, plan)
    hook.remove()
    logits = captured[0].transpose(0, 1)  # before the cap
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    loss, penalty = expected(logits, labels, weight)
    total = ((loss + penalty) * mask).sum()
    parameters = dict(chunk.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)

    sequence = SequenceInfo.build(plan, device=platform.device())
    output = chunk(tokens, None, None, labels=labels, packed_seq_params=sequence)
    found, counted, report = sum_loss(mask, 0.0, output)
    torch.testing.assert_close(found.double(), total, rtol=1e-5, atol=0)
    totals = Totals(report["totals"].double())
    assert totals.loss == pytest.approx(float((loss * mask).sum()), rel=1e-5)
    assert totals.mean_z_loss == pytest.approx(float((penalty * mask).sum() / mask.sum()), rel=1e-5)
    assert int(counted) == int(mask.sum()) == totals.tokens
    own = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
    for name, mine, reference in zip(parameters, own, gradients, strict=True):
        assert (mine is None) == (reference is None), name
        if reference is not None:
            torch.testing.assert_close(mine, reference, rtol=2e-5, atol=1e-6 * float(reference.abs().max()), msg=name)

    chunk.eval()  # no penalty outside of training
    with torch.no_grad():
        evaluated = chunk(tokens, None, None, labels=labels, packed_seq_params=sequence)
        assert forward(chunk, tokens, plan).abs().max() < (cap or 1e9)
    torch.testing.assert_close(evaluated.double(), loss.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cap_alone(dtype: torch.dtype) -> None:
    """Also far beyond the cap, where bf16 has no digits left for 1 - tanh²."""
    given = torch.linspace(-90, 90, 2 * VOCABULARY + 1, dtype=torch.float64).to(dtype)
    x, wide = given.clone().requires_grad_(), given.double().requires_grad_()
    y, reference = softcapped(x, 30.0), 30.0 * torch.tanh(wide / 30.0)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=0)
    (mine,), (theirs,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(reference.sum(), wide)
    torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=0)
