"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464) on raw gates; the maths is in hf/recurrences_oryx.py.

Shapes: b batch, s sequence, H query heads, G key/value heads (H % G == 0), N key width, P value width, n chunks,
c tokens per chunk. With q and k L2-normalised per head and q scaled by 1/√N:
    α_t = exp(−exp(a_log) softplus(a_t + dt_bias));  β_t = σ(b_t)
    S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ;  o_t = S_tᵀ q_t
"""

from __future__ import annotations

from torch import Tensor

from oryx_megatron.hf.recurrences_oryx import STEPWISE, delta_chunks, delta_gates, delta_step, stepwise, unit
from oryx_megatron.ops import backends


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
    log_decay, beta = delta_gates(a, b, dt_bias, a_log)
    query = unit(q, q.shape[-1] ** -0.5)
    o, state = stepwise(delta_step, query, unit(k), v, log_decay, beta, initial, documents)
    assert o is not None  # there is a query
    return o.to(q.dtype), state if final else None


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
    """`gated_delta_rule` by matrix products over chunks."""
    log_decay, beta = delta_gates(a, b, dt_bias, a_log)
    query = unit(q, q.shape[-1] ** -0.5)
    o, state = delta_chunks(query, unit(k), v, log_decay, beta, initial=initial, documents=documents, chunk=chunk)
    assert o is not None  # there is a query
    return o.to(q.dtype), state if final else None
