"""What travels with a microbatch to every layer: mode plan, documents, positions, and the states of decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from oryx_megatron.hf.states_oryx import LayerState
from oryx_megatron.modes import LayerPlans, Mode, ModePlan, Plan
from oryx_megatron.ops import TokenLayout


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
