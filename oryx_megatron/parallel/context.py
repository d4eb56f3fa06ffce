"""Context parallelism: one exchange turns sequence shards of all heads into whole sequences of some heads, and back.

With c context-parallel ranks, rank r holds tokens [r s/c, (r + 1) s/c) of the sequence outside the mixer, and inside it
all s tokens of 1/c of this tensor-parallel rank's heads. Attention, recurrence and convolution then see a whole
sequence, so their kernels need no knowledge of the split, and any mode plan costs every rank the same
(DeepSpeed-Ulysses, arXiv 2309.14509). What it costs, and when a ring would be cheaper: docs/parallelism.md.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        grad = grads[0].contiguous()
        out = torch.empty_like(grad)
        torch.distributed.all_to_all_single(out, grad, group=ctx.group)
        return out, None


def sequence_to_heads(parts: Sequence[Tensor], group: torch.distributed.ProcessGroup) -> Tensor:
    """Exchange several projections at once: parts [s/c, b, w_i] of all heads → [s, b, Σ w_i/c] of this rank's heads.

    The channels of each part are ordered by head; rank r keeps the r-th of c equal shares of each part, and the shares
    lie side by side in the order of the parts. One collective for all parts, whatever their number: the copy that
    gathers them is the one an all-to-all needs anyway.
    """
    size = group.size()
    shares = [part.unflatten(-1, (size, -1)).permute(2, 0, 1, 3) for part in parts]  # [c, s/c, b, w_i/c]
    return _AllToAll.apply(torch.cat(shares, dim=-1).contiguous(), group).flatten(0, 1)


def heads_to_sequence(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[s, b, h/c, w] of this rank's heads → [s/c, b, h, w] of all h heads: the way back from `sequence_to_heads`."""
    size = group.size()
    if size == 1:
        return x
    tokens, batch, heads, width = x.shape
    parts = _AllToAll.apply(x.contiguous().view(size, tokens // size, batch, heads, width), group)
    return parts.permute(1, 2, 0, 3, 4).reshape(tokens // size, batch, size * heads, width)
