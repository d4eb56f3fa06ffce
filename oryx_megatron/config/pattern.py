"""Which modes each layer has: the grammar of `model.pattern`. Pure text work."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Literal, cast, get_args

from oryx_megatron.errors import ConfigError

Modes = Literal["both", "attention", "recurrent"]

_ENTRY = re.compile(r"\s*(\w+)\s*(?:\*\s*(\d{1,5})\s*)?")


@functools.lru_cache(maxsize=256)
def period(pattern: tuple[str, ...]) -> tuple[Modes, ...]:
    """Modes of the layers of one round: `recurrent*3` is three layers; ConfigError names the entry at fault."""
    modes: list[Modes] = []
    for i, entry in enumerate(pattern):
        match = _ENTRY.fullmatch(entry)
        if match is None or match[1] not in get_args(Modes) or match[2] == "0":
            raise ConfigError(
                f"model.pattern[{i}]: `{entry}` should be both, attention or recurrent, with `*N` for N such layers, "
                "e.g. recurrent*3"
            )
        modes += [cast(Modes, match[1])] * int(match[2] or 1)
    return tuple(modes)


@functools.lru_cache(maxsize=256)
def layer_modes(pattern: tuple[str, ...], num_layers: int) -> tuple[Modes, ...]:
    """Modes of every layer: whole rounds of the pattern; ConfigError when they do not make `num_layers`."""
    modes = period(pattern)
    if num_layers % len(modes):
        below = num_layers // len(modes) * len(modes)
        near = " or ".join(str(layers) for layers in (below, below + len(modes)) if layers)
        raise ConfigError(
            f"model.num_layers {num_layers} is not divisible by the {len(modes)} layers of model.pattern; use {near}"
        )
    return modes * (num_layers // len(modes))


def pattern_of(modes: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern of these layers: `layer_modes` backwards."""
    length = next(n for n in range(1, len(modes) + 1) if len(modes) % n == 0 and modes == modes[:n] * (len(modes) // n))
    runs = ((mode, len(list(run))) for mode, run in itertools.groupby(modes[:length]))
    return tuple(mode if count == 1 else f"{mode}*{count}" for mode, count in runs)
