"""A layer of an Oryx model: megatron-core's, with rows put in order before it where its mode plan sorts them otherwise.

Fast mixers read tokens sorted by mode (ops/layout.py). Where the plans of two neighbouring layers differ, so does the
order; everything else in a layer acts on tokens one by one. Shapes: s sequence, b batch, d hidden size, n ranks that
hold s/n rows each.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from oryx_megatron.model.sequence import SequenceInfo
from oryx_megatron.ops import TokenLayout


class OryxLayer(TransformerLayer):
    """See TransformerLayer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See TransformerLayer; rows come in the order of the layer before and leave in that of this one."""
        info = kwargs.get("packed_seq_params")
        if isinstance(info, SequenceInfo) and (moves := info.moves(self.layer_number - 1)) is not None:
            hidden_states = regroup(hidden_states, *moves, sharded=self.config.sequence_parallel)
        return super().forward(hidden_states, *args, **kwargs)


def regroup(x: Tensor, before: TokenLayout, after: TokenLayout, *, sharded: bool) -> Tensor:
    """Rows [s/n, b, d] in the order of one layout → in that of another.

    n are the context-parallel ranks, and with `sharded` (sequence parallelism) the tensor-parallel ones too. They
    gather all rows, and each keeps its own.
    """
    if sharded:
        group = parallel_state.get_tensor_and_context_parallel_group()
    else:
        group = parallel_state.get_context_parallel_group()
    # Row i of the new order holds token after.tokens[i], which lay in row before.rows[that token].
    there, back = before.rows.index_select(0, after.tokens), after.rows.index_select(0, before.tokens)
    return _Regroup.apply(x, there, back, group)


class _Regroup(torch.autograd.Function):
    """A permutation of the rows of all ranks; its gradient is moved by the inverse one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.save_for_backward(back)
        ctx.group = group
        return _moved(x, there, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return _moved(grads[0], back, ctx.group), None, None, None


def _moved(x: Tensor, source: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Row i of the result is row source[i] of all ranks' rows, for this rank's i."""
    size, rows = group.size(), x.shape[0]
    if size == 1:
        return x.index_select(0, source)
    whole = x.new_empty(size * rows, *x.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole.index_select(0, source[group.rank() * rows : (group.rank() + 1) * rows])
