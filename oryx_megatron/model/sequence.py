"""What travels with a microbatch to every layer: mode plan, documents, positions, and the states of decoding.

And the layer, which moves rows where its plan sorts them otherwise than the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from oryx_megatron.hf.states_oryx import LayerState
from oryx_megatron.modes import LayerPlans, Mode, ModePlan, Plan
from oryx_megatron.ops import TokenLayout


@dataclass(frozen=True)
class Future:
    """What head k of multi-token prediction reads at each token, and what it is held against."""

    tokens: Tensor
    """int64 [b, s/c]: the token k further on."""
    labels: Tensor
    """int64 [b, s/c]: the token after that one."""
    mask: Tensor
    """float32 [b, s/c]: 0 where that label does not count, or lies beyond the end of the document or the sequence."""


@dataclass
class SequenceInfo(PackedSeqParams):
    """Argument `packed_seq_params` of megatron-core's layers, with what an OryxMixer needs besides.

    All ranks of a model-parallel group hold equal values. `plan`, `documents` and `positions` describe the whole
    sequence, also under context parallelism.
    """

    plan: ModePlan | None = None
    """Mode of each of the s tokens; None where layers differ, as `layers` have it."""
    documents: Tensor | None = None
    """int32 cumulative document starts [0, …, s] when documents are isolated, else None."""
    positions: Tensor | None = None
    """Rotary positions, [s]."""
    states: dict[int, LayerState] | None = None
    """By layer number when decoding; None in training. Updated in place."""
    attention_rows: Tensor | None = field(default=None, repr=False)
    """bool [s], True where a token is in attention mode; None when the plan has one mode only."""
    layout: TokenLayout | None = None
    """Order in which the tokens lie, sorted by mode, for fused mixers; None: in the order of the sequence."""
    layers: tuple[SequenceInfo, ...] = field(default=(), repr=False)
    """What each layer of the model reads, where their plans differ; layers of one plan hold the same object."""
    futures: tuple[Future, ...] = ()
    """Of each head of multi-token prediction, in training; arranged as the last layer leaves the tokens."""
    _in_mode: dict[Mode, SequenceInfo] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        plan: Plan,
        *,
        device: torch.device,
        documents: Tensor | None = None,
        offset: int = 0,
        states: dict[int, LayerState] | None = None,
        sort: bool = False,
    ) -> SequenceInfo:
        """For `plan.length` tokens that follow `offset` earlier ones; positions restart at each isolated document.

        With `sort` the tokens are expected sorted by mode: pass whatever is per token through `arrange`, and what is
        compared with the output through `arrange_labels`.
        """
        if isinstance(plan, LayerPlans):
            build = partial(cls.build, device=device, documents=documents, offset=offset, states=states, sort=sort)
            if not sort:
                infos = {own: build(own) for own in dict.fromkeys(plan.of_layers)}
                return cls(documents=documents, layers=tuple(infos[own] for own in plan.of_layers))
            orders = {order: build(order) for order in dict.fromkeys(plan.orders)}
            # Of tokens in one mode all orders serve, so that these layers take that of a neighbour.
            layers = (
                orders[order] if own == order else orders[order].in_mode(own.runs[0].mode)
                for own, order in zip(plan.of_layers, plan.orders)
            )
            return cls(documents=documents, layers=tuple(layers))
        if sort:
            return cls(plan=plan, documents=documents, layout=TokenLayout.of(plan, device=device, documents=documents))
        positions = torch.arange(offset, offset + plan.length, device=device)
        if documents is not None:
            starts = documents.to(device=device, dtype=torch.long)
            lengths = starts.diff()
            positions = positions - torch.repeat_interleave(starts[:-1], lengths)
        rows = None
        if 0 < plan.attention_tokens < plan.length:
            rows = torch.from_numpy(plan.is_attention()).to(device)
        return cls(plan=plan, documents=documents, positions=positions, states=states, attention_rows=rows)

    def in_mode(self, mode: Mode) -> SequenceInfo:
        """The same microbatch for a layer that has one mode only, which its tokens are in whatever the plan."""
        assert self.plan is not None
        if mode not in self._in_mode:
            self._in_mode[mode] = SequenceInfo(
                plan=ModePlan.uniform(mode, self.plan.length),
                documents=self.documents,
                positions=self.positions,
                states=self.states,
                layout=None if self.layout is None else self.layout.in_mode(mode),
            )
        return self._in_mode[mode]

    def of_layer(self, layer: int) -> SequenceInfo:
        """What a layer reads, counted from 0; negative numbers count from the last one of the model."""
        return self.layers[layer] if self.layers else self

    @property
    def layouts(self) -> list[TokenLayout]:
        """The orders in which the tokens lie, in the order of the layers; none in the order of the sequence."""
        found = [info.layout for info in self.layers or (self,) if info.layout is not None]
        return [layout for i, layout in enumerate(found) if all(layout.tokens is not x.tokens for x in found[:i])]

    def moves(self, layer: int) -> tuple[TokenLayout, TokenLayout] | None:
        """The orders before a layer, counted from 0, and in it, where they differ."""
        if not self.layers or layer == 0:
            return None
        before, own = self.layers[layer - 1].layout, self.layers[layer].layout
        return None if before is None or own is None or before.tokens is own.tokens else (before, own)

    def arrange(self, x: Tensor) -> Tensor:
        """[b, s] in the order of the sequence → in the order in which the tokens come to the first layer."""
        layout = self.of_layer(0).layout
        return x if layout is None else layout.arrange(x)

    def arrange_labels(self, x: Tensor) -> Tensor:
        """[b, s] in the order of the sequence → in the order in which the last layer leaves the tokens."""
        layout = self.of_layer(-1).layout
        return x if layout is None else layout.arrange(x)

    def restore(self, x: Tensor) -> Tensor:
        """[b, s] in the order in which the last layer leaves the tokens → in the order of the sequence."""
        layout = self.of_layer(-1).layout
        return x if layout is None else layout.restore(x)

    def with_futures(self, tokens: Tensor, labels: Tensor, mask: Tensor, heads: int, rows: slice) -> SequenceInfo:
        """This microbatch with what `heads` heads of multi-token prediction need.

        Args:
            tokens, labels, mask: [b, s] of whole sequences, in their order.
            heads: Number of heads.
            rows: Those of this context-parallel rank, of the rows in which the tokens lie.
        """
        last = self.of_layer(-1)
        positions = last.positions if last.layout is None else last.layout.identity - last.layout.starts
        assert positions is not None
        futures = []
        for k in range(1, heads + 1):
            # What is rolled around the end lies before k, and is never as far on as a token's own future.
            inside = positions.roll(-k) == positions + k
            ahead = (tokens.roll(-k, 1), labels.roll(-k, 1), mask.roll(-k, 1) * inside)
            futures.append(Future(*(self.arrange_labels(x)[:, rows].contiguous() for x in ahead)))
        return replace(self, futures=tuple(futures))


class OryxLayer(TransformerLayer):
    """megatron-core's layer, with rows put in order before it where its mode plan sorts them otherwise.

    Fast mixers read tokens sorted by mode (ops/layout.py). Where the plans of two neighbouring layers differ, so does
    the order; everything else in a layer acts on tokens one by one.
    """

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
