"""The kinds of optimizer, by how data-parallel ranks hold its state, and so how that and an average lie in checkpoints.

`kind_of` finds that of an optimizer; nothing else asks which of the three it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from oryx_megatron import compat
from oryx_megatron.checkpoint import shards, whole

AVERAGE = "ema"
"""Before the names of weights: their average (average.py)."""


@dataclass(frozen=True)
class HeldPart:
    """What a rank holds of one weight's average."""

    weight: Tensor
    """The model's."""
    start: int
    """First element of it, flat, that this rank holds."""
    stop: int
    master: Tensor
    """These elements as the optimizer updates them, fp32: flat, or of the weight's shape where all are held."""
    average: Tensor
    """Of them, fp32, of the same shape."""


class StateKind(ABC):
    """What is asked of every optimizer; what is not abstract here is for those that hold whole weights."""

    in_ranges = False
    """Whether state is described in flat ranges of the weights, by shards.py."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.singles = compat.megatron.singles(optimizer)

    @abstractmethod
    def sharded_state(self, model_state: dict[str, Any], step: int, *, loading: bool) -> dict[Any, Any]:
        """Sharded state after `step` updates (`shards.common_step`).

        `model_state` says where the weights lie in the whole tensors; `loading`: to be read into.
        """

    @abstractmethod
    def load(self, state: dict[Any, Any]) -> None:
        """Take in what was read for `sharded_state`."""

    def held_parts(self) -> list[HeldPart]:
        """One for every master on this rank, with an average that is not filled."""
        pairs = (pair for single in self.singles for pair in whole.masters(single))
        return [
            HeldPart(weight, 0, weight.numel(), master.detach(), torch.empty_like(master.detach()))
            for weight, master in pairs
        ]

    def sharded_average(self, sharded: Any, part: HeldPart, *, trained: bool = True) -> Any:
        """A part's average beside the weight that `sharded` is of; every rank holds all of one that is not trained."""
        return make_sharded_optimizer_tensor(sharded, part.average, AVERAGE)

    @abstractmethod
    def share_weights(self, chunks: list[Any]) -> None:
        """Bring what each rank wrote into its part of the model's weights to all ranks; collective."""


class InRanges(StateKind):
    """Each rank a flat range of every buffer: megatron-core's distributed optimizer."""

    in_ranges = True

    def sharded_state(self, model_state: dict[str, Any], step: int, *, loading: bool) -> dict[Any, Any]:
        """See StateKind."""
        found = [
            shards.sharded_optimizer_state(single, model_state, step=step, loading=loading) for single in self.singles
        ]
        return found[0] if len(found) == 1 else dict(enumerate(found))

    def load(self, state: dict[Any, Any]) -> None:
        """See StateKind."""
        for single, part in zip(self.singles, _by_single(state), strict=True):
            # Without the tensors, which megatron-core would take for whole ones: steps and the groups' settings.
            single.load_state_dict({name: value for name, value in part.items() if name != "param_state"})
            compat.megatron.own_steps(single.optimizer)
            shards.fill(single, part)

    def held_parts(self) -> list[HeldPart]:
        """See StateKind."""
        found = []
        for single in self.singles:
            for weight, start, stop in shards.owned_ranges(single):
                # Not by _get_main_param_and_optimizer_states, which leaves an empty state where there is none yet.
                group, place = single.model_param_group_index_map[weight]
                master = single.optimizer.param_groups[group]["params"][place].detach()
                found.append(HeldPart(weight, start, stop, master, torch.empty_like(master)))
        return found

    def sharded_average(self, sharded: Any, part: HeldPart, *, trained: bool = True) -> Any:
        """See StateKind."""
        instance = self.singles[0].distributed_optimizer_instance_id if trained else None
        average = part.average.flatten()
        return {
            str(j): replace(piece, key=f"{AVERAGE}.{piece.key}", data=average[first:last].view(piece.local_shape))
            for j, (piece, first, last) in enumerate(
                shards.rectangles(sharded, part.weight, part.start, part.stop, instance)
            )
        }

    def share_weights(self, chunks: list[Any]) -> None:
        """See StateKind."""
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


class InWholes(StateKind):
    """Each rank whole parameters: train/layerwise.py."""

    def sharded_state(self, model_state: dict[str, Any], step: int, *, loading: bool) -> dict[Any, Any]:
        """See StateKind."""
        return whole.sharded_optimizer_state(self.optimizer, model_state, step)

    def load(self, state: dict[Any, Any]) -> None:
        """See StateKind."""
        whole.fill(self.optimizer, state)

    def sharded_average(self, sharded: Any, part: HeldPart, *, trained: bool = True) -> Any:
        """See StateKind."""
        entry = super().sharded_average(sharded, part, trained=trained)
        return whole.owned(entry) if trained else entry

    def share_weights(self, chunks: list[Any]) -> None:
        """See StateKind."""
        self.optimizer.allgather_params()


class AsMegatron(StateKind):
    """Every rank all of it, or an optimizer whose ranges megatron-core alone describes."""

    # Flattened ranges in a form that any other layout can read.
    metadata = {"distrib_optim_sharding_type": shards.FORM, "chained_optim_avoid_prefix": True}  # noqa: RUF012

    def sharded_state(self, model_state: dict[str, Any], step: int, *, loading: bool) -> dict[Any, Any]:
        """See StateKind."""
        with compat.megatron.numbering_all_parameters(self.optimizer):
            own = self.optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=dict(self.metadata))
        for part, single in zip(_by_single(own), self.singles, strict=True):
            compat.megatron.keep_groups(part)
            compat.megatron.note_step(part, single, step)
        return compat.megatron.without_classes(own)

    def load(self, state: dict[Any, Any]) -> None:
        """See StateKind."""
        for part in _by_single(state):
            compat.megatron.lists_of_groups(part)
        self.optimizer.load_state_dict(state)

    def share_weights(self, chunks: list[Any]) -> None:
        """See StateKind; nothing to do: every rank wrote all of them."""


def kind_of(optimizer: Any) -> StateKind:
    """The kind of an optimizer."""
    if shards.own_shards(optimizer):
        return InRanges(optimizer)
    return InWholes(optimizer) if whole.owns_whole(optimizer) else AsMegatron(optimizer)


def _by_single(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """Of an optimizer's state: itself, or by number that of the dense part and that of the experts."""
    return [state[i] for i in sorted(state)] if 0 in state else [state]
