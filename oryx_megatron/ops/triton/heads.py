"""From projections to what attention and recurrence read: convolution, activation, norms and rotary in one pass.

The projection of a head is read once and each of its uses is written once, in the layout that its reader wants, where
separate steps would pass over memory six times. Shapes: s tokens, b batch, h heads, N = 2 · HALF width. Heads are
handled as two halves (lo, hi), which rotary pairs (rotate-half convention).

    z = Σ_i taps[i] x_{t−3+i}   (z = x without taps; nothing from before the token's document)
    y = silu(z) or z
    out_a = rotary(y / rms(y) · norm)   (each step optional)           what attention reads
    out_r = y, or y / ‖y‖ · scale                                      what the recurrence reads

`x` lies in rows: the row of entry t is rows[t], less an offset without taps, and entries with a negative row are zero.
Its gradient has the same layout. Outputs are [b, s, h, N].
"""

import triton
import triton.language as tl

VARYING = ["length", "offset"]
"""Arguments that change with the plan: without specialisation, so that no plan compiles again."""


@triton.jit
def _row(rows, t, offset, valid):
    return tl.load(rows + t, mask=valid, other=0) - offset


@triton.jit
def _finish(
    lo, hi, c, s, norm_lo, norm_hi, epsilon, l2_epsilon, scale, axis: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out_a and out_r of y; reductions run over `axis`."""
    a_lo, a_hi, r_lo, r_hi = lo, hi, lo, hi
    if NORM or L2:
        square = tl.sum(lo * lo + hi * hi, axis=axis, keep_dims=True)
    if NORM:
        inverse = tl.rsqrt(square / (2 * HALF) + epsilon)
        a_lo, a_hi = lo * inverse * norm_lo, hi * inverse * norm_hi
    if ROTARY:
        a_lo, a_hi = a_lo * c - a_hi * s, a_hi * c + a_lo * s
    if L2:
        inverse = tl.rsqrt(square + l2_epsilon) * scale
        r_lo, r_hi = lo * inverse, hi * inverse
    return a_lo, a_hi, r_lo, r_hi


@triton.jit(do_not_specialize=VARYING)
def forward(
    x, rows, norm, angles, cos, sin, out_a, out_r,
    length, offset, heads, x_row, x_batch, epsilon, l2_epsilon, scale,
    NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr,
    OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without taps: grid (blocks of BLOCK entries, b); every program goes through all heads and keeps its angles."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = (t < length)[:, None]
    cols = tl.arange(0, HALF)
    c, s, norm_lo, norm_hi = 0.0, 0.0, 0.0, 0.0
    if ROTARY:
        angle = tl.load(angles + t, mask=t < length, other=0)[:, None] * HALF + cols[None, :]
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
    if NORM:
        norm_lo = tl.load(norm + cols).to(tl.float32)[None, :]
        norm_hi = tl.load(norm + HALF + cols).to(tl.float32)[None, :]
    row = _row(rows, t, offset, t < length)
    valid = inside & (row >= 0)[:, None]
    at = x + batch * x_batch + row.to(tl.int64)[:, None] * x_row + cols[None, :]
    out = ((batch * length + t.to(tl.int64)) * heads)[:, None] * (2 * HALF) + cols[None, :]
    for _ in range(heads):
        lo = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        hi = tl.load(at + HALF, mask=valid, other=0.0).to(tl.float32)
        a_lo, a_hi, r_lo, r_hi = _finish(
            lo, hi, c, s, norm_lo, norm_hi, epsilon, l2_epsilon, scale, 1, NORM, ROTARY, L2, HALF
        )
        if OUT_A:
            tl.store(out_a + out, a_lo.to(out_a.dtype.element_ty), mask=inside)
            tl.store(out_a + out + HALF, a_hi.to(out_a.dtype.element_ty), mask=inside)
        if OUT_R:
            tl.store(out_r + out, r_lo.to(out_r.dtype.element_ty), mask=inside)
            tl.store(out_r + out + HALF, r_hi.to(out_r.dtype.element_ty), mask=inside)
        at += 2 * HALF
        out += 2 * HALF


@triton.jit
def _token(p, row, x_row, ok, cols, HALF: tl.constexpr):
    """Both halves of one head at one row, in the tensor's own format; zero where not ok."""
    at = p + row.to(tl.int64) * x_row + cols
    return tl.load(at, mask=ok, other=0.0), tl.load(at + HALF, mask=ok, other=0.0)


@triton.jit
def _seen(x1, x2, x3, t, start, DOCUMENTS: tl.constexpr):
    """The three inputs before token t, zero from before its document; before the sequence they are zero already."""
    if DOCUMENTS:
        x1 = tl.where(t - 1 >= start, x1, 0.0)
        x2 = tl.where(t - 2 >= start, x2, 0.0)
        x3 = tl.where(t - 3 >= start, x3, 0.0)
    return x1, x2, x3


@triton.jit(do_not_specialize=VARYING)
def forward_taps(
    x, rows, starts, taps, norm, cos, sin, out_a, out_r,
    length, heads, x_row, x_batch, epsilon, l2_epsilon, scale,
    DOCUMENTS: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr,
    OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With four taps: grid (blocks of BLOCK tokens, b · heads).

    A program walks its tokens with the last inputs in registers, so that each is read once, and reads one token ahead:
    the walk would otherwise wait for memory at every step.
    """
    begin = tl.program_id(0) * BLOCK
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    cols = tl.arange(0, HALF)
    x += batch * x_batch + head * (2 * HALF)
    w = taps + (head * (2 * HALF) + cols) * 4
    u = w + HALF * 4
    w0_lo, w1_lo = tl.load(w).to(tl.float32), tl.load(w + 1).to(tl.float32)
    w2_lo, w3_lo = tl.load(w + 2).to(tl.float32), tl.load(w + 3).to(tl.float32)
    w0_hi, w1_hi = tl.load(u).to(tl.float32), tl.load(u + 1).to(tl.float32)
    w2_hi, w3_hi = tl.load(u + 2).to(tl.float32), tl.load(u + 3).to(tl.float32)
    c, s, norm_lo, norm_hi = 0.0, 0.0, 0.0, 0.0
    if NORM:
        norm_lo = tl.load(norm + cols).to(tl.float32)
        norm_hi = tl.load(norm + HALF + cols).to(tl.float32)
    t = begin
    x3_lo, x3_hi = _token(x, _row(rows, t - 3, 0, t >= 3), x_row, t >= 3, cols, HALF)
    x2_lo, x2_hi = _token(x, _row(rows, t - 2, 0, t >= 2), x_row, t >= 2, cols, HALF)
    x1_lo, x1_hi = _token(x, _row(rows, t - 1, 0, t >= 1), x_row, t >= 1, cols, HALF)
    x0_lo, x0_hi = _token(x, _row(rows, t, 0, t < length), x_row, t < length, cols, HALF)
    row = _row(rows, t + 1, 0, t + 1 < length)
    start = 0
    if DOCUMENTS:
        start = tl.load(starts + t, mask=t < length, other=0)
    if ROTARY:
        c = tl.load(cos + t * HALF + cols, mask=t < length, other=0.0)
        s = tl.load(sin + t * HALF + cols, mask=t < length, other=0.0)
    out = ((batch * length + t) * heads + head) * (2 * HALF) + cols
    for _ in range(BLOCK // 4):
        for _ in tl.static_range(4):
            known, more = t < length, t + 1 < length
            next_lo, next_hi = _token(x, row, x_row, more, cols, HALF)
            row = _row(rows, t + 2, 0, t + 2 < length)
            if ROTARY:
                next_c = tl.load(cos + (t + 1) * HALF + cols, mask=more, other=0.0)
                next_s = tl.load(sin + (t + 1) * HALF + cols, mask=more, other=0.0)
            b1_lo, b2_lo, b3_lo = _seen(x1_lo, x2_lo, x3_lo, t, start, DOCUMENTS)
            b1_hi, b2_hi, b3_hi = _seen(x1_hi, x2_hi, x3_hi, t, start, DOCUMENTS)
            lo = w3_lo * x0_lo + w2_lo * b1_lo + w1_lo * b2_lo + w0_lo * b3_lo
            hi = w3_hi * x0_hi + w2_hi * b1_hi + w1_hi * b2_hi + w0_hi * b3_hi
            if SILU:
                lo *= tl.sigmoid(lo)
                hi *= tl.sigmoid(hi)
            a_lo, a_hi, r_lo, r_hi = _finish(
                lo, hi, c, s, norm_lo, norm_hi, epsilon, l2_epsilon, scale, 0, NORM, ROTARY, L2, HALF
            )
            if OUT_A:
                tl.store(out_a + out, a_lo.to(out_a.dtype.element_ty), mask=known)
                tl.store(out_a + out + HALF, a_hi.to(out_a.dtype.element_ty), mask=known)
            if OUT_R:
                tl.store(out_r + out, r_lo.to(out_r.dtype.element_ty), mask=known)
                tl.store(out_r + out + HALF, r_hi.to(out_r.dtype.element_ty), mask=known)
            x3_lo, x3_hi, x2_lo, x2_hi, x1_lo, x1_hi = x2_lo, x2_hi, x1_lo, x1_hi, x0_lo, x0_hi
            x0_lo, x0_hi = next_lo, next_hi
            if DOCUMENTS:
                start = tl.load(starts + t + 1, mask=more, other=0)
            if ROTARY:
                c, s = next_c, next_s
            out += heads * (2 * HALF)
            t += 1


@triton.jit
def _through_norms(
    lo, hi, a_lo, a_hi, r_lo, r_hi, c, s, norm_lo, norm_hi, epsilon, l2_epsilon, scale, axis: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr, OUT_A: tl.constexpr, OUT_R: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Gradient of y from those of out_a and out_r, and of the norm's weight; reductions run over `axis`."""
    d_lo, d_hi = tl.zeros_like(lo), tl.zeros_like(hi)
    w_lo, w_hi = tl.zeros_like(lo), tl.zeros_like(hi)
    if NORM or L2:
        square = tl.sum(lo * lo + hi * hi, axis=axis, keep_dims=True)
    if OUT_A:
        if ROTARY:
            a_lo, a_hi = a_lo * c + a_hi * s, a_hi * c - a_lo * s
        if NORM:
            inverse = tl.rsqrt(square / (2 * HALF) + epsilon)
            w_lo, w_hi = a_lo * lo * inverse, a_hi * hi * inverse
            a_lo, a_hi = a_lo * norm_lo, a_hi * norm_hi
            along = tl.sum(a_lo * lo + a_hi * hi, axis=axis, keep_dims=True)
            along *= inverse * inverse * inverse / (2 * HALF)
            a_lo, a_hi = a_lo * inverse - lo * along, a_hi * inverse - hi * along
        d_lo += a_lo
        d_hi += a_hi
    if OUT_R:
        if L2:
            inverse = tl.rsqrt(square + l2_epsilon)
            along = tl.sum(r_lo * lo + r_hi * hi, axis=axis, keep_dims=True) * (inverse * inverse * inverse * scale)
            r_lo, r_hi = r_lo * (inverse * scale) - lo * along, r_hi * (inverse * scale) - hi * along
        d_lo += r_lo
        d_hi += r_hi
    return d_lo, d_hi, w_lo, w_hi


@triton.jit(do_not_specialize=VARYING)
def backward(
    x, rows, norm, angles, cos, sin, grad_a, grad_r, dx, dnorm,
    length, offset, heads, x_row, x_batch, dx_row, dx_batch, epsilon, l2_epsilon, scale,
    NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr, OUT_A: tl.constexpr, OUT_R: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of `forward`. dnorm [blocks · b, N] takes each program's share."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = t < length
    cols = tl.arange(0, HALF)
    c, s, norm_lo, norm_hi = 0.0, 0.0, 0.0, 0.0
    if ROTARY:
        angle = tl.load(angles + t, mask=inside, other=0)[:, None] * HALF + cols[None, :]
        c = tl.load(cos + angle, mask=inside[:, None], other=0.0)
        s = tl.load(sin + angle, mask=inside[:, None], other=0.0)
    if NORM:
        norm_lo = tl.load(norm + cols).to(tl.float32)[None, :]
        norm_hi = tl.load(norm + HALF + cols).to(tl.float32)[None, :]
    row = _row(rows, t, offset, inside)
    inside = inside & (row >= 0)
    at = row.to(tl.int64)[:, None] * x_row + batch * x_batch + cols[None, :]
    to = row.to(tl.int64)[:, None] * dx_row + batch * dx_batch + cols[None, :]
    sum_lo = tl.zeros([BLOCK, HALF], tl.float32)
    sum_hi = tl.zeros([BLOCK, HALF], tl.float32)
    mask = inside[:, None]
    for head in range(heads):
        lo = tl.load(x + at + head * (2 * HALF), mask=mask, other=0.0).to(tl.float32)
        hi = tl.load(x + at + head * (2 * HALF) + HALF, mask=mask, other=0.0).to(tl.float32)
        out = ((batch * length + t.to(tl.int64)) * heads + head)[:, None] * (2 * HALF) + cols[None, :]
        none = tl.zeros([BLOCK, HALF], tl.float32)
        a_lo, a_hi, r_lo, r_hi = none, none, none, none
        if OUT_A:
            a_lo = tl.load(grad_a + out, mask=mask, other=0.0).to(tl.float32)
            a_hi = tl.load(grad_a + out + HALF, mask=mask, other=0.0).to(tl.float32)
        if OUT_R:
            r_lo = tl.load(grad_r + out, mask=mask, other=0.0).to(tl.float32)
            r_hi = tl.load(grad_r + out + HALF, mask=mask, other=0.0).to(tl.float32)
        d_lo, d_hi, w_lo, w_hi = _through_norms(
            lo, hi, a_lo, a_hi, r_lo, r_hi, c, s, norm_lo, norm_hi, epsilon, l2_epsilon, scale, 1,
            NORM, ROTARY, L2, OUT_A, OUT_R, HALF,
        )  # fmt: skip
        if NORM:
            sum_lo += w_lo
            sum_hi += w_hi
        tl.store(dx + to + head * (2 * HALF), d_lo.to(dx.dtype.element_ty), mask=mask)
        tl.store(dx + to + head * (2 * HALF) + HALF, d_hi.to(dx.dtype.element_ty), mask=mask)
    if NORM:
        place = dnorm + (batch * tl.num_programs(0) + tl.program_id(0)) * (2 * HALF) + cols
        tl.store(place, tl.sum(sum_lo, axis=0))
        tl.store(place + HALF, tl.sum(sum_hi, axis=0))


@triton.jit
def _grads(grad, at, ok, none, USED: tl.constexpr, HALF: tl.constexpr):
    lo, hi = none, none
    if USED:
        lo, hi = tl.load(grad + at, mask=ok, other=0.0), tl.load(grad + at + HALF, mask=ok, other=0.0)
    return lo, hi


@triton.jit(do_not_specialize=VARYING)
def backward_taps(
    x, rows, starts, taps, norm, cos, sin, grad_a, grad_r, dx, dtaps, dnorm,
    length, heads, x_row, x_batch, dx_row, dx_batch, epsilon, l2_epsilon, scale,
    DOCUMENTS: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr,
    OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of `forward_taps`: grid (blocks of BLOCK tokens, b · heads).

    A program walks its tokens from the last to the first and keeps in registers the four inputs and four gradients that
    the taps join, so that everything is read once, one token ahead. It begins three tokens late, whose gradients reach
    back into its block. dtaps [blocks · b, heads · N, 4] and dnorm [blocks · b · heads, N] take each program's share.
    """
    begin = tl.program_id(0) * BLOCK
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    cols = tl.arange(0, HALF)
    x += batch * x_batch + head * (2 * HALF)
    dx += batch * dx_batch + head * (2 * HALF)
    w = taps + (head * (2 * HALF) + cols) * 4
    u = w + HALF * 4
    w0_lo, w1_lo = tl.load(w).to(tl.float32), tl.load(w + 1).to(tl.float32)
    w2_lo, w3_lo = tl.load(w + 2).to(tl.float32), tl.load(w + 3).to(tl.float32)
    w0_hi, w1_hi = tl.load(u).to(tl.float32), tl.load(u + 1).to(tl.float32)
    w2_hi, w3_hi = tl.load(u + 2).to(tl.float32), tl.load(u + 3).to(tl.float32)
    norm_lo, norm_hi = 0.0, 0.0
    if NORM:
        norm_lo = tl.load(norm + cols).to(tl.float32)
        norm_hi = tl.load(norm + HALF + cols).to(tl.float32)
    # At token t: rows and inputs of t, t − 1, t − 2, t − 3. One token later than needed, for a multiple of four.
    t = begin + BLOCK + 3
    row0, row1 = _row(rows, t, 0, t < length), _row(rows, t - 1, 0, t - 1 < length)
    row2, row3 = _row(rows, t - 2, 0, t - 2 < length), _row(rows, t - 3, 0, t - 3 < length)
    x0_lo, x0_hi = _token(x, row0, x_row, t < length, cols, HALF)
    x1_lo, x1_hi = _token(x, row1, x_row, t - 1 < length, cols, HALF)
    x2_lo, x2_hi = _token(x, row2, x_row, t - 2 < length, cols, HALF)
    x3_lo, x3_hi = _token(x, row3, x_row, t - 3 < length, cols, HALF)
    row4 = _row(rows, t - 4, 0, t - 4 < length)
    start = 0
    if DOCUMENTS:
        start = tl.load(starts + t, mask=t < length, other=length)
    at = ((batch * length + t) * heads + head) * (2 * HALF) + cols
    none = tl.zeros([HALF], x.dtype.element_ty)
    a_lo, a_hi = _grads(grad_a, at, t < length, none, OUT_A, HALF)
    r_lo, r_hi = _grads(grad_r, at, t < length, none, OUT_R, HALF)
    c, s = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    if ROTARY:
        c = tl.load(cos + t * HALF + cols, mask=t < length, other=0.0)
        s = tl.load(sin + t * HALF + cols, mask=t < length, other=0.0)
    # Gradients of z at the three tokens after t, and where their documents start. Each name needs a value of its own:
    # Triton takes names of one value for one variable, and a shift between them for none.
    z1_lo, z1_hi = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    z2_lo, z2_hi = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    z3_lo, z3_hi = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    s1, s2, s3 = length, length + 1, length + 2
    sum0_lo, sum0_hi = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    sum1_lo, sum1_hi = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    sum2_lo, sum2_hi = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    sum3_lo, sum3_hi = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    sumn_lo, sumn_hi = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for _ in range((BLOCK + 4) // 4):
        for _ in tl.static_range(4):
            # for the next token, t − 1
            at -= heads * (2 * HALF)
            coming = (t >= 1) & (t - 1 < length)
            early = (t >= 4) & (t - 4 < length)
            x4_lo, x4_hi = _token(x, row4, x_row, early, cols, HALF)
            row5 = _row(rows, t - 5, 0, (t >= 5) & (t - 5 < length))
            next_a_lo, next_a_hi = _grads(grad_a, at, coming, none, OUT_A, HALF)
            next_r_lo, next_r_hi = _grads(grad_r, at, coming, none, OUT_R, HALF)
            if ROTARY:
                next_c = tl.load(cos + (t - 1) * HALF + cols, mask=coming, other=0.0)
                next_s = tl.load(sin + (t - 1) * HALF + cols, mask=coming, other=0.0)
            # for this one
            known = t < length
            b1_lo, b2_lo, b3_lo = _seen(x1_lo.to(tl.float32), x2_lo, x3_lo, t, start, DOCUMENTS)
            b1_hi, b2_hi, b3_hi = _seen(x1_hi.to(tl.float32), x2_hi, x3_hi, t, start, DOCUMENTS)
            z_lo = w3_lo * x0_lo + w2_lo * b1_lo + w1_lo * b2_lo + w0_lo * b3_lo
            z_hi = w3_hi * x0_hi + w2_hi * b1_hi + w1_hi * b2_hi + w0_hi * b3_hi
            y_lo, y_hi = z_lo, z_hi
            if SILU:
                gate_lo, gate_hi = tl.sigmoid(z_lo), tl.sigmoid(z_hi)
                y_lo, y_hi = z_lo * gate_lo, z_hi * gate_hi
            d_lo, d_hi, wn_lo, wn_hi = _through_norms(
                y_lo, y_hi, a_lo.to(tl.float32), a_hi.to(tl.float32), r_lo.to(tl.float32), r_hi.to(tl.float32),
                c, s, norm_lo, norm_hi, epsilon, l2_epsilon, scale, 0, NORM, ROTARY, L2, OUT_A, OUT_R, HALF,
            )  # fmt: skip
            if SILU:
                d_lo *= gate_lo * (1.0 + z_lo * (1.0 - gate_lo))
                d_hi *= gate_hi * (1.0 + z_hi * (1.0 - gate_hi))
            if t < begin + BLOCK:
                sum3_lo += d_lo * x0_lo
                sum3_hi += d_hi * x0_hi
                sum2_lo += d_lo * b1_lo
                sum2_hi += d_hi * b1_hi
                sum1_lo += d_lo * b2_lo
                sum1_hi += d_hi * b2_hi
                sum0_lo += d_lo * b3_lo
                sum0_hi += d_hi * b3_hi
                if NORM:
                    sumn_lo += wn_lo
                    sumn_hi += wn_hi
                if DOCUMENTS:
                    later1, later2, later3 = t >= s1, t >= s2, t >= s3
                    g_lo = w3_lo * d_lo + tl.where(later1, w2_lo * z1_lo, 0.0)
                    g_lo += tl.where(later2, w1_lo * z2_lo, 0.0) + tl.where(later3, w0_lo * z3_lo, 0.0)
                    g_hi = w3_hi * d_hi + tl.where(later1, w2_hi * z1_hi, 0.0)
                    g_hi += tl.where(later2, w1_hi * z2_hi, 0.0) + tl.where(later3, w0_hi * z3_hi, 0.0)
                else:
                    g_lo = w3_lo * d_lo + w2_lo * z1_lo + w1_lo * z2_lo + w0_lo * z3_lo
                    g_hi = w3_hi * d_hi + w2_hi * z1_hi + w1_hi * z2_hi + w0_hi * z3_hi
                to = row0.to(tl.int64) * dx_row + cols
                tl.store(dx + to, g_lo.to(dx.dtype.element_ty), mask=known)
                tl.store(dx + to + HALF, g_hi.to(dx.dtype.element_ty), mask=known)
            x0_lo, x0_hi, x1_lo, x1_hi, x2_lo, x2_hi = x1_lo, x1_hi, x2_lo, x2_hi, x3_lo, x3_hi
            x3_lo, x3_hi, row0, row1, row2, row3, row4 = x4_lo, x4_hi, row1, row2, row3, row4, row5
            z3_lo, z3_hi, z2_lo, z2_hi, z1_lo, z1_hi = z2_lo, z2_hi, z1_lo, z1_hi, d_lo, d_hi
            if DOCUMENTS:
                s3, s2, s1 = s2, s1, start
                start = tl.load(starts + t - 1, mask=coming, other=length)
            if OUT_A:
                a_lo, a_hi = next_a_lo, next_a_hi
            if OUT_R:
                r_lo, r_hi = next_r_lo, next_r_hi
            if ROTARY:
                c, s = next_c, next_s
            t -= 1
    program = batch * tl.num_programs(0) + tl.program_id(0)
    place = dtaps + ((program * heads + head) * (2 * HALF) + cols) * 4
    tl.store(place, sum0_lo)
    tl.store(place + 1, sum1_lo)
    tl.store(place + 2, sum2_lo)
    tl.store(place + 3, sum3_lo)
    place += HALF * 4
    tl.store(place, sum0_hi)
    tl.store(place + 1, sum1_hi)
    tl.store(place + 2, sum2_hi)
    tl.store(place + 3, sum3_hi)
    if NORM:
        place = dnorm + (program * heads + head) * (2 * HALF) + cols
        tl.store(place, sumn_lo)
        tl.store(place + HALF, sumn_hi)
