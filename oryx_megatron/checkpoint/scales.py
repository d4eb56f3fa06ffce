"""Scales of delayed FP8 scaling as plain tensors in checkpoints.

TransformerEngine gives them as a pickle of its own classes, and since 2.20 refuses to load what is pickled. Here the
entries of its linears (`_extra_state`) hold a dictionary of tensors instead; other recipes have no state.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from oryx_megatron.compat import transformer_engine as te

log = logging.getLogger(__name__)

SUFFIX = "._extra_state"


def unpickle(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Replace the pickles in a model's sharded state by plain tensors on the host."""
    for name, entry in state.items():
        if name.endswith(SUFFIX) and isinstance(entry, ShardedObject):
            tensors = te.scales(model.get_submodule(name.removesuffix(SUFFIX)))
            if tensors:
                entry.data = {part: tensor.detach().cpu() for part, tensor in tensors.items()}


def restore(model: torch.nn.Module, weights: dict[str, Any], folder: Path) -> None:
    """Give the model its scales and leave nothing of them in `weights` for TransformerEngine to refuse.

    A model in another format has no use for them. The pickles of older checkpoints are not read.
    """
    pickled = 0
    for name, value in weights.items():
        if not name.endswith(SUFFIX):
            continue
        if isinstance(value, dict):
            te.fill_scales(model.get_submodule(name.removesuffix(SUFFIX)), value, model.config)
        elif isinstance(value, Tensor) and value.numel():
            pickled += 1
        else:
            continue
        weights[name] = torch.empty(0, dtype=torch.uint8)
    if pickled:
        log.warning("%s: FP8 scales in an older format are not read; they start anew", folder)
