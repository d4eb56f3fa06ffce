"""What travels with a microbatch to every layer: mode plan, documents, positions, and the states of decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from oryx_megatron.hf.states_oryx import LayerState
from oryx_megatron.modes import Mode, ModePlan
from oryx_megatron.ops import TokenLayout


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

    def restore(self, x: Tensor) -> Tensor:
        """[b, s] in the order in which the tokens lie → in the order of the sequence."""
        return x if self.layout is None else self.layout.restore(x)
