"""Layer specs: which linear layers, norms and mixers an Oryx layer is built of, by platform and backends."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from oryx_megatron import compat
from oryx_megatron.model.config import OryxTransformerConfig
from oryx_megatron.model.mixer import OryxMixer
from oryx_megatron.model.mlp import FusedMLP
from oryx_megatron.model.norm import RMSNorm
from oryx_megatron.model.parts import LocalLinear, OryxMixerSubmodules
from oryx_megatron.ops import fused

compat.megatron.quiet_layers()

NORM_NAMES = {
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Norms inside TransformerEngine's linears, under the names that they have in checkpoints of separate norms."""


def local_layer_spec(config: OryxTransformerConfig) -> ModuleSpec:
    """A layer of megatron-core's own linears and our RMSNorm: needs nothing but torch."""
    linears: dict[str, Any] = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
    return _layer_spec(
        config,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        mixer=linears | ({"query_proj": LocalLinear} if config.fused_mixer else {}),
        fc1=ColumnParallelLinear,
        fc2=RowParallelLinear,
    )


def transformer_engine_layer_spec(config: OryxTransformerConfig) -> ModuleSpec:
    """A layer of TransformerEngine's linears, each norm inside the projection that reads it."""
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    from oryx_megatron.model.te import TELocalLinear

    return _layer_spec(
        config,
        input_layernorm=IdentityOp,
        pre_mlp_layernorm=IdentityOp,
        mixer={
            "in_proj": TELayerNormColumnParallelLinear,
            "out_proj": TERowParallelLinear,
            "query_proj": TELocalLinear,
        },
        fc1=TELayerNormColumnParallelLinear,
        fc2=TERowParallelLinear,
        sharded_state_dict_keys_map=NORM_NAMES,
    )


def _layer_spec(
    config: OryxTransformerConfig,
    *,
    input_layernorm: type,
    pre_mlp_layernorm: type,
    mixer: dict[str, Any],
    fc1: type,
    fc2: type,
    **layer: Any,
) -> ModuleSpec:
    decay_proj = LocalLinear if "query_proj" in mixer else ColumnParallelLinear
    activation = fused.SwiGLU if config.use_te_activation_func else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_layernorm,
            self_attention=ModuleSpec(
                module=OryxMixer,
                submodules=OryxMixerSubmodules(decay_proj=decay_proj, **mixer),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_mlp_layernorm,
            mlp=ModuleSpec(
                module=FusedMLP if activation else MLP,
                submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2, activation_func=activation),
                params={"ffn_hidden_size": config.ffn_hidden_size} if activation else {},
            ),
            mlp_bda=get_bias_dropout_add,
            **layer,
        ),
    )


def block_spec(config: OryxTransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and virtual stage), and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage)
    if not config.te_linears:
        return TransformerBlockSubmodules(layer_specs=[local_layer_spec(config)] * layers, layer_norm=RMSNorm)
    from megatron.core.extensions.transformer_engine import TENorm

    return TransformerBlockSubmodules(layer_specs=[transformer_engine_layer_spec(config)] * layers, layer_norm=TENorm)
