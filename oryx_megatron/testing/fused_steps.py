"""The fused mixer's steps (ops/fused.py) written out in plain torch: for machines where Triton cannot run them.

With these in their places the rest of the fused mixer is tested: order of rows, projections of some rows, exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron import ops
from oryx_megatron.hf.recurrences_oryx import delta_gates, delta_step, ssd_gates, ssd_step, stepwise, unit, with_skip
from oryx_megatron.ops import TokenLayout, fused
from oryx_megatron.ops.fused import HeadSteps, KeysValues

FUSED: dict[str, Any] = {"fused_mixer": True, "use_te_activation_func": True, "bias_activation_fusion": False}
"""Fields of `transformer_config` for fused mixers where the platform would not choose them."""


def replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Owner, name and stand-in of every kernel."""
    steps = (keys_values, attention_query, recurrent_query, gates, in_rows, gated_norm)
    return [
        *((fused, step.__name__, step) for step in steps),
        (fused.SwiGLU, "forward", swiglu),
        (fused, "_swiglu", swiglu_into),
        (ops, "ssd_scan", ssd_by_steps),
        (ops, "delta_scan", delta_by_steps),
    ]


def install() -> None:
    """Put them in the kernels' places, for the rest of the process."""
    for owner, name, step in replacements():
        setattr(owner, name, step)


def keys_values(projected, groups, widths, conv, key_norm, layout, steps, *, gated):
    channels = groups * sum(widths)
    kv = projected[..., :channels].index_select(0, layout.rows).transpose(0, 1)
    if conv is not None:
        kv, _ = ops.causal_conv(kv, conv, activation="silu" if steps.silu else None, documents=_documents(layout))
    keys, values = kv.split((groups * widths[0], groups * widths[1]), dim=-1)
    keys, values = keys.unflatten(-1, (groups, -1)), values.unflatten(-1, (groups, -1))
    read = _attention(keys, key_norm, layout.identity, layout, steps), _recurrent(keys, steps, 1.0)
    attends, recurs = layout.attention > 0, layout.recurrent > 0
    gate = projected[..., channels:] if gated else None
    return KeysValues(
        read[0] if attends else None, read[1] if recurs else None,
        values if attends else None, values if recurs else None, gate,
    )  # fmt: skip


def attention_query(projected, width, norm, layout, steps):
    q = projected[: layout.attention].transpose(0, 1).unflatten(-1, (-1, width))
    return _attention(q, norm, layout.tokens[: layout.attention], layout, steps)


def recurrent_query(projected, width, layout, steps):
    q = projected[projected.shape[0] - layout.recurrent :].transpose(0, 1).unflatten(-1, (-1, width))
    by_token = q.new_zeros(q.shape[0], layout.length, *q.shape[2:])
    by_token = by_token.index_copy(1, layout.tokens[layout.attention :].long(), q)
    return _recurrent(by_token, steps, width**-0.5)


def gates(logits, a_log, dt_bias, layout, kind):
    first, *second = logits.index_select(0, layout.rows).transpose(0, 1).float().split(len(a_log), dim=-1)
    if kind == "gdn":
        decay, rate = delta_gates(first, second[0], dt_bias, a_log)
    else:
        rate, decay = ssd_gates(first, dt_bias, a_log)
    if layout.isolated:
        decay = decay - fused.RESET * layout.opens_document[:, None]
    return decay, rate


def in_rows(o_a, o_r, layout):
    parts = [] if o_a is None else [o_a]
    parts += [] if o_r is None else [o_r.index_select(1, layout.tokens[layout.attention :])]
    return torch.cat(parts, dim=1).transpose(0, 1)


def gated_norm(o_a, o_r, gate, weight, layout, epsilon):
    o = in_rows(o_a, o_r, layout)
    gate = None if gate is None else gate.unflatten(-1, (-1, o.shape[-1]))
    return ops.gated_rms_norm(o, gate, weight, epsilon).flatten(2)


def swiglu(self: fused.SwiGLU, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_into(x: Tensor, y: Tensor) -> None:
    """As the kernel writes: unseen by autograd."""
    gate, up = x.detach().chunk(2, dim=-1)
    y.data.copy_(F.silu(gate) * up)


def delta_by_steps(q, k, v, decay, beta) -> tuple[Tensor | None, None]:
    """`ops.delta_scan`."""
    return stepwise(delta_step, q, k, v, decay, beta)[0], None


def ssd_by_steps(q, k, v, decay, step, d) -> tuple[Tensor, None]:
    """`ops.ssd_scan`."""
    o, _ = stepwise(ssd_step, q, k, v, decay, step)
    assert o is not None  # there is a query
    return with_skip(o, v, d), None


def _attention(x: Tensor, norm: Tensor | None, tokens: Tensor, layout: TokenLayout, steps: HeadSteps) -> Tensor:
    x = x if norm is None else ops.rms_norm(x, norm, steps.epsilon)
    return x if steps.rope is None else ops.rotary(x, (tokens - layout.starts[tokens]).long(), steps.rope)


def _recurrent(x: Tensor, steps: HeadSteps, scale: float) -> Tensor:
    return unit(x, scale) if steps.l2 else x


def _documents(layout: TokenLayout) -> Tensor | None:
    if not layout.isolated:
        return None
    return torch.cat((layout.starts.unique(), layout.starts.new_tensor([layout.length]))).int()
