"""OryxMixer: one block that processes each token by attention or by a linear recurrence (arXiv 2605.28769).

Shapes: s sequence, b batch, d hidden size, H query heads, G key/value heads, N key width, P value width — H and G
counted on this rank, that is divided by the tensor-parallel and inside the mixer by the context-parallel size too.

    x [s, b, d] ─┬─ in_proj ───► key [G N] │ value [G P] │ query_attention [H N] │ query_recurrent [H N]
                 │               │ output_gate [H P]
                 └─ decay_proj ► mamba2: dt [H]; gdn: a [H] │ b [H]
    key, value ── causal convolution, activation ──► k [s, b, G, N], v [s, b, G, P]        shared by both modes
    attention-mode tokens:  o = softmax(rotary(norm(q_a)) · rotary(norm(k)) / √N) v
    recurrent-mode tokens:  o = Sᵀ q_r with S advanced at every token, whatever its mode
    y = out_proj(RMSNorm_P(o) ⊙ SiLU(output_gate))                                          shared by both modes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import _split_tensor_factory
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from oryx_megatron import ops, platform
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.model.config import OryxTransformerConfig
from oryx_megatron.model.norm import HeadNorm
from oryx_megatron.model.sequence import LayerState, SequenceInfo
from oryx_megatron.parallel import heads_to_sequence, sequence_to_heads

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


@dataclass
class OryxMixerSubmodules:
    """The linear layers of the mixer."""

    in_proj: ModuleSpec | type
    """Column-parallel, megatron-core's or TransformerEngine's."""
    decay_proj: ModuleSpec | type
    """Column-parallel and never in FP8: its width is no multiple of 16 and gates need the precision."""
    out_proj: ModuleSpec | type
    """Row-parallel."""
    query_proj: ModuleSpec | type | None = None
    """For the fused mixer, whose queries are projections of their own: its inputs are on every rank already."""


class ConvWeight(torch.nn.Module):
    """Taps of the depthwise convolution over key and value channels, [channels, width]."""

    def __init__(self, config: OryxTransformerConfig, channels: int, width: int, device: torch.device | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(channels, width, dtype=config.params_dtype, device=device))


class OryxMixer(MegatronModule):
    """Drop-in for megatron-core's SelfAttention inside a TransformerLayer.

    Args:
        config: megatron-core's config with the Oryx architecture in `config.oryx`.
        submodules: The linear layers.
        layer_number: 1-based number over the whole model.
        pg_collection: Tensor- and context-parallel groups.
        cp_comm_type: Ignored; megatron-core passes it under context parallelism.
    """

    config: OryxTransformerConfig

    def __init__(
        self,
        config: OryxTransformerConfig,
        submodules: OryxMixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config)
        if config.oryx is None:
            raise ValueError("OryxMixer needs config.oryx, the architecture")
        self.model = model = config.oryx
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        tp, cp = self.tp_group.size(), self.cp_group.size()
        self.parts = in_proj_parts(model, tp)
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
        device = None if config.use_cpu_initialization else platform.device()
        if model.conv_width:
            self.conv = ConvWeight(config, sum(self.conv_parts.values()), model.conv_width, device)
            _mark_tensor_parallel(self.conv.weight)
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
            # fp32 also in a bf16 model: exp(A_log) and softplus(dt_bias) decide how long the state remembers.
            names = ("a_log", "dt_bias", "d") if model.mixer == "mamba2" else ("a_log", "dt_bias")
            for name in names:
                value = torch.empty(model.num_heads // tp, dtype=torch.float32, device=device)
                setattr(self, name, torch.nn.Parameter(value))
                _mark_tensor_parallel(getattr(self, name))

    def _in_proj_rows(self, shards: int) -> dict[str, int]:
        """Name → rows of each part of `in_proj.weight` on one of `shards` equal shards of the heads."""
        return in_proj_parts(self.model, shards)

    def query_projections(self) -> dict[str, torch.nn.Module]:
        """Queries that are no rows of `in_proj`, by the name of their part."""
        return {}

    # ------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceInfo | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens.

        Args:
            hidden_states: [s, b, d], normed; [s/tp, b, d] under sequence parallelism; s/cp under context parallelism.
            attention_mask: Ignored: causality and documents come with `packed_seq_params`.
            packed_seq_params: Plan, documents, positions and, when decoding, the states, which are updated.

        Returns:
            [s, b, d] (sharded as the input), and no bias.
        """
        info = packed_seq_params
        if not isinstance(info, SequenceInfo) or info.plan is None:
            raise TypeError("OryxMixer needs packed_seq_params=SequenceInfo(plan=…)")
        recurs = info.states is not None or info.plan.attention_tokens < info.plan.length
        projected, decay = self._project(hidden_states, recurs)
        if self.config.recompute_mixer and self.training:
            mixed = checkpoint(
                lambda p, *d: self._mix(p, d[0] if d else None, info),
                False,
                projected,
                *(() if decay is None else (decay,)),
            )
        else:
            mixed = self._mix(projected, decay, info)
        output, _ = self.out_proj(mixed)
        return output, None

    def _project(self, hidden_states: Tensor, recurs: bool) -> tuple[Tensor, Tensor | None]:
        """All parts of in_proj [s/cp, b, parts], and the logits of the gates [s/cp, b, H or 2 H] if the plan recurs."""
        projected, _ = self.in_proj(hidden_states)
        return projected, self.decay_proj(hidden_states)[0] if self.model.has_recurrence and recurs else None

    def _mix(self, projected: Tensor, decay: Tensor | None, info: SequenceInfo) -> Tensor:
        """[s/cp, b, parts] of in_proj and [s/cp, b, H or 2H] of decay_proj → [s/cp, b, H P], ready for out_proj."""
        parts = dict(zip(self.parts, projected.split(list(self.parts.values()), dim=-1)))
        gate = parts.pop("output_gate", None)
        if decay is not None:
            parts |= zip(self.decay_parts, decay.split(list(self.decay_parts.values()), dim=-1))
        if self.cp_group.size() > 1:
            parts, projected = self._exchange(parts, info)
        state = None if info.states is None else info.states.setdefault(self.layer_number, LayerState())
        k, v = self._keys_values(projected, state, info)
        o = self._outputs(parts, k, v, state, info)
        # [b, s, H, P] → [s/cp, b, all H of this tensor-parallel rank, P]; the gate never left its tokens.
        o = heads_to_sequence(o.transpose(0, 1), self.cp_group)
        if gate is not None:
            gate = gate.unflatten(-1, (-1, self.model.v_head_dim))
        y = ops.gated_rms_norm(o, gate, self.out_norm.summed_weight(), self.out_norm.eps)
        return y.flatten(2)

    def _exchange(self, parts: dict[str, Tensor], info: SequenceInfo) -> tuple[dict[str, Tensor], Tensor]:
        """Sequence shards of all heads → whole sequences of this context-parallel rank's heads, by one all-to-all.

        Parts that no token of the plan reads stay out of it. Returns queries and gates [s, b, width/cp], and keys and
        values side by side.
        """
        assert info.plan is not None
        idle = "query_attention" if info.plan.attention_tokens == 0 else ""
        if info.plan.attention_tokens == info.plan.length and info.states is None:
            idle = "query_recurrent"
        used = {name: part for name, part in parts.items() if name not in ("key", "value", idle)}
        widths = [parts["key"].shape[-1], parts["value"].shape[-1]]
        (projected, *others), _ = sequence_to_heads(
            [torch.cat([parts["key"], parts["value"]], dim=-1), *used.values()],
            [widths, *([part.shape[-1]] for part in used.values())],
            self.cp_group,
        )
        return dict(zip(used, others)), projected

    def _keys_values(self, projected: Tensor, state: LayerState | None, info: SequenceInfo) -> tuple[Tensor, Tensor]:
        """k [b, s, G, N] and v [b, s, G, P], shared by both modes; advances the convolution window."""
        key_rows, value_rows = self.groups * self.model.qk_head_dim, self.groups * self.model.v_head_dim
        kv = projected[..., : key_rows + value_rows].transpose(0, 1)  # [b, s, channels]
        if self.model.conv_width:
            kv, window = ops.causal_conv(
                kv,
                self._conv_weight(),
                activation=self.activation,
                initial=None if state is None else state.window,
                documents=info.documents,
                final=state is not None,
            )
            if state is not None:
                state.window = window
        k, v = kv.split((key_rows, value_rows), dim=-1)
        return k.unflatten(-1, (self.groups, -1)), v.unflatten(-1, (self.groups, -1))

    def _outputs(
        self,
        parts: dict[str, Tensor],
        k: Tensor,
        v: Tensor,
        state: LayerState | None,
        info: SequenceInfo,
    ) -> Tensor:
        """o [b, s, H, P] of every token in its own mode; advances KV cache and recurrent state at every token.

        Without states to keep (training), a mode that no token uses is not computed; its parameters then get zero
        gradients, because overlapped gradient reduction waits for every parameter in every step.
        """
        plan = info.plan
        assert plan is not None
        attends, recurs = plan.attention_tokens > 0, plan.attention_tokens < plan.length
        o_attention = o_recurrent = None
        unused: list[Tensor] = []
        if self.model.has_attention:
            if attends or state is not None:
                o_attention = self._attend(parts, k, v, state, info)
            else:
                unused += [norm.weight for norm in self._query_key_norms()]
        if self.model.has_recurrence:
            if recurs or state is not None:
                o_recurrent = self._recur(parts, k, v, state, info)
            else:
                unused += [self.decay_proj.weight, *self._decay_parameters()]
        if attends and recurs:
            if o_attention is None or o_recurrent is None or info.attention_rows is None:
                raise ValueError(f"a model with modes={self.model.modes} cannot run the plan {plan}")
            o = torch.where(info.attention_rows[None, :, None, None], o_attention, o_recurrent)
        else:
            chosen = o_attention if attends else o_recurrent
            if chosen is None:
                raise ValueError(f"a model with modes={self.model.modes} cannot run the plan {plan}")
            o = chosen
        return WithZeroGradients.apply(o, *unused) if unused and torch.is_grad_enabled() else o

    def _attend(
        self, parts: dict[str, Tensor], k: Tensor, v: Tensor, state: LayerState | None, info: SequenceInfo
    ) -> Tensor | None:
        plan = info.plan
        assert plan is not None
        assert info.positions is not None
        if self.model.qk_norm:
            k = self.key_norm(k)
        if self.model.rotary != "none":
            k = ops.rotary(k, info.positions, self.model.rope_theta)
        if state is not None:
            k, v = state.append(k, v)
        if plan.attention_tokens == 0:
            return None
        q = self._query(parts, "query_attention")
        if self.model.qk_norm:
            q = self.query_norm(q)
        if self.model.rotary != "none":
            q = ops.rotary(q, info.positions, self.model.rope_theta)
        return ops.mode_attention(q, k, v, plan, documents=info.documents)

    def _recur(
        self,
        parts: dict[str, Tensor],
        k: Tensor,
        v: Tensor,
        state: LayerState | None,
        info: SequenceInfo,
    ) -> Tensor:
        assert info.positions is not None
        model = self.model
        q = self._query(parts, "query_recurrent")
        if model.rotary == "both":
            q = ops.rotary(q, info.positions, model.rope_theta)
            k = ops.rotary(k, info.positions, model.rope_theta)
        logits = [parts[name].transpose(0, 1) for name in self.decay_parts]
        common: dict[str, Any] = {
            "dt_bias": self._own(self.dt_bias),
            "a_log": self._own(self.a_log),
            "initial": None if state is None else state.recurrent,
            "documents": info.documents,
            "final": state is not None,
            "chunk": model.recurrence_chunk,
        }
        if model.mixer == "mamba2":
            o, final = ops.ssd(q, k, v, logits[0], d=self._own(self.d), **common)
        else:
            o, final = ops.gated_delta_rule(q, k, v, logits[0], logits[1], **common)
        if state is not None:
            state.recurrent = final
        return o

    def _query(self, parts: dict[str, Tensor], name: str) -> Tensor:
        """[b, s, H, N] of a mode's own query, or of the one that both share."""
        return parts["query" if "query" in parts else name].transpose(0, 1).unflatten(-1, (self.heads, -1))

    def _own(self, per_head: Tensor) -> Tensor:
        """What belongs to the heads that this context-parallel rank holds inside the mixer."""
        size = self.cp_group.size()
        return per_head if size == 1 else per_head.chunk(size)[self.cp_group.rank()]

    def _conv_weight(self) -> Tensor:
        """Taps of the channels that this context-parallel rank holds inside the mixer."""
        if self.cp_group.size() == 1:
            return self.conv.weight
        parts = self.conv.weight.split(list(self.conv_parts.values()))
        return torch.cat([part.chunk(self.cp_group.size())[self.cp_group.rank()] for part in parts])

    def _query_key_norms(self) -> list[HeadNorm]:
        return [self.query_norm, self.key_norm] if self.model.qk_norm else []

    def _decay_parameters(self) -> list[Tensor]:
        return [self.a_log, self.dt_bias, *([self.d] if self.model.mixer == "mamba2" else [])]

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
                result[key] = _split_tensor_factory(result[key], list(parts.values()), list(parts), 0)
        return result

    # --------------------------------------------------------------------------------------- megatron-core's hooks

    def backward_dw(self) -> None:
        """Delayed weight gradients, when megatron-core asks for them."""
        for linear in (self.in_proj, self.out_proj):
            linear.backward_dw()


class WithZeroGradients(torch.autograd.Function):
    """Identity on the first tensor that gives the others zero gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others))


def _mark_tensor_parallel(parameter: torch.nn.Parameter) -> None:
    for name, value in (("tensor_model_parallel", True), ("partition_dim", 0), ("partition_stride", 1)):
        setattr(parameter, name, value)
