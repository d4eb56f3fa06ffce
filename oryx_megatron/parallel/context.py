"""Context parallelism: one exchange turns sequence shards of all heads into whole sequences of some heads, and back.

With c context-parallel ranks, rank r holds tokens [r s/c, (r + 1) s/c) of the sequence outside the mixer, and inside it
all s tokens of 1/c of this tensor-parallel rank's heads. Attention, recurrence and convolution then see a whole
sequence, so their kernels need no knowledge of the split, and any mode plan costs every rank the same
(DeepSpeed-Ulysses, arXiv 2309.14509). What it costs, and when a ring would be cheaper: docs/parallelism.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from oryx_megatron.ops.layout import around


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


def sequence_to_heads(
    inputs: Sequence[Tensor], widths: Sequence[Sequence[int]], group: torch.distributed.ProcessGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """Exchange several projections at once: sequence shards of all heads → whole sequences of this rank's heads.

    Args:
        inputs: Each [s/c, b, ≥ Σ widths]: parts side by side, the channels of each ordered by head, and columns that
            stay with their tokens.
        widths: Of the parts of each input, multiples of c. Rank r keeps the r-th of c equal shares of each part.
        group: The context-parallel ranks; rank r holds the r-th s/c of the sequence.

    Returns:
        For each input [s, b, Σ widths/c], the shares side by side; and for each the columns that stay.
    """
    flat = _SequenceToHeads.apply(group, tuple(tuple(parts) for parts in widths), *inputs)
    return list(flat[: len(inputs)]), list(flat[len(inputs) :])


class _SequenceToHeads(torch.autograd.Function):
    """One collective for all parts, whatever their number: the copy that gathers them is the one it needs anyway."""

    @staticmethod
    def forward(
        ctx: Any, group: torch.distributed.ProcessGroup, widths: tuple[tuple[int, ...], ...], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        size, (tokens, batch) = group.size(), inputs[0].shape[:2]
        ctx.group, ctx.widths, ctx.shapes = group, widths, [x.shape for x in inputs]
        ctx.set_materialize_grads(False)
        wide = [sum(parts) // size for parts in widths]
        packed = inputs[0].new_empty(size, tokens, batch, sum(wide))
        for x, start, column, width in _parts(inputs, widths, size):
            _copy(packed[..., column : column + width // size], _by_rank(x[..., start : start + width], size))
        exchanged = torch.empty_like(packed)
        torch.distributed.all_to_all_single(exchanged, packed, group=group)
        whole = exchanged.flatten(0, 1).split(wide, dim=-1)
        return *whole, *(x[..., sum(parts) :] for x, parts in zip(inputs, widths))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        size, count = ctx.group.size(), len(ctx.widths)
        given = next(grad for grad in grads if grad is not None)
        tokens, batch = ctx.shapes[0][:2]
        packed = given.new_empty(size * tokens, batch, sum(sum(parts) // size for parts in ctx.widths))
        column = 0
        for parts, grad in zip(ctx.widths, grads):
            there = packed[..., column : column + sum(parts) // size]
            there.zero_() if grad is None else _copy(there, grad)
            column += sum(parts) // size
        exchanged = torch.empty_like(packed)
        torch.distributed.all_to_all_single(exchanged, packed, group=ctx.group)
        exchanged = exchanged.unflatten(0, (size, tokens))
        results = []
        for shape, parts, stayed in zip(ctx.shapes, ctx.widths, grads[count:]):
            dx = given.new_empty(shape) if stayed is None else around(stayed, shape)
            if stayed is None:
                dx[..., sum(parts) :] = 0
            results.append(dx)
        for dx, start, column, width in _parts(results, ctx.widths, size):
            _copy(_by_rank(dx[..., start : start + width], size), exchanged[..., column : column + width // size])
        return None, None, *results


def _by_rank(part: Tensor, size: int) -> Tensor:
    """[s/c, b, w] → its shares [c, s/c, b, w/c], a view."""
    return part.unflatten(-1, (size, -1)).permute(2, 0, 1, 3)


def _copy(target: Tensor, source: Tensor) -> None:
    """target.copy_(source), where possible 8 bytes at a time: torch moves elements of strided tensors one by one."""
    lanes = 8 // target.element_size()
    if all(x.stride(-1) == 1 and not any(n % lanes for n in _places(x)) for x in (target, source)):
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source)


def _places(x: Tensor) -> tuple[int, ...]:
    return x.shape[-1], int(x.storage_offset()), *x.stride()[:-1]


def _parts(
    inputs: Sequence[Tensor], widths: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[Tensor, int, int, int]]:
    """For each part: its tensor, its first column there and in the exchange, and its width."""
    column = 0
    for x, parts in zip(inputs, widths):
        start = 0
        for width in parts:
            yield x, start, column, width
            start, column = start + width, column + width // size


def heads_to_sequence(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[s, b, h/c, w] of this rank's heads → [s/c, b, h, w] of all h heads: the way back from `sequence_to_heads`."""
    size = group.size()
    if size == 1:
        return x
    tokens, batch, heads, width = x.shape
    parts = _AllToAll.apply(x.contiguous().view(size, tokens // size, batch, heads, width), group)
    return _ByToken.apply(parts).transpose(0, 1)


class _ByToken(torch.autograd.Function):
    """[c, s/c, b, h/c, w] of each rank's heads → [b, s/c, h, w], the order in which the fused output norm reads it."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        size, tokens, batch, heads, width = ctx.shape = parts.shape
        out = parts.new_empty(batch, tokens, size, heads * width)
        _copy(out, parts.flatten(3).permute(2, 1, 0, 3))
        return out.view(batch, tokens, size * heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        size, tokens, batch, heads, width = ctx.shape
        parts = grads[0].new_empty(ctx.shape)
        _copy(parts.flatten(3), grads[0].contiguous().view(batch, tokens, size, heads * width).permute(2, 1, 0, 3))
        return parts
