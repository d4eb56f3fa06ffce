"""Causal depthwise convolution over the sequence, with a window that is handed on.

Shapes: b batch, s sequence, c channels, w taps.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.ops import backends
from oryx_megatron.ops.chunks import segments, wide


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

    x [b, s, c], weight [c, w], initial: the w−1 inputs before x, oldest first [b, c, w−1] (zeros when None),
    documents: cumulative starts [0, ..., s], strictly rising, or None (nothing crosses a start; `initial` belongs to
    the first document). Returns y [b, s, c] in x's format and, with `final`, the last w−1 inputs of the last
    document [b, c, w−1], zeros where it has fewer.
    """
    past = weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], past, x.shape[2]) if initial is None else initial.transpose(1, 2).to(x.dtype)
    padded = torch.cat((before, x), 1)  # [b, w − 1 + s, c]
    segment = None
    if documents is not None:
        segment = F.pad(segments(documents, x.shape[1]), (past, 0))  # the initial window is of the first document
    y = _ShiftAndAdd.apply(padded, weight, segment)
    if activation == "silu":
        y = F.silu(y)
    window = None
    if final:
        window = padded[:, x.shape[1] :]
        if segment is not None:
            window = window * (segment[x.shape[1] :] == segment[-1]).unsqueeze(-1)
        window = window.transpose(1, 2).contiguous()
    return y.to(x.dtype), window


class _ShiftAndAdd(torch.autograd.Function):
    """Σ_i weight[:, i] padded[:, i : i + s] without leaving the [b, s, c] layout; sums in fp32 (fp64 for fp64).

    Written out because autograd would fill a whole-length gradient for each of the w slices.
    """

    @staticmethod
    def forward(ctx, padded: Tensor, weight: Tensor, segment: Tensor | None) -> Tensor:
        ctx.save_for_backward(padded, weight, segment)
        to = wide(padded.dtype)
        padded, taps = padded.to(to), weight.to(to).unbind(1)
        length = padded.shape[1] - len(taps) + 1
        y = padded[:, len(taps) - 1 :] * taps[-1]
        for i, tap in enumerate(taps[:-1]):
            y.addcmul_(_reached(padded[:, i : i + length], segment, i, len(taps)), tap)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, weight, segment = ctx.saved_tensors
        to, taps = wide(padded.dtype), weight.to(wide(padded.dtype)).unbind(1)
        length = grad.shape[1]
        grad_padded = torch.zeros_like(padded, dtype=to)
        grad_taps = []
        for i, tap in enumerate(taps):
            reached = _reached(grad, segment, i, len(taps))
            grad_padded[:, i : i + length].addcmul_(reached, tap)
            grad_taps.append((reached * padded[:, i : i + length]).sum((0, 1)))
        return grad_padded.to(padded.dtype), torch.stack(grad_taps, 1).to(weight.dtype), None


def _reached(x: Tensor, segment: Tensor | None, tap: int, taps: int) -> Tensor:
    """x [b, s, c] with zeros at the tokens whose `tap` lies in another document."""
    if segment is None or tap == taps - 1:
        return x
    length = x.shape[1]
    return x * (segment[tap : tap + length] == segment[taps - 1 :]).unsqueeze(-1)
