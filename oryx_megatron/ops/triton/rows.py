"""Row by row: the mixer's gated output norm, its gates, and the SwiGLU of the MLP. One pass over memory each.

Shapes: s tokens, b batch, h heads, P width of a value head. Attention outputs [b, n, h, P] belong to the first n rows,
recurrent outputs [b, s, h, P] are ordered by token; the norm picks for every row the one of its mode, and its backward
pass deals gradients back to both, with zeros for the tokens whose recurrent output nobody read.
"""

import triton
import triton.language as tl

VARYING = ["length", "attention"]
"""Arguments that change with the plan: without specialisation, so that no plan compiles again."""


@triton.jit(do_not_specialize=VARYING)
def gated_norm_forward(
    o_a, o_r, gate, weight, tokens, y, length, attention, heads, gate_row, gate_batch, epsilon,
    HAS_A: tl.constexpr, HAS_R: tl.constexpr, GATE: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [s, b, h P] = o / rms(o) · weight · silu(gate), in rows; grid (blocks of rows, b)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = row < length
    attends = inside & (row < attention)
    recurs = inside & (row >= attention)
    cols = tl.arange(0, P)
    w = tl.load(weight + cols).to(tl.float32)[None, :]
    token = tl.load(tokens + row, mask=inside, other=0).to(tl.int64)
    wide = row.to(tl.int64)
    for head in range(heads):
        o = tl.zeros([BLOCK, P], tl.float32)
        if HAS_A:
            at = ((batch * attention + wide) * heads + head)[:, None] * P + cols[None, :]
            o += tl.load(o_a + at, mask=attends[:, None], other=0.0).to(tl.float32)
        if HAS_R:
            at = ((batch * length + token) * heads + head)[:, None] * P + cols[None, :]
            o += tl.load(o_r + at, mask=recurs[:, None], other=0.0).to(tl.float32)
        o *= tl.rsqrt(tl.sum(o * o, axis=1)[:, None] / P + epsilon) * w
        if GATE:
            at = (wide * gate_row + batch * gate_batch)[:, None] + head * P + cols[None, :]
            g = tl.load(gate + at, mask=inside[:, None], other=0.0).to(tl.float32)
            o *= g * tl.sigmoid(g)
        at = ((wide * batches + batch) * heads + head)[:, None] * P + cols[None, :]
        tl.store(y + at, o.to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=VARYING)
def gated_norm_backward(
    o_a, o_r, gate, weight, tokens, dy, do_a, do_r, dgate, dweight,
    length, attention, heads, gate_row, gate_batch, dgate_row, dgate_batch, epsilon,
    HAS_A: tl.constexpr, HAS_R: tl.constexpr, GATE: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight [blocks · b, P] takes each program's share."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = row < length
    attends = inside & (row < attention)
    recurs = inside & (row >= attention)
    cols = tl.arange(0, P)
    w = tl.load(weight + cols).to(tl.float32)[None, :]
    token = tl.load(tokens + row, mask=inside, other=0).to(tl.int64)
    wide = row.to(tl.int64)
    total = tl.zeros([BLOCK, P], tl.float32)
    for head in range(heads):
        o = tl.zeros([BLOCK, P], tl.float32)
        at_a = ((batch * attention + wide) * heads + head)[:, None] * P + cols[None, :]
        at_r = ((batch * length + token) * heads + head)[:, None] * P + cols[None, :]
        if HAS_A:
            o += tl.load(o_a + at_a, mask=attends[:, None], other=0.0).to(tl.float32)
        if HAS_R:
            o += tl.load(o_r + at_r, mask=recurs[:, None], other=0.0).to(tl.float32)
        at = ((wide * batches + batch) * heads + head)[:, None] * P + cols[None, :]
        d = tl.load(dy + at, mask=inside[:, None], other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(o * o, axis=1)[:, None] / P + epsilon)
        if GATE:
            at = (wide * gate_row + batch * gate_batch)[:, None] + head * P + cols[None, :]
            g = tl.load(gate + at, mask=inside[:, None], other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(g)
            dg = d * o * inverse * w * sigmoid * (1.0 + g * (1.0 - sigmoid))
            at = (wide * dgate_row + batch * dgate_batch)[:, None] + head * P + cols[None, :]
            tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=inside[:, None])
            d *= g * sigmoid
        total += d * o * inverse
        d *= w
        d = d * inverse - o * (tl.sum(d * o, axis=1)[:, None] * inverse * inverse * inverse / P)
        if HAS_A:
            tl.store(do_a + at_a, d.to(do_a.dtype.element_ty), mask=attends[:, None])
        if HAS_R:
            read = tl.where(recurs[:, None], d, 0.0)
            tl.store(do_r + at_r, read.to(do_r.dtype.element_ty), mask=inside[:, None])
    tl.store(dweight + (batch * tl.num_programs(0) + tl.program_id(0)) * P + cols, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=VARYING)
def gather_rows(
    o_a, o_r, tokens, y, length, attention,
    HAS_A: tl.constexpr, HAS_R: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [s, b, WIDTH] of each row in its own mode; grid (s, b, blocks of WIDTH = h P)."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside, attends = cols < WIDTH, row < attention
    out = y + (row * tl.num_programs(1) + batch) * WIDTH + cols
    if HAS_A:
        own = inside & attends
        tl.store(out, tl.load(o_a + (batch * attention + row) * WIDTH + cols, mask=own), mask=own)
    if HAS_R:
        own = inside & (row >= attention)
        token = tl.load(tokens + row).to(tl.int64)
        tl.store(out, tl.load(o_r + (batch * length + token) * WIDTH + cols, mask=own), mask=own)


@triton.jit(do_not_specialize=VARYING)
def scatter_rows(
    dy, tokens, do_a, do_r, length, attention,
    HAS_A: tl.constexpr, HAS_R: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The way back of `gather_rows`; zeros for the tokens whose recurrent output nobody read."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside, attends = cols < WIDTH, row < attention
    d = tl.load(dy + (row * tl.num_programs(1) + batch) * WIDTH + cols, mask=inside, other=0.0)
    if HAS_A:
        tl.store(do_a + (batch * attention + row) * WIDTH + cols, d, mask=inside & attends)
    if HAS_R:
        token = tl.load(tokens + row).to(tl.int64)
        tl.store(do_r + (batch * length + token) * WIDTH + cols, tl.where(attends, 0.0, d), mask=inside)


@triton.jit
def _softplus(x):
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e  # rounded; the quotient makes up for what the sum lost of a small e
    return tl.where(x > 20.0, x, tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0))))


@triton.jit
def gates_forward(
    logits, rows, opens, a_log, bias, decay, rate, length, heads,
    DELTA: tl.constexpr, DOCUMENTS: tl.constexpr, RESET: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log decay and rate [b, s, h] fp32, by token, of logits [s, b, (2) h], by row. Grid (blocks of tokens, b).

    step = softplus(logit + bias), decay = −exp(a_log) · step. DELTA: rate = sigmoid(second half of the logits), else
    rate = step. Where a document opens, RESET is taken off the log decay: nothing of the state is left.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    head = tl.arange(0, HEADS)
    inside = (t < length)[:, None] & (head < heads)[None, :]
    width = heads * 2 if DELTA else heads
    row = tl.load(rows + t, mask=t < length, other=0).to(tl.int64)
    at = (row * batches + batch)[:, None] * width + head[None, :]
    b = tl.load(bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
    a = tl.exp(tl.load(a_log + head, mask=head < heads, other=0.0).to(tl.float32))[None, :]
    step = _softplus(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32) + b)
    log_decay = -a * step
    if DOCUMENTS:
        log_decay -= RESET * tl.load(opens + t, mask=t < length, other=0).to(tl.float32)[:, None]
    out = (batch * length + t.to(tl.int64))[:, None] * heads + head[None, :]
    tl.store(decay + out, log_decay, mask=inside)
    if DELTA:
        second = tl.load(logits + at + heads, mask=inside, other=0.0).to(tl.float32)
        tl.store(rate + out, tl.sigmoid(second), mask=inside)
    else:
        tl.store(rate + out, step, mask=inside)


@triton.jit
def gates_backward(
    logits, rows, a_log, bias, d_decay, d_rate, d_logits, d_a_log, d_bias, length, heads,
    DELTA: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_a_log and d_bias [blocks · b, HEADS] take each program's share."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    head = tl.arange(0, HEADS)
    inside = (t < length)[:, None] & (head < heads)[None, :]
    width = heads * 2 if DELTA else heads
    row = tl.load(rows + t, mask=t < length, other=0).to(tl.int64)
    at = (row * batches + batch)[:, None] * width + head[None, :]
    out = (batch * length + t.to(tl.int64))[:, None] * heads + head[None, :]
    b = tl.load(bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
    a = tl.exp(tl.load(a_log + head, mask=head < heads, other=0.0).to(tl.float32))[None, :]
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32) + b
    dd = tl.load(d_decay + out, mask=inside, other=0.0)
    dr = tl.load(d_rate + out, mask=inside, other=0.0)
    d_step = -a * dd
    if DELTA:
        second = tl.sigmoid(tl.load(logits + at + heads, mask=inside, other=0.0).to(tl.float32))
        d_second = dr * second * (1.0 - second)
        tl.store(d_logits + at + heads, d_second.to(d_logits.dtype.element_ty), mask=inside)
    else:
        d_step += dr
    dx = d_step * tl.sigmoid(x)
    tl.store(d_logits + at, dx.to(d_logits.dtype.element_ty), mask=inside)
    place = (batch * tl.num_programs(0) + tl.program_id(0)) * HEADS + head
    tl.store(d_bias + place, tl.sum(tl.where(inside, dx, 0.0), axis=0))
    tl.store(d_a_log + place, tl.sum(tl.where(inside, -a * _softplus(x) * dd, 0.0), axis=0))


@triton.jit(do_not_specialize=["count"])
def add_shares(shares, total, count, width, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """total [width] += the sum of the first columns of shares [count, stride], all fp32; grid (blocks of COLS)."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < width
    found = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride + cols[None, :]
        found += tl.load(shares + at, mask=(row < count)[:, None] & inside[None, :], other=0.0)
    before = tl.load(total + cols, mask=inside, other=0.0)
    tl.store(total + cols, before + tl.sum(found, axis=0), mask=inside)


@triton.jit
def swiglu_forward(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """y [rows, WIDTH] = silu(gate) · up for x [rows, gate │ up]; grid (rows, blocks of WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    g = tl.load(x + row * (2 * WIDTH) + cols, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x + row * (2 * WIDTH) + WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + cols, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(x, dy, dx, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of both halves."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    at = row * (2 * WIDTH) + cols
    g = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dx + at, (d * u * s * (1.0 + g * (1.0 - s))).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + at + WIDTH, (d * g * s).to(dx.dtype.element_ty), mask=inside)
