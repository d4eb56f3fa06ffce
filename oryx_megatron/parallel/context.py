"""Context parallelism: one exchange turns sequence shards of all heads into whole sequences of some heads, and back.

With c context-parallel ranks, rank r holds tokens [r s/c, (r + 1) s/c) of the sequence outside the mixer, and inside it
all s tokens of 1/c of this tensor-parallel rank's heads. Attention, recurrence and convolution then see a whole
sequence, so their kernels need no knowledge of the split, and any mode plan costs every rank the same
(DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """All-to-all over equal parts of dimension 0; its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        torch.distributed.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grads[0])
        torch.distributed.all_to_all_single(out, grads[0].contiguous(), group=ctx.group)
        return out, None


def sequence_to_heads(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[s/c, b, h, w] of all h heads → [s, b, h/c, w] of this rank's heads (heads r h/c to (r + 1) h/c)."""
    size = group.size()
    if size == 1:
        return x
    tokens, batch, heads, width = x.shape
    parts = x.view(tokens, batch, size, heads // size, width).permute(2, 0, 1, 3, 4).contiguous()
    return _AllToAll.apply(parts, group).view(size * tokens, batch, heads // size, width)


def heads_to_sequence(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[s, b, h/c, w] of this rank's heads → [s/c, b, h, w] of all h heads: the inverse of `sequence_to_heads`."""
    size = group.size()
    if size == 1:
        return x
    tokens, batch, heads, width = x.shape
    parts = _AllToAll.apply(x.contiguous().view(size, tokens // size, batch, heads, width), group)
    return parts.permute(1, 2, 0, 3, 4).reshape(tokens // size, batch, size * heads, width)
