"""From projections to what attention and recurrence read: convolution, activation, norms and rotary in one pass.

The projection of a head is read once and each of its uses is written once, in the layout that its reader wants, where
separate steps would pass over memory six times. Shapes: s tokens, b batch, h heads, N = 2 · HALF width. Heads are
handled as two halves (lo, hi), which rotary pairs (rotate-half convention).

    z = Σ_i taps[i] x_{t−3+i}   (TAPS 4; z = x for TAPS 0; nothing from before the token's document)
    y = silu(z) or z
    out_a = rotary(y / rms(y) · norm)   (each step optional)           what attention reads
    out_r = y, or y / ‖y‖ · scale                                      what the recurrence reads

`x` lies in rows: the row of entry t is rows[t] − offset, and entries with a negative row are zero. Its gradient has the
same layout. Outputs are [b, s, h, N].
"""

import triton
import triton.language as tl

VARYING = ["length", "offset"]
"""Arguments that change with the plan: without specialisation, so that no plan compiles anew."""


@triton.jit
def _row(rows, t, offset, valid):
    return tl.load(rows + t, mask=valid, other=0) - offset


@triton.jit
def _tap(x_lo, x_hi, rows, t, offset, valid, x_row, cols):
    """Both halves of x at entries t, zero where not valid."""
    row = _row(rows, t, offset, valid)
    valid = (valid & (row >= 0))[:, None]
    at = row.to(tl.int64)[:, None] * x_row + cols[None, :]
    lo = tl.load(x_lo + at, mask=valid, other=0.0).to(tl.float32)
    hi = tl.load(x_hi + at, mask=valid, other=0.0).to(tl.float32)
    return lo, hi


@triton.jit(do_not_specialize=VARYING)
def forward(
    x, rows, starts, taps, norm, angles, cos, sin, out_a, out_r,
    length, offset, heads, x_row, x_batch, epsilon, l2_epsilon, scale,
    TAPS: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr,
    OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BLOCK entries, b); every program goes through all heads and keeps its angles."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = t < length
    cols = tl.arange(0, HALF)
    if TAPS:
        first = tl.load(starts + t, mask=inside, other=0)
    if ROTARY:
        angle = tl.load(angles + t, mask=inside, other=0)[:, None] * HALF + cols[None, :]
        c = tl.load(cos + angle, mask=inside[:, None], other=0.0)
        s = tl.load(sin + angle, mask=inside[:, None], other=0.0)
    if NORM:
        norm_lo = tl.load(norm + cols).to(tl.float32)[None, :]
        norm_hi = tl.load(norm + HALF + cols).to(tl.float32)[None, :]
    for head in range(heads):
        x_lo = x + batch * x_batch + head * (2 * HALF)
        x_hi = x_lo + HALF
        lo, hi = _tap(x_lo, x_hi, rows, t, offset, inside, x_row, cols)
        if TAPS:
            w = taps + (head * (2 * HALF) + cols) * TAPS
            lo *= tl.load(w + TAPS - 1).to(tl.float32)[None, :]
            hi *= tl.load(w + HALF * TAPS + TAPS - 1).to(tl.float32)[None, :]
            for back in tl.static_range(1, TAPS):
                seen = inside & (t - back >= first)
                before_lo, before_hi = _tap(x_lo, x_hi, rows, t - back, offset, seen, x_row, cols)
                lo += tl.load(w + TAPS - 1 - back).to(tl.float32)[None, :] * before_lo
                hi += tl.load(w + HALF * TAPS + TAPS - 1 - back).to(tl.float32)[None, :] * before_hi
        if SILU:
            lo *= tl.sigmoid(lo)
            hi *= tl.sigmoid(hi)
        if NORM or L2:
            square = tl.sum(lo * lo + hi * hi, axis=1)[:, None]
        out = ((batch * length + t.to(tl.int64)) * heads + head)[:, None] * (2 * HALF) + cols[None, :]
        if OUT_A:
            a_lo, a_hi = lo, hi
            if NORM:
                inverse = tl.rsqrt(square / (2 * HALF) + epsilon)
                a_lo, a_hi = lo * inverse * norm_lo, hi * inverse * norm_hi
            if ROTARY:
                a_lo, a_hi = a_lo * c - a_hi * s, a_hi * c + a_lo * s
            tl.store(out_a + out, a_lo.to(out_a.dtype.element_ty), mask=inside[:, None])
            tl.store(out_a + out + HALF, a_hi.to(out_a.dtype.element_ty), mask=inside[:, None])
        if OUT_R:
            if L2:
                inverse = tl.rsqrt(square + l2_epsilon) * scale
                lo, hi = lo * inverse, hi * inverse
            tl.store(out_r + out, lo.to(out_r.dtype.element_ty), mask=inside[:, None])
            tl.store(out_r + out + HALF, hi.to(out_r.dtype.element_ty), mask=inside[:, None])


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
    length, offset, first_row, heads, x_row, x_batch, dx_row, dx_batch, epsilon, l2_epsilon, scale,
    NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr, OUT_A: tl.constexpr, OUT_R: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of `forward` with TAPS 0 and no activation. dnorm [blocks · b, N] takes each program's share."""
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
def _token(p, row, x_row, ok, cols, HALF: tl.constexpr):
    lo = tl.load(p + row.to(tl.int64) * x_row + cols, mask=ok, other=0.0).to(tl.float32)
    hi = tl.load(p + row.to(tl.int64) * x_row + HALF + cols, mask=ok, other=0.0).to(tl.float32)
    return lo, hi


@triton.jit(do_not_specialize=VARYING)
def backward_taps(
    x, rows, starts, taps, norm, cos, sin, grad_a, grad_r, dx, dtaps, dnorm,
    length, heads, x_row, x_batch, dx_row, dx_batch, epsilon, l2_epsilon,
    SILU: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr,
    OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of `forward` with four taps: grid (blocks of BLOCK tokens, b · heads).

    A program walks its tokens from the last to the first and keeps in registers the four inputs and four gradients that
    the taps join, so that everything is read once. It begins three tokens late, whose gradients reach back into its
    block. dtaps [blocks · b, heads · N, 4] and dnorm [blocks · b · heads, N] take each program's share.
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
    zero = tl.zeros([HALF], tl.float32)
    # the window of inputs x_t, x_{t−1}, x_{t−2}, x_{t−3} at the first token to come
    t = begin + BLOCK + 2
    x0_lo, x0_hi = _token(x, _row(rows, t, 0, t < length), x_row, t < length, cols, HALF)
    x1_lo, x1_hi = _token(x, _row(rows, t - 1, 0, t - 1 < length), x_row, t - 1 < length, cols, HALF)
    x2_lo, x2_hi = _token(x, _row(rows, t - 2, 0, t - 2 < length), x_row, t - 2 < length, cols, HALF)
    # gradients of z at the three tokens after, and the starts of their documents
    z1_lo, z1_hi, z2_lo, z2_hi, z3_lo, z3_hi = zero, zero, zero, zero, zero, zero
    s1, s2, s3 = length, length, length
    sum0_lo, sum0_hi, sum1_lo, sum1_hi = zero, zero, zero, zero
    sum2_lo, sum2_hi, sum3_lo, sum3_hi = zero, zero, zero, zero
    sumn_lo, sumn_hi = zero, zero
    for _ in range(BLOCK + 3):
        known = t < length
        earlier = (t >= 3) & (t - 3 < length)
        x3_lo, x3_hi = _token(x, _row(rows, t - 3, 0, earlier), x_row, earlier, cols, HALF)
        start = tl.load(starts + t, mask=known, other=0)
        at = ((batch * length + t) * heads + head) * (2 * HALF) + cols
        a_lo, a_hi, r_lo, r_hi, c, s = zero, zero, zero, zero, zero, zero
        if OUT_A:
            a_lo = tl.load(grad_a + at, mask=known, other=0.0).to(tl.float32)
            a_hi = tl.load(grad_a + at + HALF, mask=known, other=0.0).to(tl.float32)
        if OUT_R:
            r_lo = tl.load(grad_r + at, mask=known, other=0.0).to(tl.float32)
            r_hi = tl.load(grad_r + at + HALF, mask=known, other=0.0).to(tl.float32)
        if ROTARY and OUT_A:
            c = tl.load(cos + t * HALF + cols, mask=known, other=0.0)
            s = tl.load(sin + t * HALF + cols, mask=known, other=0.0)
        see1, see2, see3 = (t - 1 >= start), (t - 2 >= start), (t - 3 >= start)
        z_lo = w3_lo * x0_lo + tl.where(see1, w2_lo * x1_lo, 0.0)
        z_lo += tl.where(see2, w1_lo * x2_lo, 0.0) + tl.where(see3, w0_lo * x3_lo, 0.0)
        z_hi = w3_hi * x0_hi + tl.where(see1, w2_hi * x1_hi, 0.0)
        z_hi += tl.where(see2, w1_hi * x2_hi, 0.0) + tl.where(see3, w0_hi * x3_hi, 0.0)
        y_lo, y_hi = z_lo, z_hi
        if SILU:
            gate_lo, gate_hi = tl.sigmoid(z_lo), tl.sigmoid(z_hi)
            y_lo, y_hi = z_lo * gate_lo, z_hi * gate_hi
        d_lo, d_hi, wn_lo, wn_hi = _through_norms(
            y_lo, y_hi, a_lo, a_hi, r_lo, r_hi, c, s, norm_lo, norm_hi, epsilon, l2_epsilon, 1.0, 0,
            NORM, ROTARY, L2, OUT_A, OUT_R, HALF,
        )  # fmt: skip
        if SILU:
            d_lo *= gate_lo * (1.0 + z_lo * (1.0 - gate_lo))
            d_hi *= gate_hi * (1.0 + z_hi * (1.0 - gate_hi))
        if t < begin + BLOCK:
            sum3_lo += d_lo * x0_lo
            sum3_hi += d_hi * x0_hi
            sum2_lo += tl.where(see1, d_lo * x1_lo, 0.0)
            sum2_hi += tl.where(see1, d_hi * x1_hi, 0.0)
            sum1_lo += tl.where(see2, d_lo * x2_lo, 0.0)
            sum1_hi += tl.where(see2, d_hi * x2_hi, 0.0)
            sum0_lo += tl.where(see3, d_lo * x3_lo, 0.0)
            sum0_hi += tl.where(see3, d_hi * x3_hi, 0.0)
            if NORM:
                sumn_lo += wn_lo
                sumn_hi += wn_hi
            g_lo = w3_lo * d_lo + tl.where(t >= s1, w2_lo * z1_lo, 0.0)
            g_lo += tl.where(t >= s2, w1_lo * z2_lo, 0.0) + tl.where(t >= s3, w0_lo * z3_lo, 0.0)
            g_hi = w3_hi * d_hi + tl.where(t >= s1, w2_hi * z1_hi, 0.0)
            g_hi += tl.where(t >= s2, w1_hi * z2_hi, 0.0) + tl.where(t >= s3, w0_hi * z3_hi, 0.0)
            to = _row(rows, t, 0, known).to(tl.int64) * dx_row + cols
            tl.store(dx + to, g_lo.to(dx.dtype.element_ty), mask=known)
            tl.store(dx + to + HALF, g_hi.to(dx.dtype.element_ty), mask=known)
        x0_lo, x0_hi, x1_lo, x1_hi, x2_lo, x2_hi = x1_lo, x1_hi, x2_lo, x2_hi, x3_lo, x3_hi
        z3_lo, z3_hi, z2_lo, z2_hi, z1_lo, z1_hi = z2_lo, z2_hi, z1_lo, z1_hi, d_lo, d_hi
        s3, s2, s1 = s2, s1, tl.where(known, start, length)
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
