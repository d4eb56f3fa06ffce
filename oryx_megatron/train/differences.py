"""In what two runs, or their models, differ, in values and in words; and whether one can read the other's state."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from oryx_megatron.config import to_dict
from oryx_megatron.config.pattern import layer_modes, pattern_of
from oryx_megatron.config.schema import ModelConfig, MoEConfig, MTPConfig, RunConfig
from oryx_megatron.train import freeze

SHAPES = (
    *("mixer", "modes", "num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "qk_head_dim"),
    *("v_head_dim", "vocab_size", "conv_width", "output_gate", "qk_norm", "shared_query", "tie_embeddings"),
    *("pattern", "moe"),
)
"""Fields of a model that decide which parameters it has, and their shapes."""
NESTED = (MoEConfig, MTPConfig)
"""Parts of a model that are compared field by field."""
LISTED = 60
"""Characters of a value in a list of differences."""


def differences(then: Any, now: Any, hidden: Collection[str]) -> list[tuple[str, Any, Any]]:
    """Fields in which two runs, or two models, differ, with both values; without those, or sections, in `hidden`."""
    before, after = (dict(_leaves(to_dict(_with_kv_heads(config)))) for config in (then, now))
    return [
        (name, before.get(name), after.get(name))
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name) and not {name, name.split(".")[0]} & set(hidden)
    ]


def to_text(value: Any) -> str:
    """A value as a config file has it, in short: long lists are cut, numbers never."""
    text = _whole(value)
    return text if len(text) <= LISTED else text[: LISTED - 1] + "…"


def as_override(name: str, value: Any) -> str:
    """`name=value` as a command line takes it."""
    return f"{name}={shlex.quote(_whole(value))}"


def _whole(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value == float(short := f"{value:g}"):
        return short  # 1e-05 and 0.002, but 0.99999999 is not 1
    return _in_yaml(value)


def _is_nested(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, (dict, list, tuple))


def _in_yaml(value: Any) -> str:
    """On one line; of a config class, what differs from its defaults."""
    if not _is_nested(value):
        return str(value)
    plain = to_dict(value)
    if dataclasses.is_dataclass(value):
        plain = {f.name: plain[f.name] for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}
    return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 20).strip()


def _with_kv_heads(config: Any) -> Any:
    """`num_kv_heads: null` is as many as heads."""
    if isinstance(config, RunConfig):
        return dataclasses.replace(config, model=_with_kv_heads(config.model))
    return dataclasses.replace(config, num_kv_heads=config.kv_heads)


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def told(changed: list[tuple[str, Any, Any]]) -> str:
    """Fields of two models that differ, in words."""
    values = [(name, *(to_text(value) if _is_nested(value) else value for value in both)) for name, *both in changed]
    return ", ".join(f"{name} (there {before}, here {after})" for name, before, after in values)


def unlike(then: ModelConfig, now: ModelConfig, names: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    """Fields of two models that differ, with both values; `num_kv_heads: null` is as many as heads.

    Of experts, those that decide parameters and what they compute: losses, a bias's speed and capacity may change. So
    may the weight of what heads of multi-token prediction lose.
    """
    then, now = (
        dataclasses.replace(model, num_kv_heads=model.kv_heads, pattern=_shortest(model)) for model in (then, now)
    )
    found: list[tuple[str, Any, Any]] = []
    for name in names:
        before, after = getattr(then, name), getattr(now, name)
        if isinstance(before, NESTED) and isinstance(after, NESTED):
            one, two = _architecture(before), _architecture(after)
            changed = [f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(two, f.name)]
            found += [(f"{name}.{field}", getattr(before, field), getattr(after, field)) for field in changed]
        elif before != after:
            found.append((name, before, after))
    return found


def _shortest(model: ModelConfig) -> tuple[str, ...]:
    """A pattern in one of its several spellings."""
    return pattern_of(layer_modes(model.pattern, model.num_layers)) if model.pattern else ()


def _architecture(part: MoEConfig | MTPConfig) -> MoEConfig | MTPConfig:
    if isinstance(part, MTPConfig):
        return dataclasses.replace(part, loss_weight=1.0)
    same = {"aux_loss": 0.0, "aux_loss_over": "microbatch", "z_loss": 0.0, "capacity_factor": None}
    return dataclasses.replace(part, **same, bias_update_rate=float(part.bias_update_rate > 0))  # type: ignore[arg-type]


def foreign_optimizer(then: RunConfig, now: RunConfig) -> str | None:
    """Why the optimizer of one run cannot read the other's state; None when it can."""
    if then.optimizer.name != now.optimizer.name:
        return f"written with optimizer.name {then.optimizer.name}, whose state {now.optimizer.name} cannot read"
    if (sharded := then.parallel.distributed_optimizer) != now.parallel.distributed_optimizer:
        return (
            f"written with parallel.distributed_optimizer {to_text(sharded)}, whose state the other optimizer cannot "
            "read"
        )
    before, after = then.train.freeze, now.train.freeze
    if not freeze.same(now.model, before, after):
        return (
            f"written with train.freeze {list(before)}, which decides what has optimizer state, and now it is "
            f"{list(after)}"
        )
    return None
