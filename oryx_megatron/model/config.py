"""megatron-core's TransformerConfig for an Oryx model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from oryx_megatron import platform
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from oryx_megatron.config.validate import multiple_of
from oryx_megatron.errors import ConfigError
from oryx_megatron.model.experts import moe_fields
from oryx_megatron.ops import fused


@dataclass
class OryxTransformerConfig(TransformerConfig):
    """TransformerConfig that also carries the architecture of the mixer."""

    oryx: ModelConfig | None = None
    recompute_mixer: bool = False
    """Recompute what happens between the mixer's projections in the backward pass."""
    recompute_swiglu: bool = False
    """Recompute what a fused SwiGLU put out in the backward pass."""
    fused_mixer: bool = False
    """Mixers are fused: tokens lie sorted by mode through the whole model (ops/layout.py)."""
    freezes: bool = False
    """Some parameters do not train (train/freeze.py)."""
    z_loss: float = 0.0
    """Weight of log² Z beside the loss in training (model/logits.py)."""
    te_linears: bool = False
    """Linears and norms are TransformerEngine's."""
    row_multiple: int = 1
    """Of the rows of a product: 16 in FP8, 32 in mxfp8 and nvfp4."""

    @property
    def quantized(self) -> bool:
        """Products are in FP8 or FP4, at least in some layers."""
        return bool(self.fp8 or self.fp4)


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    **overrides: Any,
) -> OryxTransformerConfig:
    """The megatron-core config of this model under this layout and precision; `overrides` win."""
    dtype = torch.bfloat16 if precision.dtype == "bf16" else torch.float32
    gpu = platform.has_gpu() and not overrides.get("use_cpu_initialization", False)
    te_missing = platform.transformer_engine_missing() if gpu else "there is no GPU"
    sorts = gpu and fused.in_use()
    interleaves = gpu and parallel.virtual_pipeline > 1
    fields: dict[str, Any] = {
        "oryx": model,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.qk_head_dim,
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
        "batch_p2p_comm": gpu and not interleaves,
        "overlap_p2p_comm": interleaves,
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": gpu and not sorts,
        "use_te_activation_func": sorts,  # megatron-core's switch for an activation of one's own
        "bias_dropout_fusion": False,  # without bias and dropout it is one addition
        "masked_softmax_fusion": False,
        "persist_layer_norm": gpu,
        "cross_entropy_loss_fusion": te_missing is None,
        "cross_entropy_fusion_impl": "te",
        # Layers that differ lie apart in checkpoints, not stacked along one axis.
        "hetereogenous_dist_checkpoint": bool(model.pattern),
        "recompute_mixer": parallel.recompute == "mixer",
        # In FP8 the second product of a SwiGLU keeps a narrower copy of its own.
        "recompute_swiglu": parallel.recompute != "none" and precision.fp8 == "none" and precision.fp4 == "none",
        "fused_mixer": sorts,
        "te_linears": te_missing is None and dtype is torch.bfloat16,  # it would multiply fp32 in TF32
    }
    fields |= moe_fields(model, parallel, grouped=fields["te_linears"])
    if model.mtp is not None:
        fields |= {"mtp_num_layers": model.mtp.layers, "mtp_loss_scaling_factor": model.mtp.loss_weight}
    fields["row_multiple"] = multiple_of(precision)
    if precision.fp4 != "none":
        _check_blackwell("fp4", precision.fp4, te_missing)
        fields |= {"fp4": "e2m1", "fp4_recipe": precision.fp4} | _kept_in_bf16(precision)
    if precision.fp8 != "none":
        if te_missing is not None:
            raise ConfigError(f"precision.fp8: {precision.fp8} needs TransformerEngine: {te_missing}")
        if precision.fp8 == "mxfp8":
            _check_blackwell("fp8", precision.fp8, te_missing)
        if precision.fp8_attention and not sorts:
            raise ConfigError("precision.fp8_attention: needs kernels.mixer fused; set it to false")
        current = precision.fp8 == "tensorwise" and platform.capability() >= (10, 0)  # from Blackwell on
        if precision.fp8_attention and precision.fp8 != "delayed" and not current:
            raise ConfigError(
                f"precision.fp8_attention: TransformerEngine has none for precision.fp8 {precision.fp8} on this "
                "GPU; choose delayed or set it to false"
            )
        fields |= _fp8(precision)
    if parallel.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return OryxTransformerConfig(**(fields | overrides))


def _fp8(precision: PrecisionConfig) -> dict[str, Any]:
    """megatron-core's fields of an FP8 recipe: e4m3 forward and e5m2 for gradients, in blocks e4m3 for both."""
    return {
        "fp8": "e4m3" if precision.fp8 in ("blockwise", "mxfp8") else "hybrid",
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.fp8_params,
        "fp8_dot_product_attention": precision.fp8_attention,
        "fp8_amax_history_len": 1024 if precision.fp8 == "delayed" else 1,
        "fp8_amax_compute_algo": "max" if precision.fp8 == "delayed" else "most_recent",
        **_kept_in_bf16(precision),
    }


def _kept_in_bf16(precision: PrecisionConfig) -> dict[str, Any]:
    return {
        "first_last_layers_bf16": bool(precision.bf16_first_layers or precision.bf16_last_layers),
        "num_layers_at_start_in_bf16": precision.bf16_first_layers,
        "num_layers_at_end_in_bf16": precision.bf16_last_layers,
    }


BLACKWELL = (10, 0)
TRANSFORMER_ENGINE = {"mxfp8": (2, 1), "nvfp4": (2, 7)}
"""First version of TransformerEngine with a recipe, as megatron-core asks for it."""


def _check_blackwell(field: str, recipe: str, te_missing: str | None) -> None:
    """Raise ConfigError where the GPU or the packages have no such recipe. Neither was run on a GPU that has it."""
    if te_missing is not None:
        raise ConfigError(f"precision.{field}: {recipe} needs TransformerEngine: {te_missing}")
    found, wanted = platform.version("transformer_engine"), TRANSFORMER_ENGINE[recipe]
    if found < wanted:
        have, need = (".".join(map(str, numbers)) for numbers in (found, wanted))
        raise ConfigError(f"precision.{field}: {recipe} needs TransformerEngine {need}, not {have}; upgrade it")
    if (own := platform.capability()) < BLACKWELL:
        raise ConfigError(
            f"precision.{field}: {recipe} needs a GPU of compute capability 10.0 (Blackwell), this one has "
            f"{own[0]}.{own[1]}; set precision.fp8 to tensorwise, delayed or blockwise"
        )
