"""The mixer's functions as training calls them; their bodies are the reference backend, by the maths of hf/*_oryx.py.

Shapes: b batch, s sequence, t keys (t ≥ s; the queries are the last s positions), c channels, w taps, H query heads, G
key/value heads (H % G == 0), N key width, P value width. Gates are given as raw logits. `documents`: cumulative starts
[0, ..., s], strictly rising, or None; nothing crosses a start, and `initial` belongs to the first document.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.config import to_dict
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.hf import norm_conv_oryx, recurrences_oryx
from oryx_megatron.hf.recurrences_oryx import delta_gates, ssd_gates, unit, wide, with_skip
from oryx_megatron.hf.rotary_oryx import Rope, rotate
from oryx_megatron.modes import ModePlan
from oryx_megatron.ops import backends


@backends.dispatched("norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension; x [..., n], weight [n] -> [..., n] in x's format."""
    return norm_conv_oryx.rms_norm(x, weight, eps).to(x.dtype)


@backends.dispatched("norm")
def gated_rms_norm(o: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(o) · weight · SiLU(gate), the mixer's output norm (Oryx, arXiv 2605.28769, eq. 2).

    o, gate [..., P], weight [P] -> [..., P] in o's format; without gate the norm alone.
    """
    return norm_conv_oryx.rms_norm(o, weight, eps, gate).to(o.dtype)


@backends.dispatched("convolution")
def causal_conv(
    x: Tensor,
    weight: Tensor,
    *,
    activation: Literal["silu"] | None = None,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(Σ_i weight[:, i] x_{t−w+1+i}); the last tap is the token's own.

    x [b, s, c], weight [c, w], initial: the w−1 inputs before x, oldest first [b, c, w−1] (zeros when None).
    Returns y [b, s, c] in x's format and, with `final`, the last w−1 inputs of the last document [b, c, w−1], zeros
    where it has fewer.
    """
    silu = activation == "silu"
    return norm_conv_oryx.causal_conv(x, weight, silu=silu, initial=initial, documents=documents, final=final)


@functools.lru_cache(maxsize=64)
def rope_of(model: ModelConfig) -> Rope:
    """Base and scaling of a validated model's rotary embedding."""
    scaling = {} if model.rope_scaling is None else to_dict(model.rope_scaling)
    return Rope.of(scaling | {"rope_theta": model.rope_theta})


def rotary(x: Tensor, positions: Tensor, rope: Rope, *, attention: bool = True) -> Tensor:
    """Rotate x [b, s, heads, N] (N even, all of it) by the angles of integer positions [s] or [b, s].

    `attention`: what attention reads, so with the temperature of its softmax, if the scaling has one.
    """
    return rotate(x, rope.tables(positions, x.shape[-1], wide(x.dtype), attention=attention))


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


@backends.dispatched("recurrence")
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    dt_bias: Tensor,
    a_log: Tensor,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    final: bool = False,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule (Gated DeltaNet, arXiv 2412.06464), with q and k L2-normed per head and q scaled by 1/√N.

        α_t = exp(−exp(a_log) softplus(a_t + dt_bias));  β_t = σ(b_t)
        S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ;  o_t = S_tᵀ q_t

    q [b, s, H, N], k [b, s, G, N], v [b, s, G, P], a, b [b, s, H], dt_bias, a_log [H], initial [b, H, N, P].
    Returns o [b, s, H, P] in q's format and, with `final`, the state after the last token [b, H, N, P] in fp32
    (fp64 for fp64 input). `chunk` is the most tokens per chunk, a matter of speed only.
    """
    log_decay, beta = delta_gates(a, b, dt_bias, a_log)
    o, state = recurrences_oryx.gated_delta_rule(
        unit(q, q.shape[-1] ** -0.5), unit(k), v, log_decay, beta, initial=initial, documents=documents, chunk=chunk
    )
    assert o is not None  # there is a query
    return o.to(q.dtype), state if final else None


@backends.dispatched("recurrence")
def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    *,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    final: bool = False,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's recurrence (arXiv 2405.21060). The key plays B, the value x, the query C of the paper.

        Δ_t = softplus(dt_t + dt_bias);  a_t = exp(−exp(a_log) Δ_t)
        S_t = a_t S_{t−1} + Δ_t k_t v_tᵀ;  o_t = S_tᵀ q_t + d v_t

    dt [b, s, H], d [H]; all else as of `gated_delta_rule`.
    """
    step, log_decay = ssd_gates(dt, dt_bias, a_log)
    o, state = recurrences_oryx.ssd(q, k, v, log_decay, step, initial=initial, documents=documents, chunk=chunk)
    assert o is not None  # there is a query
    return with_skip(o, v, d).to(q.dtype), state if final else None
