"""Layer specs: which linear layers and norms an Oryx layer is built of, by platform."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from oryx_megatron.model.config import OryxTransformerConfig
from oryx_megatron.model.mixer import OryxMixer, OryxMixerSubmodules
from oryx_megatron.model.norm import RMSNorm


def local_layer_spec() -> ModuleSpec:
    """A layer of megatron-core's own linears and our RMSNorm: needs nothing but torch."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=OryxMixer,
                submodules=OryxMixerSubmodules(
                    in_proj=ColumnParallelLinear, decay_proj=ColumnParallelLinear, out_proj=RowParallelLinear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: OryxTransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and virtual stage), and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[local_layer_spec()] * layers, layer_norm=RMSNorm)
