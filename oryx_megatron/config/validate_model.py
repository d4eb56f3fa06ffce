"""Rules across the fields of `model` alone."""

from __future__ import annotations

import dataclasses
import math

from oryx_megatron.config.bounds import check_ranges
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.config.validate_experts import check_experts
from oryx_megatron.errors import ConfigError


def divisible(name: str, value: int, by: str, divisor: int) -> None:
    """Raise ConfigError unless `value` is a multiple of `divisor`, which is the product `by`, e.g. `tensor 2`."""
    if value % divisor:
        near = " or ".join(str(v) for v in (value // divisor * divisor, -(-value // divisor) * divisor) if v)
        raise ConfigError(f"{name} {value} is not divisible by {by}{f' = {divisor}' if '×' in by else ''}; use {near}")


def check_model(model: ModelConfig) -> None:
    """Checks inside one model config; ConfigError names the field."""
    check_ranges(model, "model")
    if model.num_heads % model.kv_heads:
        raise ConfigError(f"model.num_kv_heads {model.kv_heads} does not divide model.num_heads {model.num_heads}")
    if model.conv_width == 1:
        raise ConfigError(f"model.conv_width: {model.conv_width} should be 0 (no convolution) or at least 2")
    if model.rotary != "none" and model.qk_head_dim % 2:
        raise ConfigError(f"model.qk_head_dim {model.qk_head_dim} should be even for rotary embedding")
    if model.pattern and model.modes != "both":
        raise ConfigError(
            f"model.modes: {model.modes}, but model.pattern ({', '.join(model.pattern)}) has those of each layer; "
            "remove one"
        )
    if model.pattern:
        model.layer_modes  # noqa: B018 - raises
    _check_rope(model)
    if model.shared_query and not model.takes_plans:
        what = "model.pattern" if model.pattern else f"modes={model.modes}"
        raise ConfigError(f"model.shared_query: a model with {what} has one query; leave it false")
    for name, (low, high) in (("decay_init", model.decay_init), ("dt_init", model.dt_init)):
        if not 0 < low <= high or not math.isfinite(high):
            finite = "" if math.isfinite(low + high) else ", and finite"
            raise ConfigError(f"model.{name}: [{low}, {high}] should be 0 < low ≤ high{finite}")
    check_experts(model)


ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "yarn": ("original_max_position_embeddings",),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""What each rope_type needs beside `factor`."""
OF_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
"""What yarn may have."""


def _check_rope(model: ModelConfig) -> None:
    scaling, name = model.rope_scaling, "model.rope_scaling"
    if scaling is None:
        return
    if model.rotary == "none" or not model.has_attention:
        raise ConfigError(f"{name}: this model has no rotary embedding in attention to scale; remove it")
    kind = scaling.rope_type
    allowed = {"rope_type", "factor", "rope_theta", *ROPE_FIELDS[kind], *(OF_YARN if kind == "yarn" else ())}
    for field in (f.name for f in dataclasses.fields(scaling)):
        if field in ROPE_FIELDS[kind] and getattr(scaling, field) is None:
            raise ConfigError(f"{name}.{field}: is missing; rope_type {kind} needs it")
        if field not in allowed and getattr(scaling, field) is not None:
            raise ConfigError(f"{name}.{field}: has no effect with rope_type {kind}; remove it")
    if scaling.rope_theta not in (None, model.rope_theta):
        raise ConfigError(
            f"{name}.rope_theta: {scaling.rope_theta:g} is not model.rope_theta {model.rope_theta:g}; set that one"
        )
    if (scaling.beta_fast or 32.0) <= (scaling.beta_slow or 1.0):
        raise ConfigError(f"{name}.beta_fast: should be above beta_slow; unset they are 32 and 1")
    if (scaling.mscale is None) != (scaling.mscale_all_dim is None):
        raise ConfigError(f"{name}.mscale: has an effect with mscale_all_dim alone; set both or none")
    if scaling.low_freq_factor and scaling.high_freq_factor and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(f"{name}.low_freq_factor: {scaling.low_freq_factor:g} should be below high_freq_factor")
