"""Mamba-2's recurrence in chunks (state-space duality, arXiv 2405.21060, section 6), forward and backward.

mamba_ssm's kernels autotune for most of a minute and take twice as long; these have one shape of work, that of heads of
128. Step and skip are applied inside, so that nothing is scaled beforehand. Shapes: b batch, s tokens in chunks of C,
H heads, G key/value heads, N key width, P value width. With l the log decay, g_i = Σ_{j≤i} l_j inside a chunk and S the
state before it:
    S' = e^{g_C} S + Σ_j e^{g_C − g_j} Δ_j k_j v_jᵀ
    o_i = e^{g_i} q_iᵀ S + Σ_{j≤i} e^{g_i − g_j} (q_iᵀ k_j) Δ_j v_j + d v_i
q [b, s, H, N], k [b, s, G, N], v [b, s, G, P], decay and rate (Δ) [b, s, H] fp32, states [b, H, chunks, N, P].
"""

import triton
import triton.language as tl

VARYING = ["length"]


@triton.jit
def _gates(decay, rate, base, t, length, heads):
    inside = t < length
    at = (base + t.to(tl.int64)) * heads
    return tl.load(decay + at, mask=inside, other=0.0), tl.load(rate + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def states(
    k, v, decay, rate, initial, states, final, length, heads, groups,
    INITIAL: tl.constexpr, FINAL: tl.constexpr, N: tl.constexpr, P: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State before every chunk, and after the last; grid (P / COLS, b · H)."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    group = head // (heads // groups)
    n, p = tl.arange(0, N), tl.program_id(0) * COLS + tl.arange(0, COLS)
    chunks = tl.cdiv(length, CHUNK)
    place = tl.program_id(1).to(tl.int64) * N * P + n[:, None] * P + p[None, :]
    state = tl.zeros([N, COLS], tl.float32)
    if INITIAL:
        state += tl.load(initial + place).to(tl.float32)
    slot = states + tl.program_id(1).to(tl.int64) * chunks * (N * P) + n[:, None] * P + p[None, :]
    for c in range(chunks):
        tl.store(slot, state.to(states.dtype.element_ty))
        slot += N * P
        t = c * CHUNK + tl.arange(0, CHUNK)
        inside = t < length
        row = (batch * length + t.to(tl.int64)) * groups + group
        kt = tl.load(k + row[None, :] * N + n[:, None], mask=inside[None, :], other=0.0)
        x = tl.load(v + row[:, None] * P + p[None, :], mask=inside[:, None], other=0.0)
        log_decay, step = _gates(decay + head, rate + head, batch * length, t, length, heads)
        total = tl.sum(log_decay, axis=0)
        weight = step * tl.exp(total - tl.cumsum(log_decay, axis=0))
        x = (x.to(tl.float32) * weight[:, None]).to(kt.dtype)
        state = state * tl.exp(total) + tl.dot(kt, x, input_precision=PRECISION)
    if FINAL:
        tl.store(final + place, state)


@triton.jit(do_not_specialize=VARYING)
def outputs(
    q, k, v, decay, rate, d, states, o, length, heads, groups,
    N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [b, s, H, P]; grid (chunks, b · H)."""
    c, chunks = tl.program_id(0), tl.num_programs(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    group = head // (heads // groups)
    i, n, p = tl.arange(0, CHUNK), tl.arange(0, N), tl.arange(0, P)
    t = c * CHUNK + i
    inside = (t < length)[:, None]
    token = batch * length + t.to(tl.int64)
    query = tl.load(q + (token * heads + head)[:, None] * N + n[None, :], mask=inside, other=0.0)
    kt = tl.load(k + (token * groups + group)[None, :] * N + n[:, None], mask=(t < length)[None, :], other=0.0)
    value = tl.load(v + (token * groups + group)[:, None] * P + p[None, :], mask=inside, other=0.0).to(tl.float32)
    state = tl.load(states + (tl.program_id(1).to(tl.int64) * chunks + c) * (N * P) + n[:, None] * P + p[None, :])
    log_decay, step = _gates(decay + head, rate + head, batch * length, t, length, heads)
    g = tl.cumsum(log_decay, axis=0)
    out = tl.dot(query, state, input_precision=PRECISION) * tl.exp(g)[:, None]
    scores = tl.dot(query, kt, input_precision=PRECISION)
    scores *= tl.exp(tl.where(i[:, None] >= i[None, :], g[:, None] - g[None, :], -float("inf")))
    out += tl.dot(scores.to(query.dtype), (value * step[:, None]).to(query.dtype), input_precision=PRECISION)
    out += tl.load(d + head).to(tl.float32) * value
    tl.store(o + (token * heads + head)[:, None] * P + p[None, :], out.to(o.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def grad_states(
    q, decay, rate, do, d_final, d_states, d_initial, length, heads,
    FINAL: tl.constexpr, INITIAL: tl.constexpr, N: tl.constexpr, P: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the state after every chunk, and of the initial state; grid (P / COLS, b · H)."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    n, p = tl.arange(0, N), tl.program_id(0) * COLS + tl.arange(0, COLS)
    chunks = tl.cdiv(length, CHUNK)
    place = tl.program_id(1).to(tl.int64) * N * P + n[:, None] * P + p[None, :]
    grad = tl.zeros([N, COLS], tl.float32)
    if FINAL:
        grad += tl.load(d_final + place).to(tl.float32)
    slot = d_states + (tl.program_id(1).to(tl.int64) * chunks + chunks - 1) * (N * P) + n[:, None] * P + p[None, :]
    for back in range(chunks):
        tl.store(slot, grad.to(d_states.dtype.element_ty))
        slot -= N * P
        t = (chunks - 1 - back) * CHUNK + tl.arange(0, CHUNK)
        inside = t < length
        row = (batch * length + t.to(tl.int64)) * heads + head
        qt = tl.load(q + row[None, :] * N + n[:, None], mask=inside[None, :], other=0.0)
        dy = tl.load(do + row[:, None] * P + p[None, :], mask=inside[:, None], other=0.0)
        log_decay, _ = _gates(decay + head, rate + head, batch * length, t, length, heads)
        g = tl.cumsum(log_decay, axis=0)
        dy = (dy.to(tl.float32) * tl.exp(g)[:, None]).to(qt.dtype)
        grad = grad * tl.exp(tl.sum(log_decay, axis=0)) + tl.dot(qt, dy, input_precision=PRECISION)
    if INITIAL:
        tl.store(d_initial + place, grad)


@triton.jit(do_not_specialize=VARYING)
def grad_values(
    q, k, v, decay, rate, d, d_states, do, dv, d_rate, dd, length, heads, groups,
    N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv [b, s, H, P] by query head, d_rate [b, s, H] through the values, dd [b, chunks, H]; grid (chunks, b · H).

    Apart from `grad_keys`, whose tensors would not fit beside these.
    """
    c, chunks = tl.program_id(0), tl.num_programs(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    group = head // (heads // groups)
    i, n, p = tl.arange(0, CHUNK), tl.arange(0, N), tl.arange(0, P)
    t = c * CHUNK + i
    inside = (t < length)[:, None]
    token = batch * length + t.to(tl.int64)
    at_p = (token * heads + head)[:, None] * P + p[None, :]
    query = tl.load(q + (token * heads + head)[:, None] * N + n[None, :], mask=inside, other=0.0)
    key = tl.load(k + (token * groups + group)[:, None] * N + n[None, :], mask=inside, other=0.0)
    log_decay, step = _gates(decay + head, rate + head, batch * length, t, length, heads)
    g = tl.cumsum(log_decay, axis=0)
    # transposed scores, rows j ≤ columns i: the weights with which do_i reaches value j
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    scores *= tl.exp(tl.where(i[:, None] <= i[None, :], g[None, :] - g[:, None], -float("inf")))
    grad = tl.load(d_states + (tl.program_id(1).to(tl.int64) * chunks + c) * (N * P) + n[:, None] * P + p[None, :])
    entering = tl.dot(key, grad, input_precision=PRECISION) * tl.exp(tl.sum(log_decay, axis=0) - g)[:, None]
    dy = tl.load(do + at_p, mask=inside, other=0.0)
    entering += tl.dot(scores.to(dy.dtype), dy, input_precision=PRECISION)
    value = tl.load(v + (token * groups + group)[:, None] * P + p[None, :], mask=inside, other=0.0).to(tl.float32)
    dy_wide = dy.to(tl.float32)
    skip = tl.load(d + head).to(tl.float32)
    tl.store(dv + at_p, (entering * step[:, None] + skip * dy_wide).to(dv.dtype.element_ty), mask=inside)
    tl.store(dd + (batch * chunks + c) * heads + head, tl.sum(value * dy_wide))
    tl.store(d_rate + token * heads + head, tl.sum(entering * value, axis=1), mask=t < length)


@triton.jit(do_not_specialize=VARYING)
def grad_keys(
    q, k, v, decay, rate, states, d_states, do, dq, dk, d_decay, length, heads, groups,
    N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk [b, s, H, N] by query head, d_decay [b, s, H]; grid (chunks, b · H)."""
    c, chunks = tl.program_id(0), tl.num_programs(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    group = head // (heads // groups)
    i, n, p = tl.arange(0, CHUNK), tl.arange(0, N), tl.arange(0, P)
    t = c * CHUNK + i
    inside = (t < length)[:, None]
    token = batch * length + t.to(tl.int64)
    at_n = (token * heads + head)[:, None] * N + n[None, :]
    slot = (tl.program_id(1).to(tl.int64) * chunks + c) * (N * P)
    log_decay, step = _gates(decay + head, rate + head, batch * length, t, length, heads)
    g, total = tl.cumsum(log_decay, axis=0), tl.sum(log_decay, axis=0)
    value = tl.load(v + (token * groups + group)[:, None] * P + p[None, :], mask=inside, other=0.0)
    weighted = (value.to(tl.float32) * step[:, None]).to(value.dtype)
    dy = tl.load(do + (token * heads + head)[:, None] * P + p[None, :], mask=inside, other=0.0)
    d_scores = tl.dot(dy, tl.trans(weighted), input_precision=PRECISION)
    d_scores *= tl.exp(tl.where(i[:, None] >= i[None, :], g[:, None] - g[None, :], -float("inf")))
    d_scores = d_scores.to(value.dtype)
    # the states, transposed as they are read
    state = tl.load(states + slot + n[None, :] * P + p[:, None])
    grad = tl.load(d_states + slot + n[None, :] * P + p[:, None])
    d_total = tl.exp(total) * tl.sum(state.to(tl.float32) * grad.to(tl.float32))
    key = tl.load(k + (token * groups + group)[:, None] * N + n[None, :], mask=inside, other=0.0)
    query = tl.load(q + at_n, mask=inside, other=0.0)
    d_query = tl.dot(dy, state, input_precision=PRECISION) * tl.exp(g)[:, None]
    d_query += tl.dot(d_scores, key, input_precision=PRECISION)
    tl.store(dq + at_n, d_query.to(dq.dtype.element_ty), mask=inside)
    d_gate = tl.sum(d_query * query.to(tl.float32), axis=1)
    d_key = tl.dot(weighted, grad, input_precision=PRECISION) * tl.exp(total - g)[:, None]
    key_wide = key.to(tl.float32)
    d_total += tl.sum(d_key * key_wide)
    d_key += tl.dot(tl.trans(d_scores), query, input_precision=PRECISION)
    tl.store(dk + at_n, d_key.to(dk.dtype.element_ty), mask=inside)
    d_gate -= tl.sum(d_key * key_wide, axis=1)
    # every token's gate takes part in the chunk's whole decay
    d_decays = tl.cumsum(d_gate, axis=0, reverse=True) + d_total
    tl.store(d_decay + token * heads + head, d_decays, mask=t < length)
