"""The fast mixer's steps between its matrix products, as autograd functions over the kernels of ops/triton.

Everything here takes projections in rows, [s, b, …] sorted by mode (ops/layout.py), and gives attention and recurrence
what they read, [b, s or n, heads, width]. Needs Triton: ask `missing()` first.

Shapes: b batch, s tokens, n of them in attention mode, H query heads, G key/value heads, N key width, P value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from oryx_megatron import compat, platform
from oryx_megatron.hf.recurrences_oryx import NORM_EPSILON
from oryx_megatron.hf.rotary_oryx import Rope
from oryx_megatron.ops import backends
from oryx_megatron.ops.layout import TokenLayout, around

if TYPE_CHECKING:
    from types import ModuleType

TAPS = 4
"""The one convolution width that the kernels know, besides none."""
RESET = 80.0
"""Taken off the log decay where a document opens: e⁻⁸⁰ of the old state is none in fp32."""
_TILE = {"BLOCK": 16, "num_warps": 4}
_WALK = {"BLOCK": 32, "AHEAD": 6, "num_warps": 1}
_WALK_BACK = {"BLOCK": 64, "AHEAD": 2, "num_warps": 1}
_NORM = {"BLOCK": 2, "num_warps": 1}
_NORM_BACK = {"BLOCK": 4, "num_warps": 2}
_GATES = {"BLOCK": 32, "num_warps": 4}
_SWIGLU = {"BLOCK": 1024, "num_warps": 4}
_ALL = slice(None)
_FEW = 1024
_SHARES = {True: {"ROWS": 1024, "COLS": 8, "num_warps": 8}, False: {"ROWS": 128, "COLS": 64, "num_warps": 8}}
"""By whether a weight has a few numbers, as norms and gates have: then wide columns would leave most programs none."""


def missing() -> str | None:
    """Why these kernels cannot be used here, or None."""
    return platform.missing_package("triton", gpu=True)


def declines(work: backends.Workload | None) -> str | None:
    """Why they do not serve the model, or None."""
    if work is None:
        return None
    model = work.model
    for name, width in (("qk_head_dim", model.qk_head_dim), ("v_head_dim", model.v_head_dim)):
        if width not in (16, 32, 64, 128, 256):
            return f"model.{name} {width} is not a power of two from 16 to 256"
    if model.conv_width not in (0, TAPS):
        return f"model.conv_width is {model.conv_width}, not {TAPS} or 0"
    if model.rotary == "both" or model.shared_query:
        return "it knows neither model.rotary: both nor model.shared_query"
    return None


def in_use() -> bool:
    """Whether the run's mixers take these steps."""
    return backends.mixer_steps() == "fused"


backends.register_steps("fused", missing=missing, declines=declines)


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from oryx_megatron.ops.triton import heads, rows

    return heads, rows


@dataclass(frozen=True)
class HeadSteps:
    """What happens to keys and queries, fixed for a model."""

    silu: bool
    """SiLU after the convolution."""
    norm: bool
    """RMSNorm of what attention reads."""
    rope: Rope | None
    """Rotary of what attention reads; None: none."""
    l2: bool
    """L2 norm of what the recurrence reads."""
    epsilon: float

    @property
    def of_values(self) -> HeadSteps:
        """What happens to values: of all this the activation alone."""
        return HeadSteps(self.silu, norm=False, rope=None, l2=False, epsilon=self.epsilon)


class KeysValues(NamedTuple):
    """What both modes read. Values are given once for each mode, so that their gradients come back apart."""

    attention_keys: Tensor | None
    recurrent_keys: Tensor | None
    attention_values: Tensor | None
    recurrent_values: Tensor | None
    gate: Tensor | None


def keys_values(
    projected: Tensor,
    groups: int,
    widths: tuple[int, int],
    conv: Tensor | None,
    key_norm: Tensor | None,
    layout: TokenLayout,
    steps: HeadSteps,
    *,
    gated: bool,
) -> KeysValues:
    """Keys and values of all tokens from the projection, in what form each mode that occurs reads them.

    projected [s, b, G N + G P (+ H P)] in rows: keys, values, output gate. widths (N, P), conv [G (N + P), 4] or None,
    key_norm [N]. Returns keys [b, s, G, N], values [b, s, G, P], both None for a mode that no token has, and the gate,
    a view [s, b, H P] of the projection.
    """
    return KeysValues(*_KeysValues.apply(projected, conv, key_norm, groups, widths, layout, steps, gated))


class _KeysValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        conv: Tensor | None,
        key_norm: Tensor | None,
        groups: int,
        widths: tuple[int, int],
        layout: TokenLayout,
        steps: HeadSteps,
        gated: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(projected, conv, key_norm)
        ctx.groups, ctx.widths, ctx.layout, ctx.steps = groups, widths, layout, steps
        ctx.weights = conv, key_norm  # themselves: `main_grad` is an attribute
        ctx.set_materialize_grads(False)
        attends, recurs = layout.attention > 0, layout.recurrent > 0
        batch = projected.shape[1]
        shapes = [(batch, layout.length, groups, width) for width in widths]
        key_a = projected.new_empty(shapes[0]) if attends else None
        key_r = projected.new_empty(shapes[0]) if recurs else None
        value = projected.new_empty(shapes[1])
        split = groups * widths[0]
        taps = (None, None) if conv is None else (conv[:split], conv[split:])
        _heads_forward(projected, layout.rows, 0, taps[0], key_norm, layout, layout.identity, steps, key_a, key_r, 1.0)
        values, own = projected[..., split:], steps.of_values
        _heads_forward(values, layout.rows, 0, taps[1], None, layout, layout.identity, own, None, value, 1.0)
        gate = projected[..., split + groups * widths[1] :] if gated else None
        return key_a, key_r, value if attends else None, value.view_as(value) if recurs else None, gate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        projected, conv, key_norm = ctx.saved_tensors
        layout, steps, groups, (qk_head_dim, v_head_dim) = ctx.layout, ctx.steps, ctx.groups, ctx.widths
        key_a, key_r, value_a, value_r, gate = grads
        split = groups * qk_head_dim
        end = split + groups * v_head_dim
        dx = around(gate, projected.shape) if gate is not None else torch.empty_like(projected)
        if gate is None:
            dx[..., end:] = 0
        trains = ctx.needs_input_grad[1:3]
        of_taps, dnorm = list[tuple[slice, Tensor | None]](), None
        for channels, norm, grad_a, grad_r, own in (
            (slice(0, split), key_norm, key_a, key_r, steps),
            (slice(split, end), None, value_a, value_r, steps.of_values),
        ):
            taps = None if conv is None else conv[channels]
            shares, norm_shares = _heads_backward(
                projected[..., channels], layout.rows, 0, taps, norm, layout, layout.identity, own,
                grad_a, grad_r, dx[..., channels], 1.0,
            )  # fmt: skip
            of_taps.append((channels, shares))
            if norm is not None:
                dnorm = _weight_gradient(ctx.weights[1], [(_ALL, norm_shares)], trains=trains[1])
        dconv = None if conv is None else _weight_gradient(ctx.weights[0], of_taps, trains=trains[0])
        return dx, dconv, dnorm, None, None, None, None, None


def attention_query(
    projected: Tensor, width: int, norm: Tensor | None, layout: TokenLayout, steps: HeadSteps
) -> Tensor:
    """[≥ n, b, H N] of the first rows → q [b, n, H, N] as attention reads it; rows past n are not read."""
    return _Query.apply(projected, norm, width, layout, steps, "attention")


def recurrent_query(projected: Tensor, width: int, layout: TokenLayout, steps: HeadSteps) -> Tensor:
    """[≥ s − n, b, H N] of the last rows → q [b, s, H, N] by token, zero for attention tokens."""
    return _Query.apply(projected, None, width, layout, steps, "recurrent")


class _Query(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        norm: Tensor | None,
        width: int,
        layout: TokenLayout,
        steps: HeadSteps,
        mode: Literal["attention", "recurrent"],
    ) -> Tensor:
        ctx.save_for_backward(projected, norm)
        ctx.layout, ctx.steps, ctx.mode, ctx.norm = layout, steps, mode, norm
        rows, batch, channels = projected.shape
        heads = channels // width
        if mode == "attention":
            query = projected.new_empty(batch, layout.attention, heads, width)
            _heads_forward(projected, layout.identity, 0, None, norm, layout, layout.tokens, steps, query, None, 1.0)
        else:
            query = projected.new_empty(batch, layout.length, heads, width)
            place, offset = _recurrent_rows(layout, rows)
            scale = width**-0.5
            _heads_forward(projected, place, offset, None, None, layout, layout.identity, steps, None, query, scale)
        return query

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        projected, norm = ctx.saved_tensors
        layout, steps = ctx.layout, ctx.steps
        used = layout.attention if ctx.mode == "attention" else layout.recurrent
        # Rows past those in use exist only to fill up a multiple that FP8 needs.
        dx = torch.empty_like(projected) if projected.shape[0] == used else torch.zeros_like(projected)
        if ctx.mode == "attention":
            place, offset, angles, a, r = layout.identity, 0, layout.tokens, grads[0], None
        else:
            place, offset = _recurrent_rows(layout, projected.shape[0])
            angles, a, r = layout.identity, None, grads[0]
        scale = 1.0 if r is None else r.shape[-1] ** -0.5
        _, shares = _heads_backward(projected, place, offset, None, norm, layout, angles, steps, a, r, dx, scale)
        dnorm = None if norm is None else _weight_gradient(ctx.norm, [(_ALL, shares)], trains=ctx.needs_input_grad[1])
        return dx, dnorm, None, None, None, None


def _recurrent_rows(layout: TokenLayout, rows: int) -> tuple[Tensor, int]:
    """Table and offset that lead from a token to its row among the last `rows`; below 0 for attention tokens."""
    if rows == layout.recurrent:
        return layout.rows, layout.attention
    # More rows than recurrent tokens: the first ones belong to attention tokens and must not be read.
    offset = layout.length - rows
    return torch.where(layout.rows < layout.attention, -1, layout.rows - offset), 0


def _steps_used(steps: HeadSteps, out_a: Any, out_r: Any) -> dict[str, Any]:
    """The flags of one call: a step whose result nobody takes is left out."""
    return {
        "NORM": steps.norm and out_a is not None,
        "ROTARY": steps.rope is not None and out_a is not None,
        "L2": steps.l2 and out_r is not None,
        "OUT_A": out_a is not None,
        "OUT_R": out_r is not None,
    }


def _angles(steps: HeadSteps, layout: TokenLayout, width: int, used: bool) -> tuple[Tensor | None, Tensor | None]:
    return layout.rotary(steps.rope, width) if used and steps.rope is not None else (None, None)


def _heads_forward(
    x: Tensor,
    rows: Tensor,
    offset: int,
    taps: Tensor | None,
    norm: Tensor | None,
    layout: TokenLayout,
    angles: Tensor,
    steps: HeadSteps,
    out_a: Tensor | None,
    out_r: Tensor | None,
    scale: float,
) -> None:
    """Fill out_a and out_r [b, entries, h, N] from x [rows, b, ≥ h N]; see ops/triton/heads.py."""
    kernels, _ = _kernels()
    out = out_a if out_a is not None else out_r
    assert out is not None
    batch, entries, heads, width = out.shape
    flags = _steps_used(steps, out_a, out_r)
    cos, sin = _angles(steps, layout, width, flags["ROTARY"])
    epsilons = (steps.epsilon, NORM_EPSILON, scale)
    flags["HALF"] = width // 2
    if taps is not None:
        kernels.forward_taps[(-(-entries // _WALK["BLOCK"]), batch * heads)](
            x, rows, layout.starts, taps, norm, cos, sin, out_a, out_r,
            entries, heads, x.stride(0), x.stride(1), *epsilons, DOCUMENTS=layout.isolated, SILU=steps.silu,
            **flags, **_WALK,
        )  # fmt: skip
    elif entries:
        kernels.forward[(-(-entries // _TILE["BLOCK"]), batch)](
            x, rows, norm, angles, cos, sin, out_a, out_r,
            entries, offset, heads, x.stride(0), x.stride(1), *epsilons, **flags, **_TILE,
        )  # fmt: skip


def _heads_backward(
    x: Tensor,
    rows: Tensor,
    offset: int,
    taps: Tensor | None,
    norm: Tensor | None,
    layout: TokenLayout,
    angles: Tensor,
    steps: HeadSteps,
    grad_a: Tensor | None,
    grad_r: Tensor | None,
    dx: Tensor,
    scale: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill dx, of x's shape; returns the programs' shares [n, …] in the gradients of taps and norm, fp32."""
    kernels, _ = _kernels()
    grad = grad_a if grad_a is not None else grad_r
    if grad is None:  # nothing was read
        dx.zero_()
        return None, None
    batch, entries, heads, width = grad.shape
    grad_a, grad_r = (None if g is None else g.contiguous() for g in (grad_a, grad_r))
    flags = _steps_used(steps, grad_a, grad_r)
    cos, sin = _angles(steps, layout, width, flags["ROTARY"])
    dnorm = dtaps = None
    if taps is None:
        blocks = -(-entries // _TILE["BLOCK"])
        if flags["NORM"]:
            dnorm = x.new_empty(blocks * batch, width, dtype=torch.float32)
        if entries:
            kernels.backward[(blocks, batch)](
                x, rows, norm, angles, cos, sin, grad_a, grad_r, dx, dnorm,
                entries, offset, heads, x.stride(0), x.stride(1), dx.stride(0), dx.stride(1),
                steps.epsilon, NORM_EPSILON, scale, HALF=width // 2, **flags, **_TILE,
            )  # fmt: skip
    else:
        blocks = -(-entries // _WALK_BACK["BLOCK"])
        dtaps = x.new_empty(blocks * batch, heads * width, TAPS, dtype=torch.float32)
        if flags["NORM"]:
            dnorm = x.new_empty(blocks * batch * heads, width, dtype=torch.float32)
        kernels.backward_taps[(blocks, batch * heads)](
            x, rows, layout.starts, taps, norm, cos, sin, grad_a, grad_r, dx, dtaps, dnorm,
            entries, heads, x.stride(0), x.stride(1), dx.stride(0), dx.stride(1),
            steps.epsilon, NORM_EPSILON, scale, DOCUMENTS=layout.isolated, SILU=steps.silu, HALF=width // 2,
            **flags, **_WALK_BACK,
        )  # fmt: skip
    return dtaps, dnorm


def _weight_gradient(weight: Any, pieces: list[tuple[slice, Tensor | None]], *, trains: bool) -> Tensor | None:
    """Gradient of a weight, from the shares [n, …] of n programs in each piece of its rows (None: zeros).

    Shares may be wider than their piece. A weight with megatron-core's fp32 buffer gets them there in the same pass.
    """
    if not trains:
        return None
    total = compat.megatron.main_grad_of(weight)
    if total is None:
        gradient = torch.empty_like(weight)
        for rows, shares in pieces:
            gradient[rows] = 0.0 if shares is None else shares.sum(0)[: gradient[rows].shape[0]]
        return gradient
    _, kernels = _kernels()
    for rows, shares in pieces:
        if shares is not None:
            width = (piece := total[rows]).numel()
            sizes = _SHARES[width <= _FEW]
            grid = (-(-width // sizes["COLS"]),)
            kernels.add_shares[grid](shares, piece, len(shares), width, shares[0].numel(), **sizes)
    return compat.megatron.added_to_main_grad(weight)


def gated_norm(
    o_a: Tensor | None, o_r: Tensor | None, gate: Tensor | None, weight: Tensor, layout: TokenLayout, epsilon: float
) -> Tensor:
    """RMSNorm of each row's output in its own mode, times weight and SiLU(gate), in rows.

    o_a [b, n, H, P] of the first rows, o_r [b, s, H, P] by token, gate [s, b, H P] in rows, weight [P] → [s, b, H P].
    """
    return _GatedNorm.apply(o_a, o_r, gate, weight, layout, epsilon)


def in_rows(o_a: Tensor | None, o_r: Tensor | None, layout: TokenLayout) -> Tensor:
    """[s, b, H, P] of each row in its own mode: o_a [b, n, H, P] is of the first rows, o_r [b, s, H, P] by token."""
    return _InRows.apply(o_a, o_r, layout)


class _InRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o_a: Tensor | None, o_r: Tensor | None, layout: TokenLayout) -> Tensor:
        _, kernels = _kernels()
        o_a, o_r = (None if o is None else o.contiguous() for o in (o_a, o_r))
        ctx.layout, ctx.shapes = layout, [None if o is None else o.shape for o in (o_a, o_r)]
        some = o_a if o_a is not None else o_r
        assert some is not None
        rows = some.new_empty(layout.length, some.shape[0], *some.shape[2:])
        grid, sizes = _copies(rows)
        kernels.gather_rows[grid](
            o_a, o_r, layout.tokens, rows, layout.length, layout.attention,
            HAS_A=o_a is not None, HAS_R=o_r is not None, **sizes,
        )  # fmt: skip
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, kernels = _kernels()
        layout, rows = ctx.layout, grads[0].contiguous()
        do_a, do_r = (None if shape is None else rows.new_empty(shape) for shape in ctx.shapes)
        grid, sizes = _copies(rows)
        kernels.scatter_rows[grid](
            rows, layout.tokens, do_a, do_r, layout.length, layout.attention,
            HAS_A=do_a is not None, HAS_R=do_r is not None, **sizes,
        )  # fmt: skip
        return do_a, do_r, None


def _copies(rows: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and sizes of the kernels that copy rows [s, b, H, P]."""
    width = rows.shape[2] * rows.shape[3]
    return (*rows.shape[:2], -(-width // _SWIGLU["BLOCK"])), {"WIDTH": width, **_SWIGLU}


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        o_a: Tensor | None,
        o_r: Tensor | None,
        gate: Tensor | None,
        weight: Tensor,
        layout: TokenLayout,
        epsilon: float,
    ) -> Tensor:
        _, kernels = _kernels()
        o_a, o_r = (None if o is None else o.contiguous() for o in (o_a, o_r))
        ctx.save_for_backward(o_a, o_r, gate, weight)
        ctx.layout, ctx.epsilon, ctx.weight = layout, epsilon, weight
        some = o_a if o_a is not None else o_r
        assert some is not None
        batch, _, heads, width = some.shape
        y = some.new_empty(layout.length, batch, heads * width)
        strides = (0, 0) if gate is None else gate.stride()[:2]
        kernels.gated_norm_forward[(-(-layout.length // _NORM["BLOCK"]), batch)](
            o_a, o_r, gate, weight, layout.tokens, y, layout.length, layout.attention, heads, *strides, epsilon,
            HAS_A=o_a is not None, HAS_R=o_r is not None, GATE=gate is not None, P=width, **_NORM,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, kernels = _kernels()
        o_a, o_r, gate, weight = ctx.saved_tensors
        layout, dy = ctx.layout, grads[0].contiguous()
        some = o_a if o_a is not None else o_r
        batch, _, heads, width = some.shape
        do_a, do_r = (None if o is None else torch.empty_like(o) for o in (o_a, o_r))
        dgate, strides = None, (0, 0, 0, 0)
        if gate is not None:
            dgate = torch.empty_like(gate)
            if gate.stride(1) > gate.shape[2]:  # the last columns of a projection: see `around`
                dgate = gate.new_empty(*gate.shape[:2], gate.stride(1))[..., -gate.shape[2] :]
            strides = (*gate.stride()[:2], *dgate.stride()[:2])
        blocks = -(-layout.length // _NORM_BACK["BLOCK"])
        dweight = weight.new_empty(blocks * batch, width, dtype=torch.float32)
        kernels.gated_norm_backward[(blocks, batch)](
            o_a, o_r, gate, weight, layout.tokens, dy, do_a, do_r, dgate, dweight,
            layout.length, layout.attention, heads, *strides, ctx.epsilon,
            HAS_A=o_a is not None, HAS_R=o_r is not None, GATE=gate is not None, P=width, **_NORM_BACK,
        )  # fmt: skip
        dweight = _weight_gradient(ctx.weight, [(_ALL, dweight)], trains=ctx.needs_input_grad[3])
        return do_a, do_r, dgate, dweight, None, None


def gates(
    logits: Tensor, a_log: Tensor, dt_bias: Tensor, layout: TokenLayout, kind: Literal["gdn", "mamba2"]
) -> tuple[Tensor, Tensor]:
    """Log decay and rate (gdn: β, mamba2: Δ), both [b, s, H] fp32 by token, of logits [s, b, 2 H or H] in rows."""
    return _Gates.apply(logits, a_log, dt_bias, layout, kind == "gdn")


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, a_log: Tensor, dt_bias: Tensor, layout: TokenLayout, delta: bool
    ) -> tuple[Tensor, Tensor]:
        _, kernels = _kernels()
        logits = logits.contiguous()
        ctx.save_for_backward(logits, a_log, dt_bias)
        ctx.layout, ctx.delta, ctx.weights = layout, delta, (a_log, dt_bias)
        heads, batch = a_log.shape[0], logits.shape[1]
        decay = logits.new_empty(batch, layout.length, heads, dtype=torch.float32)
        rate = torch.empty_like(decay)
        block = _GATES["BLOCK"]
        kernels.gates_forward[(-(-layout.length // block), batch)](
            logits, layout.rows, layout.opens_document, a_log, dt_bias, decay, rate, layout.length, heads,
            DELTA=delta, DOCUMENTS=layout.isolated, RESET=RESET, HEADS=_power_of_two(heads), **_GATES,
        )  # fmt: skip
        return decay, rate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, kernels = _kernels()
        logits, a_log, dt_bias = ctx.saved_tensors
        heads, batch, length = a_log.shape[0], logits.shape[1], ctx.layout.length
        padded, blocks = _power_of_two(heads), -(-length // _GATES["BLOCK"])
        d_logits = torch.empty_like(logits)
        d_a_log = logits.new_empty(blocks * batch, padded, dtype=torch.float32)
        d_bias = torch.empty_like(d_a_log)
        d_decay, d_rate = (grad.float().contiguous() for grad in grads)
        kernels.gates_backward[(blocks, batch)](
            logits, ctx.layout.rows, a_log, dt_bias, d_decay, d_rate, d_logits, d_a_log, d_bias, length, heads,
            DELTA=ctx.delta, HEADS=padded, **_GATES,
        )  # fmt: skip
        d_a, d_b = (
            _weight_gradient(weight, [(_ALL, shares)], trains=trains)
            for weight, shares, trains in zip(ctx.weights, (d_a_log, d_bias), ctx.needs_input_grad[1:3])
        )
        return d_logits, d_a, d_b, None, None


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class SwiGLU(torch.nn.Module):
    """silu(gate) · up of [..., gate │ up]; in the place of megatron-core's activation. Arguments are ignored."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 f] → [..., f]"""
        return _SwiGLU.apply(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing; megatron-core's MLP asks all of its modules."""
        return {}


def discard_swiglu(y: Tensor, x: Tensor, output: Tensor) -> None:
    """Free y = SwiGLU(x) until the gradient of `output`, which was computed from it, arrives.

    What made `output` may have saved y, or a view of it, for its backward pass: it will find it there, computed again.
    x stays, since the backward pass of SwiGLU reads it. Both go with that pass, even where the graph of `output` lives
    on, as a schedule of several microbatches lets it do for one microbatch longer.
    """
    storage = y.untyped_storage()
    size, kept = storage.size(), [x.detach().contiguous(), y.detach()]

    def restore(grad: Tensor) -> None:
        if kept:
            y, x = kept.pop(), kept.pop()
            y.untyped_storage().resize_(size)
            _swiglu(x, y)

    output.register_hook(restore)
    storage.resize_(0)


def _swiglu(x: Tensor, y: Tensor) -> None:
    if not y.numel():  # no token came to this rank's experts
        return
    _, kernels = _kernels()
    width = y.shape[-1]
    kernels.swiglu_forward[(y.numel() // width, -(-width // _SWIGLU["BLOCK"]))](x, y, WIDTH=width, **_SWIGLU)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _swiglu(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        _, kernels = _kernels()
        (x,) = ctx.saved_tensors
        dy, dx = grads[0].contiguous(), torch.empty_like(x)
        if not dy.numel():
            return (dx,)
        width = x.shape[-1] // 2
        grid = (dy.numel() // width, -(-width // _SWIGLU["BLOCK"]))
        kernels.swiglu_backward[grid](x, dy, dx, WIDTH=width, **_SWIGLU)
        return (dx,)
