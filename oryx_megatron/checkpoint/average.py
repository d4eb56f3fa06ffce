"""The average of the weights (train.ema) in a checkpoint: fp32, each tensor under `ema.` and the name of its weight.

It is held as the optimizer holds its masters, in ranges, in whole parameters or on every data-parallel rank, and
written so that any other layout reads it. Weights that do not train are their own average: the names are those of all
weights of the model, and an export finds each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor

from oryx_megatron.checkpoint import shards
from oryx_megatron.checkpoint.optimizers import AVERAGE, HeldPart, StateKind

PREFIX = f"{AVERAGE}."
NO_AVERAGE = "holds no average of the weights (train.ema)"


class Averages(Protocol):
    """The average of a run, as train/ema.py keeps it."""

    parts: list[HeldPart]
    begun: bool

    def loaded(self, iteration: int, *, found: bool) -> None:
        """Told after a load of step `iteration`: whether the checkpoint had an average, which then is in `parts`."""


def has_average(written: Iterable[str]) -> bool:
    """Whether the names in a checkpoint are of one with an average."""
    return any(name.startswith(PREFIX) for name in written)


def sharded_average(
    held: list[HeldPart], kind: StateKind, models: list[Any], model_states: list[dict[str, Any]]
) -> dict[str, Any]:
    """Sharded averages, and those of the weights that do not train.

    Args:
        held: The parts of this rank.
        kind: Of the optimizer that they were made of.
        models: The model chunks of this rank.
        model_states: Their sharded state.
    """
    sharded: dict[Tensor, Any] = {}
    for state in model_states:
        sharded |= shards.by_parameter(state)
    found = {str(number): kind.sharded_average(sharded[part.weight], part) for number, part in enumerate(held)}
    for model in models:
        for weight in model.parameters():
            if not weight.requires_grad:
                values = weight.detach().float()
                same = HeldPart(weight, 0, weight.numel(), values, values)
                found[f"frozen {len(found)}"] = kind.sharded_average(sharded[weight], same, trained=False)
    return found


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
