"""How the two sides name config fields, as one table that is read in both directions."""

from __future__ import annotations

from typing import Any

from oryx_megatron.config import from_dict
from oryx_megatron.config.pattern import pattern_of
from oryx_megatron.config.schema import ModelConfig, MoEConfig
from oryx_megatron.hf.configuration_oryx import OryxConfig

CONFIG = {
    "mixer": "mixer",
    "modes": "modes",
    "pattern": "layer_modes",
    "moe": "moe",
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
    "rope_theta": "rotary_base",
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


EXPERTS = ("experts", "top_k", "ffn_hidden_size", "shared_ffn_hidden_size", "first_dense", "frequency", "score")
"""Fields of MoEConfig that decide what a model computes; the others are of training, and travel in the manifest."""
BIAS_UPDATE_RATE = 1e-3
"""Of an imported router with a bias, where no manifest says how fast it moved."""


def _experts(moe: MoEConfig) -> dict[str, Any]:
    return {name: getattr(moe, name) for name in EXPERTS} | {"bias": moe.bias_update_rate > 0}


def to_hf_config(model: ModelConfig, **more: Any) -> OryxConfig:
    """The Hugging Face config of a model; `more` sets fields that the model config does not have."""
    fields = {theirs: getattr(model, ours) for ours, theirs in CONFIG.items()}
    fields["moe"] = None if model.moe is None else _experts(model.moe)
    fields["layer_modes"] = list(model.layer_modes) if model.pattern else None
    return OryxConfig(**fields, **more)


def from_hf_config(config: OryxConfig, name: str) -> ModelConfig:
    """The model config of a Hugging Face config; G = H becomes null, and layers a pattern, as the presets write it.

    Raises:
        ConfigError: a field is of the wrong type.
    """
    fields = {ours: getattr(config, theirs) for ours, theirs in CONFIG.items()}
    if fields["num_kv_heads"] == fields["num_heads"]:
        fields["num_kv_heads"] = None
    if config.moe is not None:
        fields["moe"] = {name: config.moe[name] for name in EXPERTS}
        fields["moe"]["bias_update_rate"] = BIAS_UPDATE_RATE if config.moe["bias"] else 0.0
    fields["pattern"] = () if config.layer_modes is None else pattern_of(tuple(config.layer_modes))
    return from_dict(ModelConfig, {"name": name, **fields}, source="config.json")
