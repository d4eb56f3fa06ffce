"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464), step by step and in chunks.

Shapes: b batch, s sequence, H query heads, G key/value heads (H % G == 0), N key width, P value width, n chunks,
c tokens per chunk. With q and k L2-normalised per head and q scaled by 1/√N:
    α_t = exp(−exp(a_log) softplus(a_t + dt_bias));  β_t = σ(b_t)
    S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ;  o_t = S_tᵀ q_t
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.ops import backends
from oryx_megatron.ops.chunks import Chunks, decay_from_start, decay_products, wide

STEPWISE = 8
"""Up to this many tokens the step-by-step form is the faster one."""
NORM_EPSILON = 1e-6
"""Added to the sum of squares under the root, as flash-linear-attention does."""


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
    """Gated delta rule over a sequence.

    q [b, s, H, N], k [b, s, G, N], v [b, s, G, P], a [b, s, H] raw decay logits, b [b, s, H] raw beta logits,
    dt_bias, a_log [H], initial [b, H, N, P], documents: cumulative starts [0, ..., s], strictly rising, or None
    (the state is zero at every start; `initial` belongs to the first document).
    Returns o [b, s, H, P] in q's format and, with `final`, the state after the last token [b, H, N, P] in fp32
    (fp64 for fp64 input). `chunk` is the most tokens per chunk, a matter of speed only.
    """
    gates = {"dt_bias": dt_bias, "a_log": a_log}
    if q.shape[1] <= STEPWISE:
        return recurrent_gated_delta_rule(q, k, v, a, b, **gates, initial=initial, documents=documents, final=final)
    return chunked_gated_delta_rule(
        q, k, v, a, b, **gates, initial=initial, documents=documents, final=final, chunk=chunk
    )


def _gates(a: Tensor, b: Tensor, dt_bias: Tensor, a_log: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay log α and β, both [b, s, H] in fp32 or fp64."""
    to = wide(a.dtype)
    return -a_log.to(to).exp() * F.softplus(a.to(to) + dt_bias.to(to)), b.to(to).sigmoid()


def _normalised(x: Tensor, scale: float = 1.0) -> Tensor:
    """x · scale / ‖x‖ over the last dimension, in fp32 or fp64."""
    x = x.to(wide(x.dtype))
    return x * (torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON) * scale)


def recurrent_gated_delta_rule(
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
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule` step by step; for decoding and to hold the chunked form against."""
    batch, s, heads, width = q.shape
    repeat, to = heads // k.shape[2], wide(q.dtype)
    log_decay, beta = _gates(a, b, dt_bias, a_log)
    decay, beta = log_decay.exp()[..., None, None], beta.unsqueeze(-1)
    # rows [b, s, H, 1, N] and [b, s, H, P]
    query = _normalised(q, width**-0.5).unsqueeze(-2)
    key = _normalised(k).repeat_interleave(repeat, 2).unsqueeze(-2)
    value = v.to(to).repeat_interleave(repeat, 2).unsqueeze(-2) * beta.unsqueeze(-1)
    beta_key = (key * beta.unsqueeze(-1)).transpose(-1, -2)
    column = key.transpose(-1, -2)
    starts = set() if documents is None else set(documents.tolist()[1:-1])
    state = q.new_zeros(batch, heads, width, v.shape[-1], dtype=to) if initial is None else initial.to(to)
    outputs = []
    for t in range(s):
        state = torch.zeros_like(state) if t in starts else decay[:, t] * state
        state = state - beta_key[:, t] * (key[:, t] @ state) + column[:, t] * value[:, t]
        outputs.append((query[:, t] @ state).squeeze(-2))
    return torch.stack(outputs, 1).to(q.dtype), state if final else None


def chunked_gated_delta_rule(
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
    """`gated_delta_rule` by matrix products over chunks (the paper's UT transform, its section 3.3).

    With γ the running decay of a chunk and S the state before it, S_i = γ_i S + Σ_{j≤i} (γ_i/γ_j) k_j u_jᵀ, where
        (I + A) U = β V − β γ K S,   A_ij = β_i (γ_i/γ_j) k_iᵀk_j for j < i.
    """
    _, s, heads, width = q.shape
    repeat, to = heads // k.shape[2], wide(q.dtype)
    chunks = Chunks.of(s, chunk)
    segment = chunks.segments(documents)
    log_decay, beta = (chunks.split(gate) for gate in _gates(a, b, dt_bias, a_log))  # [b, H, n, c]
    query = chunks.split(_normalised(q, width**-0.5))
    key, value = _normalised(k), v.to(to)
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    key, value = chunks.split(key).contiguous(), chunks.split(value)
    within = decay_products(log_decay, segment)  # [b, H, n, c, c]
    start = decay_from_start(log_decay, segment)  # [b, H, n, c]
    # 1. U = U₀ − W S for every chunk at once; only the strict lower triangle of A is read
    right = torch.cat((value * beta.unsqueeze(-1), key * (beta * start).unsqueeze(-1)), -1)
    lower = (key * beta.unsqueeze(-1)) @ key.transpose(-1, -2) * within
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)  # [b, H, n, c, P + N]
    # 2. state after the chunk = added + passed · S
    to_end = (key * within[..., -1, :, None]).transpose(-1, -2) @ solved  # [b, H, n, N, P + N]
    added, removed = to_end.split((v.shape[-1], width), -1)
    passed = torch.diag_embed(start[..., -1:].expand(*start.shape[:-1], width)) - removed
    state = added.new_zeros(added[:, :, 0].shape) if initial is None else initial.to(to)
    states = []
    for add, carry in zip(added.unbind(2), passed.unbind(2)):
        states.append(state)
        state = add + carry @ state
    # 3. outputs, from inside the chunk and from the state before it
    inside = (query @ key.transpose(-1, -2) * within) @ solved
    own, correction = inside.split((v.shape[-1], width), -1)
    o = own + (query * start.unsqueeze(-1) - correction) @ torch.stack(states, 2)
    return chunks.join(o).to(q.dtype), state if final else None
