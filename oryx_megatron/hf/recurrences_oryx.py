"""The recurrences in plain torch: what training is held against, and what an export computes without fast kernels.

Imports nothing but torch. `ops/` imports it, and every export ships it beside `modeling_oryx.py`.

Gated delta rule (Gated DeltaNet, arXiv 2412.06464) and Mamba-2's recurrence (SSD, arXiv 2405.21060):

    S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ;  o_t = S_tᵀ q_t
    S_t = α_t S_{t-1} + Δ_t k_t v_tᵀ;                     o_t = S_tᵀ q_t

Shapes: b batch, s sequence, H query heads, G key/value heads (H % G == 0), N key width, P value width, n chunks,
c tokens per chunk. q [b, s, H, N], k [b, s, G, N], v [b, s, G, P], gates [b, s, H], states [b, H, N, P].
Everything is computed in fp32, or fp64 where the input is fp64; log decays are summed in fp64 in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STEPWISE = 8
"""Up to this many tokens the step-by-step form is the faster one."""
NORM_EPSILON = 1e-6
"""Added to the sum of squares under the root, as flash-linear-attention does."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Format that states and gates are computed in: fp32, or fp64 where the input is fp64."""
    return torch.promote_types(dtype, torch.float32)


def unit(x: Tensor, scale: float = 1.0) -> Tensor:
    """x · scale / ‖x‖ over the last dimension, in fp32 or fp64."""
    x = x.to(wide(x.dtype))
    return x * (torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON) * scale)


def delta_gates(a: Tensor, b: Tensor, dt_bias: Tensor, a_log: Tensor) -> tuple[Tensor, Tensor]:
    """log α = −exp(a_log) softplus(a + dt_bias) and β = σ(b) of logits a, b [b, s, H], in fp32 or fp64."""
    to = wide(a.dtype)
    return -a_log.to(to).exp() * F.softplus(a.to(to) + dt_bias.to(to)), b.to(to).sigmoid()


def ssd_gates(dt: Tensor, dt_bias: Tensor, a_log: Tensor) -> tuple[Tensor, Tensor]:
    """Δ = softplus(dt + dt_bias) and log α = −exp(a_log) Δ of logits dt [b, s, H], in fp32 or fp64."""
    to = wide(dt.dtype)
    step = F.softplus(dt.to(to) + dt_bias.to(to))
    return step, -a_log.to(to).exp() * step


# ---------------------------------------------------------------------------------------------------------------------
# Chunks and decays
# ---------------------------------------------------------------------------------------------------------------------


def segments(documents: Tensor, length: int, device: torch.device) -> Tensor:
    """Document number of every token [length], from cumulative starts [0, ..., length] on any device."""
    lengths = documents.to(device).diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=length)


@dataclass(frozen=True)
class Chunks:
    """A sequence of `length` tokens cut into `count` chunks of `size` tokens, the last one padded with zeros."""

    length: int
    count: int
    size: int

    @classmethod
    def of(cls, length: int, longest: int) -> Chunks:
        """As few chunks as `longest` allows, of even size: 257 tokens become 5 × 52 rather than 5 × 64."""
        count = -(-length // longest)
        return cls(length, count, -(-length // count))

    def split(self, x: Tensor) -> Tensor:
        """[b, s, H, ...] -> [b, H, n, c, ...]"""
        if missing := self.count * self.size - self.length:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        return x.unflatten(1, (self.count, self.size)).movedim(3, 1).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """[b, H, n, c, ...] -> [b, s, H, ...]"""
        return x.movedim(1, 3).flatten(1, 2)[:, : self.length]

    def segments(self, documents: Tensor | None, device: torch.device) -> Tensor | None:
        """Document numbers [n, c]; padding belongs to the last document, so that it hands the state on."""
        if documents is None:
            return None
        numbers = segments(documents, self.length, device)
        missing = self.count * self.size - self.length
        return torch.cat((numbers, numbers[-1:].expand(missing))).view(self.count, self.size)


def decay_sums(log_decay: Tensor, fp64: bool = True) -> Tensor:
    """Σ of log_decay over tokens j+1 … i for j ≤ i, [..., c] -> [..., c, c] (row i, column j); others are undefined.

    After one strong decay (say e^-10000) a running sum in fp32 could no longer tell the weak ones behind it apart:
    running sums are in fp64, or where there is none every sum starts again at its token.
    """
    if fp64:
        running = log_decay.double().cumsum(-1)
        return (running.unsqueeze(-1) - running.unsqueeze(-2)).to(log_decay.dtype)
    return log_decay.unsqueeze(-1).expand(*log_decay.shape, log_decay.shape[-1]).tril(-1).cumsum(-2)


class _DecayProducts(torch.autograd.Function):
    """`decay_products`. Written out to keep one [c, c] tensor for the backward pass instead of four."""

    @staticmethod
    def forward(ctx, log_decay: Tensor, allowed: Tensor) -> Tensor:
        sums = decay_sums(log_decay, fp64=log_decay.device.type != "mps")
        products = sums.masked_fill_(~allowed, -torch.inf).exp_()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (products,) = ctx.saved_tensors
        grad = grad * products
        exact = torch.float64 if grad.device.type != "mps" else torch.float32
        running = grad.sum(-1, dtype=exact) - grad.sum(-2, dtype=exact)
        return running.flip(-1).cumsum(-1).flip(-1).to(grad.dtype), None


def decay_products(log_decay: Tensor, segment: Tensor | None) -> Tensor:
    """Product of the decays of tokens j+1 … i for j ≤ i of one segment; 0 for all other pairs.

    log_decay [..., c], at most 0; segment [n, c] or [c], or None -> [..., c, c] (row i, column j). Other pairs are
    masked before exp, which therefore never sees a positive number.
    """
    allowed = torch.ones(log_decay.shape[-1:] * 2, dtype=torch.bool, device=log_decay.device).tril()
    if segment is not None:
        allowed = allowed & (segment.unsqueeze(-1) == segment.unsqueeze(-2))
    return _DecayProducts.apply(log_decay, allowed)


def decay_from_start(log_decay: Tensor, segment: Tensor | None) -> Tensor:
    """Factor [..., n, c] by which the state before the chunk reaches each token; 0 past a document's start."""
    factor = log_decay.cumsum(-1).exp()
    if segment is None:
        return factor
    before = torch.cat((segment.new_zeros(1), segment[:-1, -1]))  # the initial state belongs to the first document
    return factor * (segment == before.unsqueeze(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Step by step
# ---------------------------------------------------------------------------------------------------------------------


def delta_step(
    q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor | None, Tensor]:
    """One token of the gated delta rule.

    q (None: no output wanted), k [b, H, N] normalised and scaled, v [b, H, P], log_decay, beta [b, H]
    -> o [b, H, P] and the new state.
    """
    k, v, beta = k.unsqueeze(-1), v.unsqueeze(-2), beta[..., None, None]
    kept = log_decay.exp()[..., None, None] * state
    state = kept + beta * k * (v - (kept * k).sum(-2, keepdim=True))
    return _read(q, state), state


def ssd_step(
    q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor, step: Tensor, state: Tensor
) -> tuple[Tensor | None, Tensor]:
    """One token of SSD; arguments and results as of `delta_step`, `step` is Δ [b, H]."""
    state = log_decay.exp()[..., None, None] * state + (step.unsqueeze(-1) * k).unsqueeze(-1) * v.unsqueeze(-2)
    return _read(q, state), state


def with_skip(o: Tensor, v: Tensor, d: Tensor) -> Tensor:
    """o [b, s, H, P] + d [H] · v [b, s, G, P], the end of Mamba-2's recurrence."""
    return o + d.to(o.dtype)[:, None] * _per_head(v.to(o.dtype), o.shape[2] // v.shape[2], 2)


def _read(q: Tensor | None, state: Tensor) -> Tensor | None:
    return None if q is None else (state * q.unsqueeze(-1)).sum(-2)


def stepwise(
    one: Callable[..., tuple[Tensor | None, Tensor]],
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gate: Tensor,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """`gated_delta_rule` or `ssd` token by token, by `delta_step` or `ssd_step`; `gate` is β or Δ."""
    to, repeat = wide(v.dtype), log_decay.shape[2] // k.shape[2]
    k, v = (_per_head(x.to(to), repeat, 2) for x in (k, v))
    q = None if q is None else q.to(to)
    starts = set() if documents is None else set(documents.tolist()[1:-1])
    state = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]) if initial is None else initial.to(to)
    outputs: list[Tensor] = []
    for t in range(k.shape[1]):
        state = torch.zeros_like(state) if t in starts else state
        o, state = one(None if q is None else q[:, t], k[:, t], v[:, t], log_decay[:, t], gate[:, t], state)
        if o is not None:
            outputs.append(o)
    return None if q is None else torch.stack(outputs, 1), state


def _per_head(x: Tensor, repeat: int, dim: int) -> Tensor:
    return x if repeat == 1 else x.repeat_interleave(repeat, dim)


# ---------------------------------------------------------------------------------------------------------------------
# In chunks
# ---------------------------------------------------------------------------------------------------------------------


def gated_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor | None, Tensor]:
    """Gated delta rule over a sequence, step by step or in chunks, whichever is faster.

    q (None: no output wanted) and k normalised by `unit`, q scaled too; gates as of `delta_gates`. `documents`:
    cumulative starts [0, ..., s], strictly rising, or None (the state is zero at every start; `initial` belongs to
    the first document). Returns o [b, s, H, P] and the state after the last token, both in fp32 or fp64.
    """
    if k.shape[1] <= STEPWISE:
        return stepwise(delta_step, q, k, v, log_decay, beta, initial, documents)
    return delta_chunks(q, k, v, log_decay, beta, initial=initial, documents=documents, chunk=chunk)


def delta_chunks(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor | None, Tensor]:
    """`gated_delta_rule` by matrix products over chunks (the paper's UT transform, its section 3.3).

    With γ the running decay of a chunk and S the state before it, S_i = γ_i S + Σ_{j≤i} (γ_i/γ_j) k_j u_jᵀ, where
        (I + A) U = β V − β γ K S,   A_ij = β_i (γ_i/γ_j) k_iᵀk_j for j < i.
    """
    s, width, to = k.shape[1], k.shape[-1], wide(v.dtype)
    repeat = log_decay.shape[2] // k.shape[2]
    chunks = Chunks.of(s, chunk)
    segment = chunks.segments(documents, k.device)
    log_decay, beta = chunks.split(log_decay), chunks.split(beta)  # [b, H, n, c]
    key, value = (chunks.split(_per_head(x.to(to), repeat, 2)) for x in (k, v))
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
    if q is None:
        return None, state
    # 3. outputs, from inside the chunk and from the state before it
    query = chunks.split(q.to(to))
    o = (query @ key.transpose(-1, -2) * within) @ update + (query * start.unsqueeze(-1)) @ states
    return chunks.join(o), state


class _SolveUnitLower(torch.autograd.Function):
    """X and Y of (I + A) [X, Y] = [R, Q], with A the strict lower triangle of the first argument [..., c, c].

    By the inverse, which the backward pass uses again: torch's own backward solves again, several times slower.
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


def ssd(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    step: Tensor,
    *,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor | None, Tensor]:
    """SSD over a sequence, without the skip term; gates as of `ssd_gates`, the rest as of `gated_delta_rule`."""
    if k.shape[1] <= STEPWISE:
        return stepwise(ssd_step, q, k, v, log_decay, step, initial, documents)
    return ssd_chunks(q, k, v, log_decay, step, initial=initial, documents=documents, chunk=chunk)


def ssd_chunks(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    step: Tensor,
    *,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor | None, Tensor]:
    """`ssd` by matrix products over chunks (the paper's block decomposition, its section 6)."""
    to, repeat = wide(v.dtype), log_decay.shape[2] // k.shape[2]
    chunks = Chunks.of(k.shape[1], chunk)
    segment = chunks.segments(documents, k.device)
    log_decay = chunks.split(log_decay)  # [b, H, n, c]
    key, value = (_per_head(chunks.split(x.to(to)), repeat, 1) for x in (k, v))
    entering = value * chunks.split(step).unsqueeze(-1)
    within = decay_products(log_decay, segment)  # [b, H, n, c, c]
    # 1. what each chunk adds to the state, and the state after every chunk: decays over chunks, as over tokens in 2.
    added = key.transpose(-1, -2) @ (entering * within[..., -1, :, None])  # [b, H, n, N, P]
    first = torch.zeros_like(added[:, :, :1]) if initial is None else initial.to(to).unsqueeze(2)
    added = torch.cat((first, added), 2)
    ends = None if segment is None else F.pad(segment[:, -1], (1, 0))  # the initial state is of the first document
    between = decay_products(F.pad(log_decay.sum(-1), (1, 0)), ends)  # [b, H, 1 + n, 1 + n]
    states = (between @ added.flatten(3)).view_as(added)
    if q is None:
        return None, states[:, :, -1]
    # 2. inside each chunk: attention with decays in place of the softmax
    query = chunks.split(q.to(to))
    o = (query @ key.transpose(-1, -2) * within) @ entering
    # 3. what the state before the chunk gives each of its tokens
    o = o + (query * decay_from_start(log_decay, segment).unsqueeze(-1)) @ states[:, :, :-1]
    return chunks.join(o), states[:, :, -1]
