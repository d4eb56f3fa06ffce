"""The mixer's functions as training calls them; their bodies are the reference backend, by the maths of hf/*_oryx.py.

Shapes: b batch, s sequence, c channels, w taps, H query heads, G key/value heads (H % G == 0), N key width, P value
width. Gates are given as raw logits. `documents`: cumulative starts [0, ..., s], strictly rising, or None; nothing
crosses a start, and `initial` belongs to the first document.
"""

from __future__ import annotations

import functools
from typing import Literal

from torch import Tensor

from oryx_megatron.config import to_dict
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.hf import norm_conv_oryx, recurrences_oryx
from oryx_megatron.hf.recurrences_oryx import delta_gates, ssd_gates, unit, wide, with_skip
from oryx_megatron.hf.rotary_oryx import Rope, rotate
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
