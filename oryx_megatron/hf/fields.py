"""How the two sides name config fields, as one table that is read in both directions."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from oryx_megatron.config import from_dict, to_dict
from oryx_megatron.config.loading import field_types
from oryx_megatron.config.pattern import pattern_of
from oryx_megatron.config.schema import ModelConfig, MoEConfig, RopeScalingConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.configuration_oryx import OryxConfig

CONFIG = {
    "mixer": "mixer",
    "modes": "modes",
    "pattern": "layer_modes",
    "moe": "moe",
    "mtp": "num_nextn_predict_layers",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "qk_head_dim": "head_dim",
    "v_head_dim": "value_head_dim",
    "vocab_size": "vocab_size",
    "conv_width": "conv_width",
    "output_gate": "output_gate",
    "qk_norm": "qk_norm",
    "rotary": "rotary",
    "shared_query": "shared_query",
    "tie_embeddings": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "logit_softcap": "final_logit_softcapping",
    "init_std": "initializer_range",
    "decay_init": "decay_init",
    "dt_init": "dt_init",
    "recurrence_chunk": "recurrence_chunk",
}
"""Field of ModelConfig → field of OryxConfig. `name` has no counterpart; it travels in the manifest. `layer_modes`
has the pattern written out layer by layer."""
ROPE = ("rope_theta", "rope_scaling")
"""Fields of ModelConfig that are one on the other side, `rope_parameters`. They change no weights."""

EXPERTS = ("experts", "top_k", "ffn_hidden_size", "shared_ffn_hidden_size", "first_dense", "frequency", "score")
"""Fields of MoEConfig that decide what a model computes; the others are of training, and travel in the manifest."""
BIAS_UPDATE_RATE = 1e-3
"""Of an imported router with a bias, where no manifest says how fast it moved."""


def _experts(moe: MoEConfig) -> dict[str, Any]:
    return {name: getattr(moe, name) for name in EXPERTS} | {"bias": moe.bias_update_rate > 0}


def to_hf_config(model: ModelConfig, **more: Any) -> OryxConfig:
    """The Hugging Face config of a model; `more` sets fields that the model config does not have."""
    fields = {theirs: getattr(model, ours) for ours, theirs in CONFIG.items()}
    fields["num_nextn_predict_layers"] = model.mtp_layers
    fields["moe"] = None if model.moe is None else _experts(model.moe)
    fields["layer_modes"] = list(model.layer_modes) if model.pattern else None
    scaling = {} if model.rope_scaling is None else to_dict(model.rope_scaling)
    rope = {"rope_type": "default"} | {key: value for key, value in scaling.items() if value is not None}
    return OryxConfig(**fields, rope_parameters=rope | {"rope_theta": model.rope_theta}, **more)


def from_hf_config(config: OryxConfig, name: str) -> ModelConfig:
    """The model config of a Hugging Face config; G = H becomes null, and layers a pattern, as the presets write it.

    Raises:
        ConfigError: a field is of the wrong type.
    """
    fields = {ours: getattr(config, theirs) for ours, theirs in CONFIG.items()}
    if fields["num_kv_heads"] == fields["num_heads"]:
        fields["num_kv_heads"] = None
    fields["mtp"] = {"layers": config.num_nextn_predict_layers} if config.num_nextn_predict_layers else None
    if config.moe is not None:
        fields["moe"] = {name: config.moe[name] for name in EXPERTS}
        fields["moe"]["bias_update_rate"] = BIAS_UPDATE_RATE if config.moe["bias"] else 0.0
    fields["pattern"] = () if config.layer_modes is None else pattern_of(tuple(config.layer_modes))
    return from_dict(ModelConfig, {"name": name, **fields, **rope_fields(config.rope_parameters)}, source="config.json")


def rope_fields(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a ModelConfig, from `rope_parameters` as transformers writes them.

    Raises:
        ConfigError: a scaling that has no counterpart here, named.
    """
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    kind = given.pop("type", None)
    kind = given.pop("rope_type", kind or "default")
    fields: dict[str, Any] = {"rope_theta": float(given.pop("rope_theta", 10000.0))}
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("rope_parameters.partial_rotary_factor: only the whole head can be rotated")
    kinds = typing.get_args(field_types(RopeScalingConfig)["rope_type"])
    if kind not in ("default", *kinds):
        raise ConfigError(f"rope_parameters.rope_type: {kind!r} has no counterpart; known: default, {', '.join(kinds)}")
    known = {field.name for field in dataclasses.fields(RopeScalingConfig)}
    if kind != "default" and (unknown := sorted(given.keys() - known)):
        raise ConfigError(f"rope_parameters.{unknown[0]}: has no counterpart here")
    return fields | {"rope_scaling": None if kind == "default" else {"rope_type": kind, **given}}
