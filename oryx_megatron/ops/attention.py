"""Softmax attention for the queries of attention-mode tokens only.

Shapes: b batch, s queries, t keys (t ≥ s; the queries are the last s positions), H query heads, G key/value heads
(H % G == 0), N key width, P value width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.modes import ModePlan
from oryx_megatron.ops import backends


@backends.dispatched("attention")
def mode_attention(q: Tensor, k: Tensor, v: Tensor, plan: ModePlan, *, documents: Tensor | None = None) -> Tensor:
    """o_i = softmax(q_i K_{≤i}ᵀ / √N) V_{≤i} for the attention tokens of `plan`, zero for its recurrent tokens.

    q [b, s, H, N], k [b, t, G, N], v [b, t, G, P], plan of the s queries, documents: cumulative starts
    [0, ..., s], strictly rising, or None (a query sees its own document only; keys before the queries belong to the
    first). Returns o [b, s, H, P] in q's format. Work is that of the attention queries alone: one call per run.
    """
    s, t = q.shape[1], k.shape[1]
    spans = _spans(plan, t - s, None if documents is None else documents.tolist())
    queries = _Ranges.apply(q, [(span.start, span.stop) for span in spans])
    seen = [(span.first, span.last) for span in spans]
    pieces, done = [], 0
    if not spans:  # nothing, but it ties q, k and v to the output: every parameter gets a gradient under every plan
        pieces.append(q[:, :0, :, :1] * k[:, :0, :1, :1] * v[:, :0, :1])
    for span, query, key, value in zip(spans, queries, _Ranges.apply(k, seen), _Ranges.apply(v, seen)):
        pieces += [_zeros(q, v, span.start - done)] if span.start > done else []
        pieces.append(_causal(query, key, value))
        done = span.stop
    pieces += [_zeros(q, v, s - done)] if s > done else []
    return torch.cat(pieces, 1)


class _Span(NamedTuple):
    """Queries start … stop, which see keys from `first` on; the last query sees up to `last` (exclusive)."""

    start: int
    stop: int
    first: int
    last: int


def _spans(plan: ModePlan, earlier: int, documents: Sequence[int] | None) -> list[_Span]:
    """Attention runs of the plan, cut at document starts; `earlier` keys lie before the first query."""
    spans = []
    bounds = list(documents or (0, plan.length))
    for run in plan.attention_runs():
        for first, last in itertools.pairwise(bounds):
            start, stop = max(run.start, first), min(run.stop, last)
            if start < stop:
                spans.append(_Span(start, stop, earlier + first if first else 0, earlier + stop))
    return spans


def _zeros(q: Tensor, v: Tensor, length: int) -> Tensor:
    return q.new_zeros(q.shape[0], length, q.shape[2], v.shape[3])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last queries of a key range; [b, s, H, N], [b, t, G, N], [b, t, G, P] -> [b, s, H, P]."""
    s, t = q.shape[1], k.shape[1]
    mask = None
    if 1 < s < t:
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < s == t, enable_gqa=grouped)
    return o.transpose(1, 2)


class _Ranges(torch.autograd.Function):
    """Views x[:, first:last]; their gradients meet in one buffer, where autograd would fill one for every view."""

    @staticmethod
    def forward(ctx, x: Tensor, ranges: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.ranges = x.shape, ranges
        return tuple(x[:, first:last] for first, last in ranges)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for (first, last), grad in zip(ctx.ranges, grads):
            total[:, first:last] += grad
        return total, None
