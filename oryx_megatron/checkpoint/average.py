"""The average of the weights (train.ema) in a checkpoint: fp32, each tensor under `ema.` and the name of its weight.

It is held as the optimizer holds its masters, in ranges, in whole parameters or on every data-parallel rank, and
written so that any other layout reads it. Weights that do not train are their own average: the names are those of all
weights of the model, and an export finds each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from oryx_megatron import compat
from oryx_megatron.checkpoint import shards, whole

PREFIX = "ema."
NO_AVERAGE = "holds no average of the weights (train.ema)"


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


class Averages(Protocol):
    """The average of a run, as train/ema.py keeps it."""

    parts: list[HeldPart]
    begun: bool

    def loaded(self, iteration: int, *, found: bool) -> None:
        """Told after a load of step `iteration`: whether the checkpoint had an average, which then is in `parts`."""


def parts(optimizer: Any) -> list[HeldPart]:
    """One for every master on this rank, with an average that is not filled."""
    found = []
    if singles := shards.own_shards(optimizer):
        for single in singles:
            for weight, start, stop in shards.owned_ranges(single):
                # Not by _get_main_param_and_optimizer_states, which leaves an empty state where there is none yet.
                group, place = single.model_param_group_index_map[weight]
                master = single.optimizer.param_groups[group]["params"][place].detach()
                found.append(HeldPart(weight, start, stop, master, torch.empty_like(master)))
        return found
    for single in compat.megatron.singles(optimizer):
        for own, master in whole.masters(single):
            found.append(HeldPart(own, 0, own.numel(), master.detach(), torch.empty_like(master.detach())))
    return found


def has_average(written: Iterable[str]) -> bool:
    """Whether the names in a checkpoint are of one with an average."""
    return any(name.startswith(PREFIX) for name in written)


def sharded_average(
    held: list[HeldPart], optimizer: Any, models: list[Any], model_states: list[dict[str, Any]]
) -> dict[str, Any]:
    """Sharded averages of `parts`, and of the weights that do not train.

    Args:
        held: The parts of this rank.
        optimizer: What they were made of.
        models: The model chunks of this rank.
        model_states: Their sharded state.
    """
    sharded: dict[Tensor, Any] = {}
    for state in model_states:
        sharded |= shards.by_parameter(state)
    singles = shards.own_shards(optimizer)
    instance = singles[0].distributed_optimizer_instance_id if singles else None
    found: dict[str, Any] = {}
    for number, part in enumerate(held):
        found[str(number)] = _entry(sharded[part.weight], part, bool(singles), instance)
        if whole.owns_whole(optimizer):
            found[str(number)] = whole.owned(found[str(number)])
    for model in models:
        for weight in model.parameters():
            if not weight.requires_grad:
                values = weight.detach().float()
                same = HeldPart(weight, 0, weight.numel(), values, values.flatten() if singles else values)
                found[f"frozen {len(found)}"] = _entry(sharded[weight], same, bool(singles), None)
    return found


def _entry(sharded: Any, part: HeldPart, in_ranges: bool, instance: int | None) -> Any:
    if not in_ranges:
        return make_sharded_optimizer_tensor(sharded, part.average, PREFIX[:-1])
    pieces = shards.rectangles(sharded, part.weight, part.start, part.stop, instance)
    return {
        str(j): replace(piece, key=PREFIX + piece.key, data=part.average[first:last].view(piece.local_shape))
        for j, (piece, first, last) in enumerate(pieces)
    }


@torch.no_grad()
def fill(held: list[HeldPart], loaded: dict[str, Any]) -> None:
    """Copy what was read for `sharded_average` into the parts."""
    for number, part in enumerate(held):
        read = loaded[str(number)]
        if isinstance(read, dict):
            read = torch.cat([read[str(j)].flatten() for j in range(len(read))])
        part.average.copy_(read)


def as_average(model_state: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state that reads the averages in the place of its parameters; buffers stay."""
    return {
        name: replace(entry, key=PREFIX + entry.key) if _is_parameter(entry) else entry
        for name, entry in model_state.items()
    }


def _is_parameter(entry: Any) -> bool:
    return any(isinstance(getattr(part, "data", None), torch.nn.Parameter) for part in nested_values({"": entry}))
