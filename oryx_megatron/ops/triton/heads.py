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
def _halves(p, at, ok, cols, HALF: tl.constexpr):
    """Both halves of one head from `at`, in the tensor's own format; zero where not ok."""
    return tl.load(p + at + cols, mask=ok, other=0.0), tl.load(p + at + HALF + cols, mask=ok, other=0.0)


@triton.jit
def _within(t, length):
    return (t >= 0) & (t < length)


@triton.jit
def _angles(cos, sin, t, ok, cols, ROTARY: tl.constexpr, HALF: tl.constexpr):
    c, s = 0.0, 0.0
    if ROTARY:
        c = tl.load(cos + t * HALF + cols, mask=ok, other=0.0)
        s = tl.load(sin + t * HALF + cols, mask=ok, other=0.0)
    return c, s


@triton.jit
def _taps_of(taps, head, cols, HALF: tl.constexpr):
    """The four taps of one head's channels, each as two halves."""
    at = taps + (head * (2 * HALF) + cols) * 4
    found = ()
    for i in tl.static_range(4):
        found = found + ((tl.load(at + i).to(tl.float32), tl.load(at + HALF * 4 + i).to(tl.float32)),)
    return found


@triton.jit
def _convolved(taps, xs, t, start, half: tl.constexpr, DOCUMENTS: tl.constexpr):
    """z of one half at token t, of the inputs at t, t − 1, t − 2 and t − 3, and these in fp32."""
    x0, x1 = xs[0][half].to(tl.float32), xs[1][half].to(tl.float32)
    x2, x3 = xs[2][half].to(tl.float32), xs[3][half].to(tl.float32)
    if DOCUMENTS:  # nothing from before the token's document; before the sequence they are zero already
        x1 = tl.where(t - 1 >= start, x1, 0.0)
        x2 = tl.where(t - 2 >= start, x2, 0.0)
        x3 = tl.where(t - 3 >= start, x3, 0.0)
    z = taps[3][half] * x0 + taps[2][half] * x1 + taps[1][half] * x2 + taps[0][half] * x3
    return z, (x0, x1, x2, x3)


@triton.jit(do_not_specialize=VARYING)
def forward_taps(
    x, rows, starts, taps, norm, cos, sin, out_a, out_r,
    length, heads, x_row, x_batch, epsilon, l2_epsilon, scale,
    DOCUMENTS: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr,
    OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """With four taps: grid (blocks of BLOCK tokens, b · heads).

    A program walks its tokens with the last inputs in registers, so that each is read once. What it reads lies in
    queues, AHEAD tokens long: one warp that waited for memory at every token would leave most of the bandwidth idle.
    """
    begin = tl.program_id(0) * BLOCK
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    cols = tl.arange(0, HALF)
    x += batch * x_batch + head * (2 * HALF)
    w = _taps_of(taps, head, cols, HALF)
    norm_lo, norm_hi = 0.0, 0.0
    if NORM:
        norm_lo = tl.load(norm + cols).to(tl.float32)
        norm_hi = tl.load(norm + HALF + cols).to(tl.float32)
    t = begin
    # Inputs of t − 3, t − 2, t − 1, and of the AHEAD tokens from t on; rows and angles of the next two to be read.
    xs, places, angles = (), (), ()
    for i in tl.static_range(3 + AHEAD):
        ok = _within(t - 3 + i, length)
        xs = xs + (_halves(x, _row(rows, t - 3 + i, 0, ok).to(tl.int64) * x_row, ok, cols, HALF),)
    for i in tl.static_range(2):
        places = places + (_row(rows, t + AHEAD + i, 0, t + AHEAD + i < length),)
        angles = angles + (_angles(cos, sin, t + i, t + i < length, cols, ROTARY, HALF),)
    start = 0
    if DOCUMENTS:
        start = tl.load(starts + t, mask=t < length, other=0)
    out = ((batch * length + t) * heads + head) * (2 * HALF) + cols
    for _ in range(BLOCK // 4):
        for _ in tl.static_range(4):
            xs = xs + (_halves(x, places[0].to(tl.int64) * x_row, t + AHEAD < length, cols, HALF),)
            places = places[1:] + (_row(rows, t + AHEAD + 2, 0, t + AHEAD + 2 < length),)
            angles = angles + (_angles(cos, sin, t + 2, t + 2 < length, cols, ROTARY, HALF),)
            seen = (xs[3], xs[2], xs[1], xs[0])
            lo, _ = _convolved(w, seen, t, start, 0, DOCUMENTS)
            hi, _ = _convolved(w, seen, t, start, 1, DOCUMENTS)
            if SILU:
                lo *= tl.sigmoid(lo)
                hi *= tl.sigmoid(hi)
            a_lo, a_hi, r_lo, r_hi = _finish(
                lo, hi, angles[0][0], angles[0][1], norm_lo, norm_hi, epsilon, l2_epsilon, scale, 0,
                NORM, ROTARY, L2, HALF,
            )  # fmt: skip
            if OUT_A:
                tl.store(out_a + out, a_lo.to(out_a.dtype.element_ty), mask=t < length)
                tl.store(out_a + out + HALF, a_hi.to(out_a.dtype.element_ty), mask=t < length)
            if OUT_R:
                tl.store(out_r + out, r_lo.to(out_r.dtype.element_ty), mask=t < length)
                tl.store(out_r + out + HALF, r_hi.to(out_r.dtype.element_ty), mask=t < length)
            xs, angles = xs[1:], angles[1:]
            if DOCUMENTS:
                start = tl.load(starts + t + 1, mask=t + 1 < length, other=0)
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
def _grads(grad_a, grad_r, at, ok, cols, OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr):
    """What came back for both uses of one head at one token."""
    a, r = (0.0, 0.0), (0.0, 0.0)
    if OUT_A:
        a = _halves(grad_a, at, ok, cols, HALF)
    if OUT_R:
        r = _halves(grad_r, at, ok, cols, HALF)
    return a, r


@triton.jit
def _input_grad(w, d, later, starts_later, t, half: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Gradient of one half's input at token t, of z's gradients at t and at the three tokens after it."""
    g = w[3][half] * d
    for i in tl.static_range(3):
        share = w[2 - i][half] * later[i][half]
        if DOCUMENTS:
            share = tl.where(t >= starts_later[i], share, 0.0)
        g += share
    return g


@triton.jit
def _step_back(
    x, rows, starts, w, norm_lo, norm_hi, cos, sin, grad_a, grad_r, dx,
    t, at, places, xs, grads, angles, start, later, starts_later, sums,
    own, length, step, x_row, dx_row, cols, epsilon, l2_epsilon, scale,
    DOCUMENTS: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr,
    OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Token t of `backward_taps`; returns what the queues hold after it. own: it lies in the program's block."""
    ok = _within(t - 3 - AHEAD, length)
    xs = xs + (_halves(x, places[3 + AHEAD].to(tl.int64) * x_row, ok, cols, HALF),)
    places = places + (_row(rows, t - 5 - AHEAD, 0, _within(t - 5 - AHEAD, length)),)
    ok = _within(t - AHEAD, length)
    grads = grads + (_grads(grad_a, grad_r, at - AHEAD * step, ok, cols, OUT_A, OUT_R, HALF),)
    angles = angles + (_angles(cos, sin, t - 1, _within(t - 1, length), cols, ROTARY, HALF),)
    z_lo, in_lo = _convolved(w, xs, t, start, 0, DOCUMENTS)
    z_hi, in_hi = _convolved(w, xs, t, start, 1, DOCUMENTS)
    y_lo, y_hi = z_lo, z_hi
    if SILU:
        gate_lo, gate_hi = tl.sigmoid(z_lo), tl.sigmoid(z_hi)
        y_lo, y_hi = z_lo * gate_lo, z_hi * gate_hi
    a, r = grads[0]
    a_lo, a_hi, r_lo, r_hi = y_lo, y_hi, y_lo, y_hi  # not read where nothing comes back
    if OUT_A:
        a_lo, a_hi = a[0].to(tl.float32), a[1].to(tl.float32)
    if OUT_R:
        r_lo, r_hi = r[0].to(tl.float32), r[1].to(tl.float32)
    d_lo, d_hi, w_lo, w_hi = _through_norms(
        y_lo, y_hi, a_lo, a_hi, r_lo, r_hi, angles[0][0], angles[0][1], norm_lo, norm_hi, epsilon, l2_epsilon, scale, 0,
        NORM, ROTARY, L2, OUT_A, OUT_R, HALF,
    )  # fmt: skip
    if SILU:
        d_lo *= gate_lo * (1.0 + z_lo * (1.0 - gate_lo))
        d_hi *= gate_hi * (1.0 + z_hi * (1.0 - gate_hi))
    e_lo, e_hi = tl.where(own, d_lo, 0.0), tl.where(own, d_hi, 0.0)
    added = ()
    for i in tl.static_range(4):
        added = added + ((sums[i][0] + e_lo * in_lo[3 - i], sums[i][1] + e_hi * in_hi[3 - i]),)
    if NORM:
        added = added + ((sums[4][0] + tl.where(own, w_lo, 0.0), sums[4][1] + tl.where(own, w_hi, 0.0)),)
    else:
        added = added + (sums[4],)
    to = dx + places[0].to(tl.int64) * dx_row + cols
    g_lo = _input_grad(w, d_lo, later, starts_later, t, 0, DOCUMENTS)
    g_hi = _input_grad(w, d_hi, later, starts_later, t, 1, DOCUMENTS)
    tl.store(to, g_lo.to(dx.dtype.element_ty), mask=own)
    tl.store(to + HALF, g_hi.to(dx.dtype.element_ty), mask=own)
    later = ((d_lo, d_hi), later[0], later[1])
    if DOCUMENTS:
        starts_later = (start, starts_later[0], starts_later[1])
        start = tl.load(starts + t - 1, mask=_within(t - 1, length), other=length)
    return places[1:], xs[1:], grads[1:], angles[1:], start, later, starts_later, added


@triton.jit(do_not_specialize=VARYING)
def backward_taps(
    x, rows, starts, taps, norm, cos, sin, grad_a, grad_r, dx, dtaps, dnorm,
    length, heads, x_row, x_batch, dx_row, dx_batch, epsilon, l2_epsilon, scale,
    DOCUMENTS: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, L2: tl.constexpr,
    OUT_A: tl.constexpr, OUT_R: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Backward of `forward_taps`: grid (blocks of BLOCK tokens, b · heads).

    A program walks its tokens from the last to the first and keeps in registers the four inputs and four gradients that
    the taps join, so that everything is read once, AHEAD tokens before it is used. It begins three tokens late, whose
    gradients reach back into its block. dtaps [blocks · b, heads · N, 4] and dnorm [blocks · b · heads, N] take each
    program's share.
    """
    begin = tl.program_id(0) * BLOCK
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    cols = tl.arange(0, HALF)
    x += batch * x_batch + head * (2 * HALF)
    dx += batch * dx_batch + head * (2 * HALF)
    w = _taps_of(taps, head, cols, HALF)
    norm_lo, norm_hi = 0.0, 0.0
    if NORM:
        norm_lo = tl.load(norm + cols).to(tl.float32)
        norm_hi = tl.load(norm + HALF + cols).to(tl.float32)
    # One token later than needed, for a multiple of four.
    t = begin + BLOCK + 3
    step = heads * (2 * HALF)
    at = ((batch * length + t) * heads + head) * (2 * HALF)
    # From token t back: rows, inputs, and gradients of the outputs, as far as they have been read.
    places, xs, grads = (), (), ()
    for i in tl.static_range(5 + AHEAD):
        places = places + (_row(rows, t - i, 0, _within(t - i, length)),)
    for i in tl.static_range(3 + AHEAD):
        xs = xs + (_halves(x, places[i].to(tl.int64) * x_row, _within(t - i, length), cols, HALF),)
    for i in tl.static_range(AHEAD):
        grads = grads + (_grads(grad_a, grad_r, at - i * step, _within(t - i, length), cols, OUT_A, OUT_R, HALF),)
    angles = (_angles(cos, sin, t, t < length, cols, ROTARY, HALF),)
    start = 0
    if DOCUMENTS:
        start = tl.load(starts + t, mask=t < length, other=length)
    # Gradients of z at the three tokens after t, and where their documents start.
    later, starts_later, sums = (), (), ()
    for i in tl.static_range(3):
        later = later + ((tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)),)
        starts_later = starts_later + (length + i,)
    for _ in tl.static_range(5):
        sums = sums + ((tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)),)
    for _ in range(BLOCK // 4 + 1):
        for _ in tl.static_range(4):
            places, xs, grads, angles, start, later, starts_later, sums = _step_back(
                x, rows, starts, w, norm_lo, norm_hi, cos, sin, grad_a, grad_r, dx,
                t, at, places, xs, grads, angles, start, later, starts_later, sums,
                (t < begin + BLOCK) & (t < length), length, step, x_row, dx_row, cols, epsilon, l2_epsilon, scale,
                DOCUMENTS, SILU, NORM, ROTARY, L2, OUT_A, OUT_R, HALF, AHEAD,
            )  # fmt: skip
            t -= 1
            at -= step
    program = batch * tl.num_programs(0) + tl.program_id(0)
    place = dtaps + ((program * heads + head) * (2 * HALF) + cols) * 4
    for i in tl.static_range(4):
        lo, hi = sums[i]
        tl.store(place + i, lo)
        tl.store(place + HALF * 4 + i, hi)
    if NORM:
        place = dnorm + (program * heads + head) * (2 * HALF) + cols
        lo, hi = sums[4]
        tl.store(place, lo)
        tl.store(place + HALF, hi)
