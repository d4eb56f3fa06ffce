"""Mamba-2's recurrence (state-space duality, arXiv 2405.21060) on raw gates; the maths is in hf/recurrences_oryx.py.

Shapes: b batch, s sequence, H query heads, G key/value heads (H % G == 0), N key width, P value width, n chunks,
c tokens per chunk. The key plays B, the value x, the query C of the paper:
    Δ_t = softplus(dt_t + dt_bias);  a_t = exp(−exp(a_log) Δ_t)
    S_t = a_t S_{t−1} + Δ_t k_t v_tᵀ;  o_t = S_tᵀ q_t + d v_t
"""

from __future__ import annotations

from torch import Tensor

from oryx_megatron.hf.recurrences_oryx import STEPWISE, ssd_chunks, ssd_gates, ssd_step, stepwise, with_skip
from oryx_megatron.ops import backends


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
    step, log_decay = ssd_gates(dt, dt_bias, a_log)
    o, state = stepwise(ssd_step, q, k, v, log_decay, step, initial, documents)
    assert o is not None  # there is a query
    return with_skip(o, v, d).to(q.dtype), state if final else None


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
    """`ssd` by matrix products over chunks."""
    step, log_decay = ssd_gates(dt, dt_bias, a_log)
    o, state = ssd_chunks(q, k, v, log_decay, step, initial=initial, documents=documents, chunk=chunk)
    assert o is not None  # there is a query
    return with_skip(o, v, d).to(q.dtype), state if final else None
