"""Parameters of the mixer: what a rank holds of them, and how they lie in checkpoints. mixer.py computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from oryx_megatron import compat, platform
from oryx_megatron.config.mixer_parts import conv_parts, decay_proj_parts, in_proj_parts
from oryx_megatron.config.pattern import Modes
from oryx_megatron.model.config import OryxTransformerConfig
from oryx_megatron.model.parts import ConvWeight, HeadNorm, OryxMixerSubmodules
from oryx_megatron.modes import Mode
from oryx_megatron.ops import fused, rope_of


class MixerWeights(MegatronModule):
    """Parameters of one mixer and the products that read them.

    Args:
        config: megatron-core's config with the Oryx architecture in `config.oryx`.
        submodules: The linear layers.
        layer_number: 1-based number over the whole model.
        pg_collection: Tensor- and context-parallel groups.
        cp_comm_type, name: Ignored; megatron-core passes the first under context parallelism, the second since 0.19.
        modes: Of this layer; None: those that the architecture gives its number.
        attn_mask_type: Ignored; megatron-core's multi-token prediction wants to know it.
    """

    config: OryxTransformerConfig

    def __init__(
        self,
        config: OryxTransformerConfig,
        submodules: OryxMixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
        name: str | None = None,
        modes: Modes | None = None,
        attn_mask_type: Any = None,
    ) -> None:
        super().__init__(config)
        if config.oryx is None:
            raise ValueError("a mixer needs config.oryx, the architecture")
        if modes is None:
            modes = config.oryx.layer_modes[layer_number - 1] if config.oryx.pattern else config.oryx.modes
        self.model = model = config.oryx.with_modes(modes) if config.oryx.pattern else config.oryx
        self.fixed = None if config.oryx.single_mode or modes == "both" else Mode[modes.upper()]
        """Mode of all tokens in this layer of a hybrid, whatever the plan."""
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        tp, cp = self.tp_group.size(), self.cp_group.size()
        self.separate_queries = submodules.query_proj is not None
        self.in_proj_rows = self._in_proj_rows(tp)
        self.decay_parts = decay_proj_parts(model, tp)
        self.conv_parts = conv_parts(model, tp)
        # Inside the mixer, after the context-parallel exchange:
        self.heads, self.groups = model.num_heads // (tp * cp), model.kv_heads // (tp * cp)
        self.activation: Literal["silu"] | None = "silu" if model.mixer == "gdn" and model.conv_width else None

        linear: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        self.in_proj = build_module(
            submodules.in_proj,
            model.hidden_size,
            sum(self._in_proj_rows(1).values()),
            gather_output=False,
            tp_comm_buffer_name="qkv",
            **linear,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            model.num_heads * model.v_head_dim,
            model.hidden_size,
            input_is_parallel=True,
            tp_comm_buffer_name="proj",
            **(linear | {"skip_bias_add": True, "init_method": config.output_layer_init_method}),
        )
        if model.conv_width:
            self.conv = ConvWeight(config, sum(self.conv_parts.values()), model.conv_width)
        self.out_norm = HeadNorm(config, model.v_head_dim)
        if model.has_attention and model.qk_norm:
            self.query_norm = HeadNorm(config, model.qk_head_dim)
            self.key_norm = HeadNorm(config, model.qk_head_dim)
        if model.has_recurrence:
            self.decay_proj = build_module(
                submodules.decay_proj,
                model.hidden_size,
                sum(decay_proj_parts(model).values()),
                gather_output=False,
                **linear,
            )
            device = None if config.use_cpu_initialization else platform.device()
            # fp32 also in a bf16 model: exp(A_log) and softplus(dt_bias) decide how long the state remembers.
            names = ("a_log", "dt_bias", "d") if model.mixer == "mamba2" else ("a_log", "dt_bias")
            for name in names:
                value = torch.empty(model.num_heads // tp, dtype=torch.float32, device=device)
                setattr(self, name, torch.nn.Parameter(value))
        if self.separate_queries:
            self._add_query_projections(submodules)
        self.head_steps = fused.HeadSteps(
            silu=self.activation == "silu",
            norm=model.qk_norm,
            rope=None if model.rotary == "none" else rope_of(model),
            l2=model.mixer == "gdn",
            epsilon=config.layernorm_epsilon,
        )
        self.fp8_attention: list[Any] = []  # a list: its FP8 statistics are no part of the model's state
        if self.separate_queries and config.fp8_dot_product_attention:
            from oryx_megatron.model.te import fp8_attention

            widths = (model.qk_head_dim, model.v_head_dim)
            self.fp8_attention.append(fp8_attention(self.heads, self.groups, widths, self.tp_group))

    def _in_proj_rows(self, shards: int) -> dict[str, int]:
        """Name → rows of each part of `in_proj.weight` on one of `shards` equal shards of the heads."""
        rows = in_proj_parts(self.model, shards)
        separate = ("query_attention", "query_recurrent") if self.separate_queries else ()
        return {name: count for name, count in rows.items() if name not in separate}

    def _add_query_projections(self, submodules: OryxMixerSubmodules) -> None:
        for name, rows in in_proj_parts(self.model).items():
            if name.startswith("query_"):
                linear = build_module(
                    submodules.query_proj,
                    self.model.hidden_size,
                    rows,
                    config=self.config,
                    init_method=self.config.init_method,
                    tp_group=self.tp_group,
                )
                self.add_module(name, linear)
        if hasattr(self.in_proj, "return_layernorm_output"):  # TransformerEngine's, with the norm inside
            self.in_proj.return_layernorm_output = True

    def query_projections(self) -> dict[str, torch.nn.Module]:
        """Queries that are no rows of `in_proj`, by the name of their part."""
        names = ("query_attention", "query_recurrent")
        return {name: module for name, module in self.named_children() if name in names}

    def in_proj_weights(self) -> Iterator[tuple[torch.nn.Parameter, dict[str, int]]]:
        """What checkpoints call in_proj: its weight and those of separate queries, each with the rows of its parts."""
        yield self.in_proj.weight, self.in_proj_rows
        for part, linear in self.query_projections().items():
            weight: Any = linear.weight
            yield weight, {part: weight.shape[0]}

    def gathered(self, hidden_states: Tensor) -> Tensor:
        """What the projections of a mixer with separate queries read: the normed input of all tokens [s, b, d], from
        this tensor-parallel rank's tokens or whole; its gradient is summed over the ranks, which hold some rows of
        each weight."""
        if self.tp_group.size() == 1:
            return hidden_states
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)

    def input(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """in_proj's parts [s, b, rows], and what the other projections read."""
        if not self.separate_queries:
            return self.in_proj(hidden_states)[0], hidden_states
        normed = self.gathered(hidden_states)
        projected, _ = self.in_proj(normed)
        return projected if isinstance(projected, tuple) else (projected, normed)

    def own(self, per_head: Tensor) -> Tensor:
        """What belongs to the heads that this context-parallel rank holds inside the mixer."""
        size = self.cp_group.size()
        return per_head if size == 1 else per_head.chunk(size)[self.cp_group.rank()]

    def own_conv_weight(self) -> Tensor:
        """Taps of the channels that this context-parallel rank holds inside the mixer."""
        if self.cp_group.size() == 1:
            return self.conv.weight
        parts = self.conv.weight.split(list(self.conv_parts.values()))
        return torch.cat([part.chunk(self.cp_group.size())[self.cp_group.rank()] for part in parts])

    def attention_parameters(self) -> list[Tensor]:
        """Those that only attention mode reads, besides the query's."""
        normed = self.model.has_attention and self.model.qk_norm
        return [self.query_norm.weight, self.key_norm.weight] if normed else []

    def recurrent_parameters(self) -> list[Tensor]:
        """Those that only recurrent mode reads, besides the query's."""
        if not self.model.has_recurrence:
            return []
        own = [self.a_log, self.dt_bias, *([self.d] if self.model.mixer == "mamba2" else [])]
        return [self.decay_proj.weight, *own]

    # --------------------------------------------------------------------------------------------- checkpoints

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Tensors by name with their place in the whole model; fused weights as their named parts.

        The parts (`in_proj.weight.key`, …) make a checkpoint independent of the tensor-parallel size.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        result = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups)
        for name, module in self.named_children():
            if isinstance(module, ConvWeight):
                sharded = make_sharded_tensors_for_checkpoint(
                    module.state_dict(keep_vars=True), f"{prefix}{name}.", {"weight": 0}, sharded_offsets, **groups
                )
            else:
                sharded = sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            result.update(sharded)
        fused = (("in_proj", self.in_proj_rows), ("decay_proj", self.decay_parts), ("conv", self.conv_parts))
        for name, parts in fused:
            if parts:
                key = f"{prefix}{name}.weight"
                result[key] = compat.megatron.split_tensor_factory(result[key], list(parts.values()), list(parts), 0)
        for name in self.query_projections():  # the names of rows of in_proj: both kinds load into each other
            result[f"{prefix}{name}.weight"].key = f"{prefix}in_proj.weight.{name}"
        return result

    # --------------------------------------------------------------------------------------- megatron-core's hooks

    def backward_dw(self) -> None:
        """Delayed weight gradients, when megatron-core asks for them."""
        for linear in (self.in_proj, self.out_proj):
            linear.backward_dw()
