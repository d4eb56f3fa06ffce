"""Causal depthwise convolution over the sequence, with a window that is handed on.

Shapes: b batch, s sequence, c channels, w taps.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.hf.recurrences_oryx import segments, wide
from oryx_megatron.ops import backends


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
    past, length = weight.shape[1] - 1, x.shape[1]
    before = x.new_zeros(x.shape[0], past, x.shape[2]) if initial is None else initial.transpose(1, 2).to(x.dtype)
    padded = torch.cat((before, x), 1)  # [b, w − 1 + s, c]
    last = 0  # start of the last document
    if documents is None:
        y = _depthwise(padded, weight)
    else:  # with w − 1 zeros before every further document, where token t comes to row place[t]
        last = int(documents[-2])
        place = torch.arange(length, device=x.device) + past * (1 + segments(documents, length, x.device))
        rows = torch.cat((torch.arange(past, device=x.device), place))
        apart = padded.new_zeros(x.shape[0], past * (len(documents) - 1) + length, x.shape[2])
        y = _depthwise(apart.index_copy(1, rows, padded), weight).index_select(1, place - past)
    if activation == "silu":
        y = F.silu(y)
    window = None
    if final:
        window = padded[:, length:]
        if last and (short := past - (length - last)) > 0:
            window = F.pad(window[:, short:], (0, 0, short, 0))
        window = window.transpose(1, 2).contiguous()
    return y.to(x.dtype), window


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """[b, s, c] and [c, w] -> [b, s − w + 1, c] in fp32 (fp64 for fp64).

    As a convolution over images of one row in channels-last layout, which is [b, s, c] as it stands: on a CPU twice
    as fast as conv1d with its transposes.
    """
    to = wide(x.dtype)
    image = x.to(to).transpose(1, 2).unsqueeze(2)  # [b, c, 1, s]
    y = F.conv2d(image, weight.to(to)[:, None, None], groups=weight.shape[0])
    return y.squeeze(2).transpose(1, 2)
