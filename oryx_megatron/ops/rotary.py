"""Rotary position embedding of a model's config; the maths is in hf/rotary_oryx.py."""

from __future__ import annotations

import functools

from torch import Tensor

from oryx_megatron.config import to_dict
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.hf.recurrences_oryx import wide
from oryx_megatron.hf.rotary_oryx import Rope, rotate


@functools.lru_cache(maxsize=64)
def rope_of(model: ModelConfig) -> Rope:
    """Base and scaling of a validated model's rotary embedding."""
    scaling = {} if model.rope_scaling is None else to_dict(model.rope_scaling)
    return Rope.of(scaling | {"rope_theta": model.rope_theta})


def rotary(x: Tensor, positions: Tensor, rope: Rope, *, attention: bool = True) -> Tensor:
    """Rotate x [b, s, heads, N] (N even, all of it) by the angles of integer positions [s] or [b, s].

    `attention`: what attention reads, so with the temperature of its softmax, if the scaling has one.
    """
    return rotate(x, rope.tables(positions, x.shape[-1], wide(x.dtype), attention=attention))
