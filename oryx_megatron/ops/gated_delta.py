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
    decay, beta = log_decay.exp()[..., None, None], beta[..., None, None]
    query = _normalised(q, width**-0.5).unsqueeze(-2)  # queries, keys and values as rows [b, s, H, 1, N or P]
    key = _normalised(k).repeat_interleave(repeat, 2).unsqueeze(-2)
    value = v.to(to).repeat_interleave(repeat, 2).unsqueeze(-2)
    beta_column = (beta * key).transpose(-1, -2)
    starts = set() if documents is None else set(documents.tolist()[1:-1])
    state = q.new_zeros(batch, heads, width, v.shape[-1], dtype=to) if initial is None else initial.to(to)
    outputs = []
    for t in range(s):
        state = torch.zeros_like(state) if t in starts else decay[:, t] * state
        state = state + beta_column[:, t] * (value[:, t] - key[:, t] @ state)
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
    segment = chunks.segments(documents, q.device)
    log_decay, beta = (chunks.split(gate) for gate in _gates(a, b, dt_bias, a_log))  # [b, H, n, c]
    query = chunks.split(_normalised(q, width**-0.5))
    key, value = _normalised(k), v.to(to)
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    key, value = chunks.split(key), chunks.split(value)
    within = decay_products(log_decay, segment)  # [b, H, n, c, c]
    start = decay_from_start(log_decay, segment)  # [b, H, n, c]
    # 1. U = U₀ − W S for every chunk at once
    beta_key = key * beta.unsqueeze(-1)
    lower = beta_key @ key.transpose(-1, -2) * within
    own, from_state = _SolveUnitLower.apply(lower, value * beta.unsqueeze(-1), beta_key * start.unsqueeze(-1))
    # 2. from chunk to chunk
    to_end = key * within[..., -1, :, None]
    state = own.new_zeros(*own.shape[:2], width, own.shape[-1]) if initial is None else initial.to(to)
    update, states, state = _Pass.apply(own, from_state, to_end, start[..., -1], state)
    # 3. outputs, from inside the chunk and from the state before it
    o = (query @ key.transpose(-1, -2) * within) @ update + (query * start.unsqueeze(-1)) @ states
    return chunks.join(o).to(q.dtype), state if final else None


class _SolveUnitLower(torch.autograd.Function):
    """X and Y of (I + A) [X, Y] = [R, Q], with A the strict lower triangle of the first argument [..., c, c].

    By the inverse, which the backward pass uses again: torch's own backward solves anew, several times slower.
    """

    @staticmethod
    def forward(ctx, lower: Tensor, r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
        x, y = inverse @ r, inverse @ q
        ctx.save_for_backward(inverse, x, y)
        return x, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse, x, y = ctx.saved_tensors
        grad_r, grad_q = inverse.transpose(-1, -2) @ grad_x, inverse.transpose(-1, -2) @ grad_y
        grad_lower = (grad_r @ x.transpose(-1, -2)).add_(grad_q @ y.transpose(-1, -2)).neg_().tril_(-1)
        return grad_lower, grad_r, grad_q


class _Pass(torch.autograd.Function):
    """Hand the state on: U_i = own_i − W_i S_i and S_{i+1} = g_i S_i + E_iᵀ U_i for chunks i = 0 … n − 1.

    own [b, H, n, c, P], W and E [b, H, n, c, N], g [b, H, n], S_0 [b, H, N, P]
    -> U [b, H, n, c, P], S_0 … S_{n−1} [b, H, n, N, P], S_n. Written out to keep all but the chain out of the loop.
    """

    @staticmethod
    def forward(ctx, own: Tensor, w: Tensor, e: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        update, states = torch.empty_like(own), own.new_empty(*own.shape[:3], w.shape[-1], own.shape[-1])
        for i in range(own.shape[2]):
            states[:, :, i] = state
            update[:, :, i] = own[:, :, i] - w[:, :, i] @ state
            state = g[:, :, i, None, None] * state + e[:, :, i].transpose(-1, -2) @ update[:, :, i]
        ctx.save_for_backward(w, e, g, update, states)
        return update, states, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_update: Tensor, grad_states: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        w, e, g, update, states = ctx.saved_tensors
        grad_own, grad_after = torch.empty_like(update), torch.empty_like(states)
        for i in reversed(range(w.shape[2])):
            grad_after[:, :, i] = grad_state
            grad_own[:, :, i] = grad_update[:, :, i] + e[:, :, i] @ grad_state
            grad_state = g[:, :, i, None, None] * grad_state + grad_states[:, :, i]
            grad_state -= w[:, :, i].transpose(-1, -2) @ grad_own[:, :, i]
        grad_w = (grad_own @ states.transpose(-1, -2)).neg_()
        grad_e = update @ grad_after.transpose(-1, -2)
        return grad_own, grad_w, grad_e, (grad_after * states).sum((-2, -1)), grad_state
