"""The mixer for GPUs: the same function as OryxMixer, in fewer passes over memory and without what nobody reads.

The tokens of a microbatch lie sorted by mode (ops/layout.py), attention tokens first, through the whole model. So

    x [s, b, d] ── norm, in_proj ──► key │ value │ output_gate        all rows
                ├─ query_attention ──► q_a                            the first n rows alone
                ├─ query_recurrent ──► q_r                            the last s − n rows alone
                └─ decay_proj ──► logits of the gates                 all rows, when some token recurs

and every step in between is a kernel of ops/fused.py. Context parallelism splits the rows: a rank holds s/c consecutive
ones, projects one query for each, and the exchange brings all rows of its heads together in the order of the layout.
Decoding and whatever those kernels do not know take OryxMixer's separate steps, with the same weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from oryx_megatron import ops, platform
from oryx_megatron.model.config import OryxTransformerConfig
from oryx_megatron.model.mixer import OryxMixer, OryxMixerSubmodules, WithZeroGradients, in_proj_parts
from oryx_megatron.model.sequence import SequenceInfo
from oryx_megatron.ops import fused
from oryx_megatron.parallel import heads_to_sequence, sequence_to_heads

FP8_ROWS = 16
"""TransformerEngine's FP8 products take rows in multiples of this."""


class LocalLinear(torch.nn.Module):
    """Column shard of a linear layer whose input is whole on every tensor-parallel rank; never in FP8."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: OryxTransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        device = None if config.use_cpu_initialization else platform.device()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size // tp_group.size(), input_size, dtype=config.params_dtype, device=device)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[…, input_size] → […, output_size / tp], and no bias."""
        return F.linear(x, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight with its place in the whole one."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


class FusedMLP(MLP):
    """megatron-core's MLP with SwiGLU, which keeps the activation's input but not its output.

    The output is 8/3 of the residual stream a layer; to compute it again takes a hundredth of a step. In FP8 the second
    product keeps a narrower copy of its own instead.
    """

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **unused: Any) -> tuple[Tensor, None]:
        """[s, b, d] → [s, b, d] (sharded as the input), and no bias."""
        x, _ = self.linear_fc1(hidden_states)
        y = self.activation_func(x)
        output, bias = self.linear_fc2(y)
        if output.requires_grad and not self.config.fp8:
            fused.discard_swiglu(y, x, output)
        return output, bias


class FusedOryxMixer(OryxMixer):
    """OryxMixer over tokens sorted by mode. Arguments as OryxMixer's; `submodules.query_proj` must be given."""

    def __init__(
        self,
        config: OryxTransformerConfig,
        submodules: OryxMixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, cp_comm_type)
        model = self.model
        for name, rows in in_proj_parts(model).items():
            if name.startswith("query_"):
                linear = build_module(
                    submodules.query_proj,
                    model.hidden_size,
                    rows,
                    config=config,
                    init_method=config.init_method,
                    tp_group=self.tp_group,
                )
                self.add_module(name, linear)
        self.steps = fused.HeadSteps(
            silu=self.activation == "silu",
            norm=model.qk_norm,
            rope_theta=None if model.rotary == "none" else model.rope_theta,
            l2=model.mixer == "gdn",
            epsilon=config.layernorm_epsilon,
        )
        if hasattr(self.in_proj, "return_layernorm_output"):  # TransformerEngine's, with the norm inside
            self.in_proj.return_layernorm_output = True
        self._fp8_attention: list[Any] = []  # a list: its FP8 statistics are no part of the model's state
        if config.fp8_dot_product_attention:
            from oryx_megatron.model.te import fp8_attention

            widths = (model.qk_head_dim, model.v_head_dim)
            self._fp8_attention.append(fp8_attention(self.heads, self.groups, widths, self.tp_group))

    def _in_proj_rows(self, shards: int) -> dict[str, int]:
        rows = super()._in_proj_rows(shards)
        return {name: count for name, count in rows.items() if not name.startswith("query_")}

    def query_projections(self) -> dict[str, torch.nn.Module]:
        names = ("query_attention", "query_recurrent")
        return {name: module for name, module in self.named_children() if name in names}

    # ------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceInfo | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """As OryxMixer.forward; with `packed_seq_params.layout` the tokens are expected in its order."""
        info = packed_seq_params
        if not isinstance(info, SequenceInfo) or info.layout is None:
            return super().forward(hidden_states, attention_mask, packed_seq_params=info)
        layout = info.layout
        attends, recurs = layout.attention > 0, layout.recurrent > 0
        if (attends and not self.model.has_attention) or (recurs and not self.model.has_recurrence):
            raise ValueError(f"a model with modes={self.model.modes} cannot run the plan {layout.plan}")
        projected, normed = self._input(hidden_states)
        own = self._own_attention(layout)
        first, last = self._query_rows(own, *normed.shape[:2])
        whole, head, tail = _Rows.apply(normed, first, last)
        parts: list[Tensor | None] = [projected, None, None, None]
        if own > 0:
            parts[1], _ = self.query_attention(head)
        if own < len(normed):
            parts[2], _ = self.query_recurrent(tail)
        if recurs:
            parts[3], _ = self.decay_proj(whole)
        if self.config.recompute_mixer and self.training:
            present = [i for i, part in enumerate(parts) if part is not None]

            def mix(*some: Tensor) -> Tensor:
                given: list[Tensor | None] = [None] * 4
                for i, part in zip(present, some):
                    given[i] = part
                return self._mix_rows(*given, layout)  # type: ignore[arg-type, call-arg]

            mixed = checkpoint(mix, False, *(parts[i] for i in present))
        else:
            mixed = self._mix_rows(*parts, layout)  # type: ignore[arg-type, call-arg]
        if torch.is_grad_enabled() and (unused_parameters := self._unused(layout, own)):
            mixed = WithZeroGradients.apply(mixed, *unused_parameters)
        return self.out_proj(mixed)[0], None

    def _input(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, values and gate [s, b, parts], and the normed input of all tokens [s, b, d], on this rank."""
        projected, _ = self.in_proj(hidden_states)
        normed = hidden_states
        if isinstance(projected, tuple):
            projected, normed = projected
        if self.tp_group.size() > 1:
            if self.config.sequence_parallel:
                normed = gather_from_sequence_parallel_region(normed, group=self.tp_group)
            else:
                normed = copy_to_tensor_model_parallel_region(normed, group=self.tp_group)
        return projected, normed

    def _own_attention(self, layout: ops.TokenLayout) -> int:
        """How many of this rank's rows, the first ones, are in attention mode."""
        count = layout.length // self.cp_group.size()
        return min(max(layout.attention - self.cp_group.rank() * count, 0), count)

    def _query_rows(self, attention: int, length: int, batch: int) -> tuple[int, int]:
        """How many of the first rows need an attention query, and from which on a recurrent one is needed.

        In FP8 both counts are rounded outwards to what its products take.
        """
        if not self.config.fp8:
            return attention, attention
        multiple = FP8_ROWS // math.gcd(FP8_ROWS, batch)
        return min(-(-attention // multiple) * multiple, length), attention // multiple * multiple

    def _mix_rows(
        self,
        projected: Tensor,
        query_attention: Tensor | None,
        query_recurrent: Tensor | None,
        logits: Tensor | None,
        layout: ops.TokenLayout,
    ) -> Tensor:
        """Projections in rows, None for those that no token needs → [s/c, b, H P] in rows, ready for out_proj."""
        if self.cp_group.size() == 1:
            mixed = self.mix_heads(projected, query_attention, query_recurrent, logits, layout)
            return self.norm_rows(*mixed, layout)
        own = self._own_attention(layout)
        rows = [] if query_attention is None else [query_attention[:own]]
        rows += [] if query_recurrent is None else [query_recurrent[own - len(projected) :]]
        inputs = [projected, rows[0] if len(rows) == 1 else torch.cat(rows)]
        widths = [[self.parts["key"], self.parts["value"]], [inputs[1].shape[-1]]]
        if logits is not None:
            inputs.append(logits)
            widths.append(list(self.decay_parts.values()))
        (keys_values, query, *others), (gate, *_) = sequence_to_heads(inputs, widths, self.cp_group)
        if layout.attention and layout.recurrent:
            query_attention, query_recurrent = query.split((layout.attention, layout.recurrent))
        else:
            query_attention, query_recurrent = (query, None) if layout.attention else (None, query)
        logits = others[0] if others else None
        o_attention, o_recurrent, _ = self.mix_heads(keys_values, query_attention, query_recurrent, logits, layout)
        o = heads_to_sequence(fused.in_rows(o_attention, o_recurrent, layout), self.cp_group)
        shard = layout.shard(self.cp_group.size())
        return self.norm_rows(o.transpose(0, 1), None, gate if self.model.output_gate else None, shard)

    def mix_heads(
        self,
        projected: Tensor,
        query_attention: Tensor | None,
        query_recurrent: Tensor | None,
        logits: Tensor | None,
        layout: ops.TokenLayout,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Attention and recurrence of all rows and of this rank's heads, from their projections.

        Returns o [b, n, H, P] of the attention rows and o [b, s, H, P] by token, None for a mode that no token has, and
        the gate where `projected` holds it.
        """
        model, steps = self.model, self.steps
        read = fused.keys_values(
            projected,
            self.groups,
            (model.qk_head_dim, model.v_head_dim),
            self._conv_weight() if model.conv_width else None,
            self.key_norm.summed_weight() if model.has_attention and model.qk_norm else None,
            layout,
            steps,
            gated=model.output_gate and self.cp_group.size() == 1,  # else it stayed with its rows
        )
        o_attention = o_recurrent = None
        if query_attention is not None:
            norm = self.query_norm.summed_weight() if model.qk_norm else None
            q = fused.attention_query(query_attention, model.qk_head_dim, norm, layout, steps)
            keys, values = read.attention_keys, read.attention_values
            if self._fp8_attention and not layout.recurrent and not layout.isolated:
                o_attention = self._fp8_attention[0](q, keys, values).unflatten(-1, (-1, model.v_head_dim))
            else:
                o_attention = ops.attend(q, keys, values, layout)  # type: ignore[arg-type]
        if query_recurrent is not None and logits is not None:
            q = fused.recurrent_query(query_recurrent, model.qk_head_dim, layout, steps)
            decay, rate = fused.gates(logits, self._own(self.a_log), self._own(self.dt_bias), layout, model.mixer)
            keys, values = read.recurrent_keys, read.recurrent_values
            if model.mixer == "mamba2":
                d = self._own(self.d)
                o_recurrent, _ = ops.ssd_scan(q, keys, values, decay, rate, d)  # type: ignore[arg-type]
            else:
                o_recurrent, _ = ops.delta_scan(q, keys, values, decay, rate)  # type: ignore[arg-type]
        return o_attention, o_recurrent, read.gate

    def norm_rows(
        self, o_attention: Tensor | None, o_recurrent: Tensor | None, gate: Tensor | None, layout: ops.TokenLayout
    ) -> Tensor:
        """Outputs of the rows' own modes and their gate → [s, b, H P] in rows."""
        weight, epsilon = self.out_norm.summed_weight(), self.out_norm.eps
        return fused.gated_norm(o_attention, o_recurrent, gate, weight, layout, epsilon)

    def _unused(self, layout: ops.TokenLayout, own: int) -> list[Tensor]:
        """Parameters without a part in this plan, or in this rank's rows, `own` of them in attention mode.

        They get zero gradients, since overlapped reduction waits for all.
        """
        unused: list[Tensor] = []
        if self.model.has_attention:
            unused += [] if own else [self.query_attention.weight]
            unused += [] if layout.attention else [norm.weight for norm in self._query_key_norms()]
        if self.model.has_recurrence:
            unused += [] if own < layout.length // self.cp_group.size() else [self.query_recurrent.weight]
            unused += [] if layout.recurrent else [self.decay_proj.weight, *self._decay_parameters()]
        return unused

    def _project(self, hidden_states: Tensor, recurs: bool) -> tuple[Tensor, Tensor | None]:
        """For OryxMixer's own steps: all parts side by side, in its order."""
        projected, normed = self._input(hidden_states)
        parts = dict(zip(self.in_proj_rows, projected.split(list(self.in_proj_rows.values()), dim=-1)))
        parts |= {name: linear(normed)[0] for name, linear in self.query_projections().items()}
        decay = self.decay_proj(normed)[0] if self.model.has_recurrence and recurs else None
        return torch.cat([parts[name] for name in self.parts], dim=-1), decay

    # --------------------------------------------------------------------------------------------- checkpoints

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As OryxMixer's, under the same names: a checkpoint of either loads into the other."""
        result = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in self.query_projections():
            result[f"{prefix}{name}.weight"].key = f"{prefix}in_proj.weight.{name}"
        return result


class _Rows(torch.autograd.Function):
    """x, its first rows, and its last rows; the gradients of the three meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.first, ctx.last, ctx.shape = first, last, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:first], x[last:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        whole, head, tail = grads
        first, last, length = ctx.first, ctx.last, ctx.shape[0]
        pieces = [(0, first, head), (last, length, tail)]
        given = [(start, stop, grad) for start, stop, grad in pieces if grad is not None and stop > start]
        if whole is None and len(given) == 1 and given[0][:2] == (0, length):
            return given[0][2], None, None
        like = next((grad for grad in grads if grad is not None), None)
        if like is None:
            return None, None, None
        overlap = len(given) == 2 and given[0][1] > given[1][0]
        covered = (len(given) == 2 and not overlap) or any(piece[:2] == (0, length) for piece in given)
        if whole is None or overlap or not covered:
            total = like.new_zeros(ctx.shape) if whole is None else whole.clone()
            for start, stop, grad in given:
                total[start:stop] += grad
        else:
            total = torch.empty_like(whole)
            for start, stop, grad in given:
                torch.add(whole[start:stop], grad, out=total[start:stop])
        return total, None, None
