"""Layer specs: which linear layers, norms and mixers an Oryx layer is built of, by platform and backends."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from oryx_megatron import compat
from oryx_megatron.model.config import OryxTransformerConfig
from oryx_megatron.model.experts import moe_spec
from oryx_megatron.model.mixer import OryxMixer
from oryx_megatron.model.mlp import FusedMLP
from oryx_megatron.model.mtp import mtp_spec
from oryx_megatron.model.parts import LocalLinear, OryxMixerSubmodules, RMSNorm
from oryx_megatron.model.sequence import OryxLayer
from oryx_megatron.ops import fused

NORM_NAMES = {
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Norms inside TransformerEngine's linears, under the names that they have in checkpoints of separate norms."""


def local_layer_spec(config: OryxTransformerConfig, *, experts: bool = False, **mixer: Any) -> ModuleSpec:
    """A layer of megatron-core's own linears and our RMSNorm: needs nothing but torch.

    `mixer`: further arguments of MixerWeights.
    """
    linears: dict[str, Any] = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
    if config.fused_mixer:
        linears["in_proj"] = linears["query_proj"] = LocalLinear
    return _layer_spec(
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        params=mixer,
        mixer=linears,
        mlp=moe_spec(ColumnParallelLinear, RowParallelLinear, _activation(config), grouped=False)
        if experts
        else _mlp_spec(config, ColumnParallelLinear, RowParallelLinear),
    )


def transformer_engine_layer_spec(config: OryxTransformerConfig, *, experts: bool = False, **mixer: Any) -> ModuleSpec:
    """A layer of TransformerEngine's linears, each norm inside the projection that reads it.

    Norms with several readers are modules of their own: before experts, whose router reads it too, and before the mixer
    (but `holds_norm`). `mixer` as in `local_layer_spec`.
    """
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    from oryx_megatron.model.te import TELocalLinear

    inside = holds_norm(config)
    return _layer_spec(
        input_layernorm=IdentityOp if inside else TENorm,
        pre_mlp_layernorm=TENorm if experts else IdentityOp,
        params=mixer,
        mixer={
            "in_proj": TELayerNormColumnParallelLinear if inside else TELocalLinear,
            "out_proj": TERowParallelLinear,
            "query_proj": TELocalLinear,
        },
        mlp=moe_spec(TEColumnParallelLinear, TERowParallelLinear, _activation(config), grouped=config.moe_grouped_gemm)
        if experts
        else _mlp_spec(config, TELayerNormColumnParallelLinear, TERowParallelLinear),
        sharded_state_dict_keys_map=NORM_NAMES,
    )


def holds_norm(config: OryxTransformerConfig) -> bool:
    """Whether TransformerEngine's in_proj holds the norm before it: in FP8 and FP4, without tensor parallelism.

    In bf16 all projections of the normed input are one function (projections.py). Under tensor parallelism the mixer
    gathers that input once for all of them: a column-parallel in_proj would gather it for itself, forward and again in
    its backward pass, and reduce a gradient of its own.
    """
    return config.quantized and config.tensor_model_parallel_size == 1


def _layer_spec(
    *,
    input_layernorm: type,
    pre_mlp_layernorm: type,
    mixer: dict[str, Any],
    mlp: Any,
    params: dict[str, Any],
    **layer: Any,
) -> ModuleSpec:
    decay_proj = LocalLinear if "query_proj" in mixer else ColumnParallelLinear
    return ModuleSpec(
        module=OryxLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_layernorm,
            self_attention=ModuleSpec(
                module=OryxMixer,
                submodules=OryxMixerSubmodules(decay_proj=decay_proj, **mixer),
                params=params,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_mlp_layernorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            **layer,
        ),
    )


def _activation(config: OryxTransformerConfig) -> type | None:
    return fused.SwiGLU if config.use_te_activation_func else None


def _mlp_spec(config: OryxTransformerConfig, fc1: type, fc2: type) -> Any:
    activation = _activation(config)
    return compat.megatron.mlp(
        FusedMLP if activation else MLP,
        MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2, activation_func=activation),
        **({"ffn_hidden_size": config.ffn_hidden_size} if activation else {}),
    )


def block_spec(config: OryxTransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and virtual stage), and the final norm."""
    make = transformer_engine_layer_spec if config.te_linears else local_layer_spec
    first, count = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage)
    moe = config.oryx.moe if config.oryx is not None else None
    layers = [make(config, experts=moe is not None and moe.in_layer(i)) for i in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(config))


def mtp_block_spec(config: OryxTransformerConfig) -> MultiTokenPredictionBlockSubmodules | None:
    """The heads of multi-token prediction; None without any. Their layers have a dense SwiGLU."""
    model = config.oryx
    if model is None or model.mtp is None:
        return None
    make = transformer_engine_layer_spec if config.te_linears else local_layer_spec
    layer = make(config, modes=model.mtp_modes, attn_mask_type=AttnMaskType.causal)
    linear = ColumnParallelLinear
    if config.te_linears:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        linear = TEColumnParallelLinear
    return mtp_spec(model.mtp.layers, layer, norm=_norm(config), linear=linear)


def _norm(config: OryxTransformerConfig) -> type:
    if not config.te_linears:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
