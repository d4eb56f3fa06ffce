"""Several linear maps of one input as one autograd function, whose backward pass makes the input's gradient once.

Each map by itself would make a gradient of the whole input, and autograd would add them up: two reads and a write of
[s, b, d] for every map but one. Here the first product writes the gradient and the others add to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from oryx_megatron import compat


class Read(NamedTuple):
    """y = x[start:stop] Wᵀ"""

    weight: Tensor
    """[width, d]"""
    start: int
    stop: int


def project(x: Tensor, reads: list[Read], *, into_main_grad: bool = False) -> tuple[Tensor, ...]:
    """Linear maps of rows of x [s, b, d]: one [stop − start, b, width] for each of `reads`.

    Args:
        x: The input; saved for the backward pass once, and only if some weight trains.
        reads: The first one reads all rows: its product writes the gradient of x, those of the others add to it.
        into_main_grad: Add the weights' gradients to their fp32 buffers `main_grad` inside the products, as
            TransformerEngine's linears do with `fuse_wgrad_accumulation`; else they are returned to autograd.

    Raises:
        ValueError: the first read leaves out rows.
    """
    if (reads[0].start, reads[0].stop) != (0, x.shape[0]):
        raise ValueError(f"the first of several projections reads all {x.shape[0]} rows, not {reads[0][1:]}")
    return _Project.apply(x, [read[1:] for read in reads], into_main_grad, *(read.weight for read in reads))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[tuple[int, int]], into: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        # The weights themselves, not what autograd would save of them: main_grad is an attribute.
        ctx.rows, ctx.into, ctx.weights, ctx.shape = rows, into, weights, x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        return tuple(F.linear(x[start:stop], weight) for (start, stop), weight in zip(rows, weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]).contiguous() for grad in grads]
        total = None
        if ctx.needs_input_grad[0]:
            total = (flat[0] @ ctx.weights[0]).view(ctx.shape)
            for (start, stop), grad, weight in list(zip(ctx.rows, flat, ctx.weights))[1:]:
                total[start:stop].view(-1, ctx.shape[-1]).addmm_(grad, weight)
        of_weights = [
            _weight_gradient(weight, x[start:stop].reshape(-1, ctx.shape[-1]), grad, ctx.into) if trains else None
            for (start, stop), grad, weight, trains in zip(ctx.rows, flat, ctx.weights, ctx.needs_input_grad[3:])
        ]
        return total, None, None, *of_weights


def _weight_gradient(weight: Any, x: Tensor, grad: Tensor, into_main_grad: bool) -> Tensor:
    """gradᵀ x of rows x [n, d] and grad [n, width]; after it was added to `main_grad`, what autograd is to be given."""
    if not into_main_grad:
        return grad.t() @ x
    compat.transformer_engine.add_weight_gradient(weight.main_grad, grad, x)
    return compat.megatron.added_to_main_grad(weight)
