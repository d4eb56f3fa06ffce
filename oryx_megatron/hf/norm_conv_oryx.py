"""RMSNorm and the causal convolution in plain torch: what training is held against, and what an export computes.

Torch only. `ops/` imports it, and every export ships it beside `modeling_oryx.py`. Computed in fp32, or in fp64 where
the input is fp64.

Shapes: b batch, s tokens of this call, c channels, w taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .recurrences_oryx import STEPWISE, segments, wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """x / √(mean x² + eps) · weight (· SiLU(gate)) over the last dimension, in fp32 or fp64.

    x, gate [..., n], weight [n] -> [..., n]. With the gate: the mixer's output norm (Oryx, arXiv 2605.28769, eq. 2).
    """
    to = wide(x.dtype)
    y = F.rms_norm(x.to(to), weight.shape, weight.to(to), eps)
    return y if gate is None else y * F.silu(gate.to(to))


def causal_conv(
    x: Tensor,
    weight: Tensor,
    *,
    silu: bool = False,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    counts: Tensor | None = None,
    final: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_t = Σ_i weight[:, i] x_{t−w+1+i}, or SiLU of it; the last tap is the token's own.

    x [b, s, c], weight [c, w], initial: the w − 1 inputs before x, oldest first [b, c, w − 1] (zeros when None),
    documents: cumulative starts [0, ..., s], strictly rising, or None (nothing crosses a start; `initial` belongs to
    the first document). Returns y [b, s, c] in x's format and, with `final`, what the next call starts from: the last
    w − 1 inputs of the last document [b, c, w − 1], zeros where it has fewer. `counts` [b], instead of documents: only
    so many tokens of a row, its first ones, are in that window.
    """
    length, past = x.shape[1], weight.shape[1] - 1
    if documents is None and (torch.compiler.is_compiling() or length <= STEPWISE or x.is_cuda):
        # Sums over taps: torch.compile fuses them with the update of a decoding step's window, torch.export needs no
        # bound on the length.
        full = _with_window(x, past, initial)
        exact, taps = full.to(wide(x.dtype)), weight.to(wide(x.dtype))
        first, *others = (exact[..., i : i + length] * taps[:, i, None] for i in range(past + 1))
        y = sum(others, first).transpose(1, 2)
        window = _last(full, past, counts) if final else None
    else:
        y = _depthwise(x, weight, initial, documents)
        start = 0 if documents is None or not final else int(documents[-2])
        window = next_window(x[:, start:], past, None if start else initial, counts) if final else None
    return (F.silu(y) if silu else y).to(x.dtype), window


def next_window(x: Tensor, past: int, initial: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """The last `past` inputs of x [b, s, c] and what is before it, as `causal_conv` returns them."""
    if counts is None and x.shape[1] > past:
        x, initial = x[:, x.shape[1] - past :], None
    return _last(_with_window(x, past, initial), past, counts).contiguous()


def _with_window(x: Tensor, past: int, initial: Tensor | None) -> Tensor:
    """[b, s, c] and the inputs before them -> [b, c, w − 1 + s]"""
    x = x.transpose(1, 2)
    first = x.new_zeros(*x.shape[:2], past) if initial is None else initial
    return torch.cat([first.to(x.dtype), x], -1)


def _last(full: Tensor, past: int, counts: Tensor | None) -> Tensor:
    """The last inputs of [b, c, w − 1 + s], or those before token counts[b] of the s."""
    if counts is None:
        return full[..., full.shape[-1] - past :]
    columns = counts[:, None] + torch.arange(past, device=full.device)
    return full.gather(2, columns[:, None].expand(-1, full.shape[1], -1))


def _depthwise(x: Tensor, weight: Tensor, initial: Tensor | None, documents: Tensor | None) -> Tensor:
    """`causal_conv` before SiLU, [b, s, c] in fp32 or fp64.

    As a convolution over images of one row in channels-last layout, which is [b, s, c] as it stands: on a CPU twice
    as fast as conv1d with its transposes, and eight times as fast as sums over taps.
    """
    to, length, past = wide(x.dtype), x.shape[1], weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], past, x.shape[2]) if initial is None else initial.transpose(1, 2).to(x.dtype)
    padded = torch.cat((before, x), 1)  # [b, w − 1 + s, c]
    if documents is not None:  # w − 1 zeros before every further document; token t comes to row place[t]
        place = torch.arange(length, device=x.device) + past * (1 + segments(documents, length, x.device))
        rows = torch.cat((torch.arange(past, device=x.device), place))
        apart = padded.new_zeros(x.shape[0], past * (len(documents) - 1) + length, x.shape[2])
        padded = apart.index_copy(1, rows, padded)
    image = padded.to(to).transpose(1, 2).unsqueeze(2)  # [b, c, 1, ·]
    y = F.conv2d(image, weight.to(to)[:, None, None], groups=weight.shape[0]).squeeze(2).transpose(1, 2)
    return y if documents is None else y.index_select(1, place - past)
