"""Mamba-2's recurrence (state-space duality, arXiv 2405.21060), step by step and in chunks.

Shapes: b batch, s sequence, H query heads, G key/value heads (H % G == 0), N key width, P value width, n chunks,
c tokens per chunk. The key plays B, the value x, the query C of the paper:
    Δ_t = softplus(dt_t + dt_bias);  a_t = exp(−exp(a_log) Δ_t)
    S_t = a_t S_{t−1} + Δ_t k_t v_tᵀ;  o_t = S_tᵀ q_t + d v_t
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.ops import backends
from oryx_megatron.ops.chunks import Chunks, decay_from_start, decay_products, wide

STEPWISE = 8
"""Up to this many tokens the step-by-step form is the faster one."""


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
    """SSD over a sequence.

    q [b, s, H, N], k [b, s, G, N], v [b, s, G, P], dt [b, s, H] raw logits, dt_bias, a_log, d [H],
    initial [b, H, N, P], documents: cumulative starts [0, ..., s], strictly rising, or None (the state is zero at
    every start; `initial` belongs to the first document).
    Returns o [b, s, H, P] in q's format and, with `final`, the state after the last token [b, H, N, P] in fp32
    (fp64 for fp64 input). `chunk` is the most tokens per chunk, a matter of speed only.
    """
    gates = {"dt_bias": dt_bias, "a_log": a_log, "d": d}
    if q.shape[1] <= STEPWISE:
        return recurrent_ssd(q, k, v, dt, **gates, initial=initial, documents=documents, final=final)
    return chunked_ssd(q, k, v, dt, **gates, initial=initial, documents=documents, final=final, chunk=chunk)


def _gates(dt: Tensor, dt_bias: Tensor, a_log: Tensor) -> tuple[Tensor, Tensor]:
    """Step Δ and log decay, both [b, s, H] in fp32 or fp64."""
    to = wide(dt.dtype)
    step = F.softplus(dt.to(to) + dt_bias.to(to))
    return step, -a_log.to(to).exp() * step


def recurrent_ssd(
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
) -> tuple[Tensor, Tensor | None]:
    """`ssd` step by step, as the equations stand; for decoding and to hold the chunked form against."""
    b, s, heads, width = q.shape
    repeat, to = heads // k.shape[2], wide(q.dtype)
    step, log_decay = _gates(dt, dt_bias, a_log)
    decay = log_decay.exp()[..., None, None]
    query, value = q.to(to).unsqueeze(-2), v.to(to).repeat_interleave(repeat, 2)
    key = (k.to(to).repeat_interleave(repeat, 2) * step.unsqueeze(-1)).unsqueeze(-1)
    starts = set() if documents is None else set(documents.tolist()[1:-1])
    state = q.new_zeros(b, heads, width, v.shape[-1], dtype=to) if initial is None else initial.to(to)
    outputs = []
    for t in range(s):
        state = (0.0 if t in starts else decay[:, t] * state) + key[:, t] * value[:, t].unsqueeze(-2)
        outputs.append((query[:, t] @ state).squeeze(-2))
    o = torch.stack(outputs, 1) + d.to(to)[:, None] * value
    return o.to(q.dtype), state if final else None


def chunked_ssd(
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
    """`ssd` by matrix products over chunks (the paper's block decomposition, its section 6)."""
    repeat, to = q.shape[2] // k.shape[2], wide(q.dtype)
    chunks = Chunks.of(q.shape[1], chunk)
    segment = chunks.segments(documents, q.device)
    step, log_decay = (chunks.split(gate) for gate in _gates(dt, dt_bias, a_log))  # [b, H, n, c]
    query, key, value = (chunks.split(x.to(to)) for x in (q, k, v))
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    entering = value * step.unsqueeze(-1)
    # 1. inside each chunk: attention with decays in place of the softmax
    within = decay_products(log_decay, segment)  # [b, H, n, c, c]
    o = (query @ key.transpose(-1, -2) * within) @ entering
    # 2. what each chunk adds to the state, and the state after every chunk: decays over chunks, as over tokens in 1.
    added = key.transpose(-1, -2) @ (entering * within[..., -1, :, None])  # [b, H, n, N, P]
    first = torch.zeros_like(added[:, :, :1]) if initial is None else initial.to(to).unsqueeze(2)
    added = torch.cat((first, added), 2)
    ends = None if segment is None else F.pad(segment[:, -1], (1, 0))  # the initial state is of the first document
    between = decay_products(F.pad(log_decay.sum(-1), (1, 0)), ends)  # [b, H, 1 + n, 1 + n]
    states = (between @ added.flatten(3)).view_as(added)
    # 3. what the state before the chunk gives each of its tokens
    o = o + (query * decay_from_start(log_decay, segment).unsqueeze(-1)) @ states[:, :, :-1]
    o = chunks.join(o + d.to(to).view(-1, 1, 1, 1) * value)
    return o.to(q.dtype), states[:, :, -1] if final else None
