"""Rotary position embedding (arXiv 2104.09864), rotate-half convention: dimension i pairs with i + N/2."""

from __future__ import annotations

import torch
from torch import Tensor

from oryx_megatron.hf.recurrences_oryx import wide


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate x [b, s, heads, N] (N even, all of it) by the angles of integer positions [s] or [b, s]."""
    half, to = x.shape[-1] // 2, wide(x.dtype)
    inverse = base ** (torch.arange(half, device=x.device, dtype=to) / -half)
    angle = (positions.to(to).unsqueeze(-1) * inverse).unsqueeze(-2)  # [(b,) s, 1, N/2]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(to).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
