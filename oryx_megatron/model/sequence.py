"""What travels with a microbatch to every layer: mode plan, documents, positions, and the states of decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from oryx_megatron.modes import Mode, ModePlan
from oryx_megatron.ops import TokenLayout


@dataclass
class LayerState:
    """Both states of one layer after `length` tokens, kept in step whatever the modes (docs/model.md).

    Shapes: b batch, G key/value heads, H heads, N key width, P value width, c convolution channels, w taps.
    """

    keys: Tensor | None = None
    """[b, capacity, G, N], normalised and rotated as attention reads them."""
    values: Tensor | None = None
    """[b, capacity, G, P]"""
    recurrent: Tensor | None = None
    """S, [b, H, N, P] fp32."""
    window: Tensor | None = None
    """Inputs of the convolution at the last w − 1 tokens, [b, c, w − 1]."""
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [b, s, G, ·] keys and values; return all of them so far, [b, length + s, G, ·]."""
        new = keys.shape[1]
        if self.keys is None or self.values is None or self.length + new > self.keys.shape[1]:
            self.keys = self._grown(self.keys, keys)
            self.values = self._grown(self.values, values)
        self.keys[:, self.length : self.length + new] = keys
        self.values[:, self.length : self.length + new] = values
        self.length += new
        return self.keys[:, : self.length], self.values[:, : self.length]

    def _grown(self, old: Tensor | None, new: Tensor) -> Tensor:
        # Doubling keeps the cost of copying linear in the number of tokens.
        capacity = max(64, 2 * (self.length + new.shape[1]))
        grown = new.new_empty(new.shape[0], capacity, *new.shape[2:])
        if old is not None:
            grown[:, : self.length] = old[:, : self.length]
        return grown


@dataclass
class SequenceInfo(PackedSeqParams):
    """Argument `packed_seq_params` of megatron-core's layers, with what an OryxMixer needs besides.

    All ranks of a model-parallel group hold equal values. `plan`, `documents` and `positions` describe the whole
    sequence, also under context parallelism.
    """

    plan: ModePlan | None = None
    """Mode of each of the s tokens."""
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
    _in_mode: dict[Mode, SequenceInfo] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        plan: ModePlan,
        *,
        device: torch.device,
        documents: Tensor | None = None,
        offset: int = 0,
        states: dict[int, LayerState] | None = None,
        sort: bool = False,
    ) -> SequenceInfo:
        """For `plan.length` tokens that follow `offset` earlier ones; positions restart at each isolated document.

        With `sort` the tokens are expected sorted by mode: pass whatever is per token through `arrange`.
        """
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

    def arrange(self, x: Tensor) -> Tensor:
        """[b, s] in the order of the sequence → in the order in which the tokens lie."""
        return x if self.layout is None else self.layout.arrange(x)
