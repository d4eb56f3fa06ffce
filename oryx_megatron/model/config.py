"""megatron-core's TransformerConfig for an Oryx model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from oryx_megatron import platform
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig


@dataclass
class OryxTransformerConfig(TransformerConfig):
    """TransformerConfig that also carries the architecture of the mixer."""

    oryx: ModelConfig | None = None
    recompute_mixer: bool = False
    """Recompute what happens between the mixer's projections in the backward pass."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    **overrides: Any,
) -> OryxTransformerConfig:
    """The megatron-core config of this model under this layout and precision; `overrides` win."""
    dtype = torch.bfloat16 if precision.dtype == "bf16" else torch.float32
    gpu = platform.has_gpu()
    fields: dict[str, Any] = {
        "oryx": model,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.key_width,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_std,
        # Weights are drawn by model.initialize, equal under every layout.
        "perform_initialization": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "batch_p2p_comm": gpu,
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": gpu,
        "bias_dropout_fusion": gpu,
        "masked_softmax_fusion": False,
        "persist_layer_norm": gpu,
        "recompute_mixer": parallel.recompute == "mixer",
    }
    if parallel.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return OryxTransformerConfig(**(fields | overrides))
