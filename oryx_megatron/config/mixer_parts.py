"""Parts of the mixer's weights: their names, order and rows, which checkpoints, conversion and arithmetic share."""

from __future__ import annotations

from oryx_megatron.config.model_fields import ModelConfig

# order: rows of in_proj.weight on every tensor-parallel rank, each part with its own share of the heads.
# key and value come first, so that the convolution reads one contiguous run of channels.


def in_proj_parts(model: ModelConfig, shards: int = 1) -> dict[str, int]:
    """Name → rows of each part of `in_proj.weight`, in order, on one of `shards` equal shards of the heads."""
    heads, groups = model.num_heads // shards, model.kv_heads // shards
    parts = {"key": groups * model.qk_head_dim, "value": groups * model.v_head_dim}
    if model.shared_query and model.modes == "both":
        parts["query"] = heads * model.qk_head_dim
    else:
        if model.has_attention:
            parts["query_attention"] = heads * model.qk_head_dim
        if model.has_recurrence:
            parts["query_recurrent"] = heads * model.qk_head_dim
    if model.output_gate:
        parts["output_gate"] = heads * model.v_head_dim
    return parts


def decay_proj_parts(model: ModelConfig, shards: int = 1) -> dict[str, int]:
    """Name → rows of each part of `decay_proj.weight`; empty for a model without recurrence."""
    if not model.has_recurrence:
        return {}
    heads = model.num_heads // shards
    return {"dt": heads} if model.mixer == "mamba2" else {"a": heads, "b": heads}


def conv_parts(model: ModelConfig, shards: int = 1) -> dict[str, int]:
    """Name → channels of each part of `conv.weight`; empty for a model without convolution."""
    if not model.conv_width:
        return {}
    groups = model.kv_heads // shards
    return {"key": groups * model.qk_head_dim, "value": groups * model.v_head_dim}
