"""Attention of a plan's attention tokens against the dense masked softmax over everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.modes import Mode, ModePlan, parse_plan
from oryx_megatron.ops import mode_attention

pytestmark = pytest.mark.usefixtures("poisoned")


def dense(q: Tensor, k: Tensor, v: Tensor, attends: np.ndarray, starts: list[int] | None) -> Tensor:
    """Softmax over all pairs, then rows of recurrent tokens set to zero."""
    (s, heads, n), t = q.shape[1:], k.shape[1]
    group = [h // (heads // k.shape[2]) for h in range(heads)]
    position = torch.arange(t)
    document = torch.bucketize(position - (t - s), torch.tensor(starts or [0, s])[1:-1], right=True)
    seen = (position <= position[t - s :, None]) & (document == document[t - s :, None])
    scores = torch.einsum("bihn,bjhn->bhij", q, k[:, :, group]) / n**0.5
    o = torch.einsum("bhij,bjhp->bihp", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[:, :, group])
    return o * torch.from_numpy(attends)[:, None, None]


def random_inputs(
    s: int, t: int, *, seed: int, heads: int = 4, groups: int = 2, n: int = 6, p: int = 6
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, s, heads, n), (2, t, groups, n), (2, t, groups, p)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def assert_same(q: Tensor, k: Tensor, v: Tensor, plan: ModePlan, starts: list[int] | None = None) -> None:
    documents = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    got, want = mode_attention(q, k, v, plan, documents=documents), dense(q, k, v, plan.is_attention(), starts)
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for x, y in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)), torch.autograd.grad((want * weight).sum(), (q, k, v))
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("seed", range(24))
def test_random_plans(seed):
    """Random runs, lengths, earlier keys, documents, head counts and widths."""
    random = np.random.default_rng(seed)
    s = int(random.integers(1, 70))
    t = s + int(random.integers(0, 40)) * int(random.integers(0, 2))
    mask = np.repeat(random.random(s) < random.random(), int(random.integers(1, 9)))[:s]
    starts = None
    if random.random() < 0.5:
        starts = [0, *(np.flatnonzero(random.random(s - 1) < 0.1) + 1).tolist(), s]
    groups = int(random.choice([1, 2, 4]))
    p = int(random.choice([6, 3]))
    assert_same(*random_inputs(s, t, seed=seed, groups=groups, p=p), ModePlan.from_mask(mask), starts)


@pytest.mark.parametrize("s", [1, 63, 64, 257])
@pytest.mark.parametrize("spec", ["attention", "recurrent", "prefix:1", "last:1", "ratio:0.5", "every:2"])
def test_sizes(s, spec):
    assert_same(*random_inputs(s, s, seed=s), parse_plan(spec, s, chunk=8))


def test_all_recurrent_leaves_zero_gradients():
    """Zero, not absent: gradient reduction waits for every parameter."""
    q, k, v = random_inputs(5, 5, seed=0)
    o = mode_attention(q, k, v, ModePlan.uniform(Mode.RECURRENT, 5))
    assert o.shape == (2, 5, 4, 6)
    assert not o.any()
    o.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))


def test_nothing_leaks_from_later_tokens_or_other_documents():
    q, k, v = (x.detach() for x in random_inputs(40, 50, seed=1))
    plan = ModePlan.from_mask(np.arange(40) % 3 > 0)
    documents = torch.tensor([0, 12, 40], dtype=torch.int32)
    before = mode_attention(q, k, v, plan, documents=documents)
    for x in (k, v):
        x[:, 10 + 30 :] = torch.nan  # later than token 29
        x[:, : 10 + 12] = torch.nan  # the first document and the keys before it
    after = mode_attention(q, k, v, plan, documents=documents)
    torch.testing.assert_close(after[:, 12:30], before[:, 12:30], rtol=0, atol=0)
    assert after[:, 30:].isnan().any()
    assert after[:, :12].isnan().any()


@pytest.mark.parametrize("spec", ["ratio:0.1", "ratio:0.5", "last:64"])
def test_work_is_that_of_the_attention_tokens(spec, monkeypatch):
    """Queries handed to the softmax are the attention tokens, keys no more than they may see."""
    plan, pairs, queries, inner = parse_plan(spec, 256, chunk=16), [], [], F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **options):
        queries.append(q.shape[2])
        pairs.append(q.shape[2] * k.shape[2])
        return inner(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    mode_attention(*random_inputs(256, 256, seed=0), plan)
    assert sum(queries) == plan.attention_tokens
    assert sum(pairs) == sum((run.stop - run.start) * run.stop for run in plan.attention_runs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_equals_the_reference_in_both_formats(dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    plan = parse_plan("ratio:0.5", 100, chunk=10)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in random_inputs(100, 130, seed=2))
    o = mode_attention(q, k, v, plan)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = dense(*wide, plan.is_attention(), None)
    assert o.dtype == dtype
    torch.testing.assert_close(o.double(), want, rtol=tolerance, atol=tolerance)
    o.sum().backward()
    want.sum().backward()
    for x, y in zip((q, k, v), wide):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=4 * tolerance, atol=4 * tolerance)
