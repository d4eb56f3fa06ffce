"""OryxMixer: one block that processes each token by attention or by a linear recurrence (arXiv 2605.28769).

Shapes: s sequence, b batch, d hidden size, H query heads, G key/value heads, N key width, P value width, n tokens in
attention mode — H and G counted on this rank, that is divided by the tensor-parallel and inside the mixer by the
context-parallel size c too.

    x [s, b, d] ─┬─ in_proj ───► key [G N] │ value [G P] │ query_attention [H N] │ query_recurrent [H N]
                 │               │ output_gate [H P]
                 └─ decay_proj ► mamba2: dt [H]; gdn: a [H] │ b [H]
    key, value ── causal convolution, activation ──► k [s, b, G, N], v [s, b, G, P]        shared by both modes
    attention-mode tokens:  o = softmax(rotary(norm(q_a)) · rotary(norm(k)) / √N) v
    recurrent-mode tokens:  o = Sᵀ q_r with S advanced at every token, whatever its mode
    y = out_proj(RMSNorm_P(o) ⊙ SiLU(output_gate))                                          shared by both modes

`OryxMixer` composes the parameters (weights.py) with one of two sets of the same steps, each read top to bottom:
`ReferenceSteps` over tokens in the order of the sequence, in operations of ops/, also when decoding; `FusedSteps` over
tokens sorted by mode, in GPU kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.tensor_parallel.random import checkpoint
from torch import Tensor

from oryx_megatron import ops
from oryx_megatron.model.parts import Rows, WithZeroGradients
from oryx_megatron.model.projections import Read, project
from oryx_megatron.model.sequence import LayerState, SequenceInfo
from oryx_megatron.model.weights import MixerWeights
from oryx_megatron.modes import Mode
from oryx_megatron.ops import TokenLayout, fused
from oryx_megatron.ops.fused import KeysValues
from oryx_megatron.parallel import heads_to_sequence, sequence_to_heads


class Parts(NamedTuple):
    """A microbatch's projections; None for what no token needs."""

    keys_values: Tensor
    """[s/c, b, G N + G P]: keys and values side by side. Fused: [.., G N + G P + H P], with the output gate."""
    query_attention: Tensor | None = None
    """[s/c, b, H N]; fused: [≥ n, b, H N] of the first rows."""
    query_recurrent: Tensor | None = None
    """[s/c, b, H N]; fused: [≥ s − n, b, H N] of the last rows."""
    logits: Tensor | None = None
    """[s/c, b, H or 2 H] of decay_proj."""
    gate: Tensor | None = None
    """[s/c, b, H P] where it does not lie beside the keys and values. It never leaves its tokens."""


class Steps(Protocol):
    """What a mixer does with one microbatch, in this order."""

    def project(self, hidden_states: Tensor) -> Parts:
        """[s, b, d] → parts of in_proj, decay_proj and the queries."""

    def exchange(self, parts: Parts) -> Parts:
        """Sequence shards of all heads → whole sequences of this context-parallel rank's heads, by one all-to-all."""

    def keys_values(self, projected: Tensor) -> KeysValues:
        """k = conv_k(W_k x) and v = conv_v(W_v x), shared by both modes, in what form each mode reads them."""

    def attend(self, query: Tensor | None, read: KeysValues) -> Tensor | None:
        """o_t = softmax(q_a,t K_{≤t}ᵀ / √N) V_{≤t} of the tokens in attention mode."""

    def recur(self, query: Tensor | None, logits: Tensor | None, read: KeysValues) -> Tensor | None:
        """o_t = S_tᵀ q_r,t of the tokens in recurrent mode, S advanced at every token."""

    def output(self, o_attention: Tensor | None, o_recurrent: Tensor | None, gate: Tensor | None) -> Tensor:
        """RMSNorm_P(o) ⊙ SiLU(g) with o of each token in its own mode (eq. 2): [s/c, b, H P]."""

    def unused(self) -> list[Tensor]:
        """Parameters without a part in this plan, or in this rank's rows.

        They get zero gradients, since overlapped gradient reduction waits for all in every step.
        """


class OryxMixer(MixerWeights):
    """Drop-in for megatron-core's SelfAttention inside a TransformerLayer; arguments as MixerWeights'."""

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
            packed_seq_params: Plan, documents, positions and, when decoding, the states, which are updated. With
                `layout` the tokens are expected in its order.

        Returns:
            [s, b, d] (sharded as the input), and no bias.
        """
        info = packed_seq_params
        if isinstance(info, SequenceInfo):
            info = info.of_layer(self.layer_number - 1)
        if not isinstance(info, SequenceInfo) or info.plan is None:
            raise TypeError("OryxMixer needs packed_seq_params=SequenceInfo(plan=…)")
        if self.fixed is not None:
            info = info.in_mode(self.fixed)
        assert info.plan is not None
        attention, length = info.plan.attention_tokens, info.plan.length
        if (attention > 0 and not self.model.has_attention) or (attention < length and not self.model.has_recurrence):
            raise ValueError(f"a model with modes={self.model.modes} cannot run the plan {info.plan}")
        steps: Steps = ReferenceSteps(self, info) if info.layout is None else FusedSteps(self, info.layout)
        parts = steps.project(hidden_states)
        if self.config.recompute_mixer and self.training:
            mixed = self._recomputed(steps, parts)
        else:
            mixed = self.mix(steps, parts)
        if torch.is_grad_enabled() and (unused_parameters := steps.unused()):
            mixed = WithZeroGradients.apply(mixed, *unused_parameters)
        return self.out_proj(mixed)[0], None

    def mix(self, steps: Steps, parts: Parts) -> Tensor:
        """What the projections gave → [s/c, b, H P], ready for out_proj."""
        if self.cp_group.size() > 1:
            parts = steps.exchange(parts)
        return steps.output(*self.mix_heads(steps, parts))

    def mix_heads(self, steps: Steps, parts: Parts) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Outputs of both modes for whole sequences of this rank's heads, None for one that nothing reads; the gate."""
        read = steps.keys_values(parts.keys_values)
        o_attention = steps.attend(parts.query_attention, read)
        o_recurrent = steps.recur(parts.query_recurrent, parts.logits, read)
        return o_attention, o_recurrent, read.gate if parts.gate is None else parts.gate

    def _recomputed(self, steps: Steps, parts: Parts) -> Tensor:
        """`mix`, computed again in the backward pass."""
        names = [name for name, part in parts._asdict().items() if part is not None]

        def mix(*given: Tensor) -> Tensor:
            return self.mix(steps, Parts(**dict(zip(names, given))))

        return checkpoint(mix, False, *(getattr(parts, name) for name in names))


class ReferenceSteps:
    """Steps over tokens in the order of the sequence; with states (decoding) both modes advance at every token.

    Without states to keep (training), a mode that no token uses is not computed.
    """

    def __init__(self, mixer: MixerWeights, info: SequenceInfo) -> None:
        assert info.plan is not None
        self.mixer, self.model, self.info, self.plan = mixer, mixer.model, info, info.plan
        self.state = None if info.states is None else info.states.setdefault(mixer.layer_number, LayerState())
        attention, kept = self.plan.attention_tokens, self.state is not None
        self.attends = self.model.has_attention and (attention > 0 or kept)
        self.recurs = self.model.has_recurrence and (attention < self.plan.length or kept)

    def project(self, hidden_states: Tensor) -> Parts:
        """See Steps."""
        mixer, attends = self.mixer, self.plan.attention_tokens > 0
        projected, normed = mixer.input(hidden_states)
        rows = dict(mixer.in_proj_rows)
        keys_values, *others = projected.split([rows.pop("key") + rows.pop("value"), *rows.values()], dim=-1)
        named = dict(zip(rows, others))
        for name, linear in mixer.query_projections().items():
            if attends if name == "query_attention" else self.recurs:
                named[name] = linear(normed)[0]
        return Parts(
            keys_values,
            named.get("query", named.get("query_attention")) if attends else None,
            named.get("query", named.get("query_recurrent")) if self.recurs else None,
            mixer.decay_proj(normed)[0] if self.recurs else None,
            named.get("output_gate"),
        )

    def exchange(self, parts: Parts) -> Parts:
        """See Steps; parts that no token of the plan reads stay out of it."""
        mixer = self.mixer
        queries = [query for query in (parts.query_attention, parts.query_recurrent) if query is not None]
        if "query" in mixer.in_proj_rows:  # shared: one is both
            queries = queries[:1]
        inputs = [parts.keys_values, *queries]
        widths = [[mixer.in_proj_rows["key"], mixer.in_proj_rows["value"]], *([x.shape[-1]] for x in queries)]
        if parts.logits is not None:
            inputs.append(parts.logits)
            widths.append(list(mixer.decay_parts.values()))
        (keys_values, *others), _ = sequence_to_heads(inputs, widths, mixer.cp_group)
        return Parts(
            keys_values,
            logits=None if parts.logits is None else others.pop(),
            query_attention=None if parts.query_attention is None else others[0],
            query_recurrent=None if parts.query_recurrent is None else others[-1],
            gate=parts.gate,
        )

    def keys_values(self, projected: Tensor) -> KeysValues:
        """See Steps: k [b, s, G, N], v [b, s, G, P]; advances the convolution window."""
        mixer, model, state, info = self.mixer, self.model, self.state, self.info
        kv = projected.transpose(0, 1)  # [b, s, channels]
        if model.conv_width:
            kv, window = ops.causal_conv(
                kv,
                mixer.own_conv_weight(),
                activation=mixer.activation,
                initial=None if state is None else state.window,
                documents=info.documents,
                final=state is not None,
            )
            if state is not None:
                state.window = window
        k, v = kv.split((mixer.groups * model.qk_head_dim, mixer.groups * model.v_head_dim), dim=-1)
        k, v = k.unflatten(-1, (mixer.groups, -1)), v.unflatten(-1, (mixer.groups, -1))
        read_by_attention = self._as_attention_reads(k, "key_norm") if self.attends else None
        read_by_recurrence = self._as_recurrence_reads(k) if self.recurs else None
        return KeysValues(read_by_attention, read_by_recurrence, v, v, None)

    def _as_attention_reads(self, x: Tensor, norm: str) -> Tensor:
        """Keys or queries [b, s, heads, N], normed and rotated."""
        if self.model.qk_norm:
            x = getattr(self.mixer, norm)(x)
        return x if self.model.rotary == "none" else self._rotated(x, attention=True)

    def _as_recurrence_reads(self, x: Tensor) -> Tensor:
        return self._rotated(x, attention=False) if self.model.rotary == "both" else x

    def _rotated(self, x: Tensor, *, attention: bool) -> Tensor:
        assert self.info.positions is not None
        return ops.rotary(x, self.info.positions, ops.rope_of(self.model), attention=attention)

    def attend(self, query: Tensor | None, read: KeysValues) -> Tensor | None:
        """See Steps: [b, s, H, P], zero for recurrent tokens; appends to the KV cache."""
        keys, values = read.attention_keys, read.attention_values
        if keys is None or values is None:
            return None
        if self.state is not None:
            keys, values = self.state.append(keys, values)
        if query is None:
            return None
        q = self._as_attention_reads(self._by_head(query), "query_norm")
        return ops.mode_attention(q, keys, values, self.plan, documents=self.info.documents)

    def recur(self, query: Tensor | None, logits: Tensor | None, read: KeysValues) -> Tensor | None:
        """See Steps: [b, s, H, P]; mamba2: S_t = a_t S_{t−1} + Δ_t k_t v_tᵀ, gdn: S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1}
        + β_t k_t v_tᵀ."""
        k, v = read.recurrent_keys, read.recurrent_values
        if query is None or logits is None or k is None or v is None:
            return None
        mixer, state = self.mixer, self.state
        q = self._as_recurrence_reads(self._by_head(query))
        gates = [x.transpose(0, 1) for x in logits.split(mixer.heads, dim=-1)]
        common: dict[str, Any] = {
            "dt_bias": mixer.own(mixer.dt_bias),
            "a_log": mixer.own(mixer.a_log),
            "initial": None if state is None else state.recurrent,
            "documents": self.info.documents,
            "final": state is not None,
            "chunk": self.model.recurrence_chunk,
        }
        if self.model.mixer == "mamba2":
            o, final = ops.ssd(q, k, v, gates[0], d=mixer.own(mixer.d), **common)
        else:
            o, final = ops.gated_delta_rule(q, k, v, gates[0], gates[1], **common)
        if state is not None:
            state.recurrent = final
        return o

    def _by_head(self, query: Tensor) -> Tensor:
        """[s, b, H N] → [b, s, H, N]"""
        return query.transpose(0, 1).unflatten(-1, (self.mixer.heads, -1))

    def output(self, o_attention: Tensor | None, o_recurrent: Tensor | None, gate: Tensor | None) -> Tensor:
        """See Steps."""
        o = o_attention if self.plan.attention_tokens else o_recurrent
        if 0 < self.plan.attention_tokens < self.plan.length:
            assert o_attention is not None
            assert o_recurrent is not None
            assert self.info.attention_rows is not None
            o = torch.where(self.info.attention_rows[None, :, None, None], o_attention, o_recurrent)
        assert o is not None
        # [b, s, H, P] → [s/c, b, all H of this tensor-parallel rank, P]
        o = heads_to_sequence(o.transpose(0, 1), self.mixer.cp_group)
        if gate is not None:
            gate = gate.unflatten(-1, (-1, self.model.v_head_dim))
        norm = self.mixer.out_norm
        return ops.gated_rms_norm(o, gate, norm.summed_weight(), norm.eps).flatten(2)

    def unused(self) -> list[Tensor]:
        """See Steps."""
        mixer = self.mixer
        used = {"query_attention": self.plan.attention_tokens > 0, "query_recurrent": self.recurs}
        unused = [linear.weight for name, linear in mixer.query_projections().items() if not used[name]]
        unused += [] if self.attends else mixer.attention_parameters()
        return unused + ([] if self.recurs else mixer.recurrent_parameters())  # type: ignore[return-value]


class FusedSteps:
    """Steps over tokens sorted by mode (ops/layout.py), in fewer passes over memory and without what nobody reads.

    Attention tokens come first, through the whole model. So

        x [s, b, d] ── norm, in_proj ──► key │ value │ output_gate        all rows
                    ├─ query_attention ──► q_a                            the first n rows alone
                    ├─ query_recurrent ──► q_r                            the last s − n rows alone
                    └─ decay_proj ──► logits of the gates                 all rows, when some token recurs

    in one autograd function (projections.py; in FP8 and FP4 by TransformerEngine's modules). Every step in between is
    a kernel of ops/fused.py. Context parallelism splits the rows: a rank holds s/c consecutive ones, projects one query
    for each, and the exchange brings all rows of its heads together in the order of the layout. No host code here
    branches on more than `TokenLayout.shape_of`: CUDA graphs capture it.
    """

    def __init__(self, mixer: MixerWeights, layout: TokenLayout) -> None:
        self.mixer, self.model, self.layout = mixer, mixer.model, layout
        size, rank = mixer.cp_group.size(), mixer.cp_group.rank()
        self.rows = layout.length // size
        """Of this rank."""
        self.own = min(max(layout.attention - rank * self.rows, 0), self.rows)
        """How many of this rank's rows, the first ones, are in attention mode."""

    def project(self, hidden_states: Tensor) -> Parts:
        """See Steps."""
        mixer = self.mixer
        if mixer.config.quantized:
            return self._project_each(hidden_states)
        # No module is called: the mixer has waited for all of its weights (train/overlap.py).
        normed = mixer.gathered(hidden_states)
        reads = {"keys_values": Read(mixer.in_proj.weight, 0, self.rows)}
        if self.own > 0:
            reads["query_attention"] = Read(mixer.query_attention.weight, 0, self.own)
        if self.own < self.rows:
            reads["query_recurrent"] = Read(mixer.query_recurrent.weight, self.own, self.rows)
        if self.layout.recurrent > 0:
            reads["logits"] = Read(mixer.decay_proj.weight, 0, self.rows)
        into = mixer.in_proj.fuse_wgrad_accumulation
        return Parts(**dict(zip(reads, project(normed, list(reads.values()), into_main_grad=into))))

    def _project_each(self, hidden_states: Tensor) -> Parts:
        """`project` by the modules that hold the weights: FP8 and FP4 are theirs."""
        mixer = self.mixer
        projected, normed = mixer.input(hidden_states)
        first, last = self._query_rows(*normed.shape[:2])
        whole, head, tail = Rows.apply(normed, first, last)
        return Parts(
            projected,
            query_attention=mixer.query_attention(head)[0] if self.own > 0 else None,
            query_recurrent=mixer.query_recurrent(tail)[0] if self.own < self.rows else None,
            logits=mixer.decay_proj(whole)[0] if self.layout.recurrent > 0 else None,
        )

    def _query_rows(self, length: int, batch: int) -> tuple[int, int]:
        """How many of the first rows need an attention query, and from which on a recurrent one is needed.

        Both counts are rounded outwards to what the products of FP8 and FP4 take.
        """
        rows = self.mixer.config.row_multiple
        multiple = rows // math.gcd(rows, batch)
        return min(-(-self.own // multiple) * multiple, length), self.own // multiple * multiple

    def exchange(self, parts: Parts) -> Parts:
        """See Steps."""
        mixer, layout = self.mixer, self.layout
        rows = [] if parts.query_attention is None else [parts.query_attention[: self.own]]
        rows += [] if parts.query_recurrent is None else [parts.query_recurrent[self.own - self.rows :]]
        inputs = [parts.keys_values, rows[0] if len(rows) == 1 else torch.cat(rows)]
        widths = [[mixer.in_proj_rows["key"], mixer.in_proj_rows["value"]], [inputs[1].shape[-1]]]
        if parts.logits is not None:
            inputs.append(parts.logits)
            widths.append(list(mixer.decay_parts.values()))
        (keys_values, query, *others), (gate, *_) = sequence_to_heads(inputs, widths, mixer.cp_group)
        if layout.attention and layout.recurrent:
            query_attention, query_recurrent = query.split((layout.attention, layout.recurrent))
        else:
            query_attention, query_recurrent = (query, None) if layout.attention else (None, query)
        return Parts(
            keys_values,
            query_attention,
            query_recurrent,
            others[0] if others else None,
            gate if self.model.output_gate else None,
        )

    def keys_values(self, projected: Tensor) -> KeysValues:
        """See Steps."""
        mixer, model = self.mixer, self.model
        return fused.keys_values(
            projected,
            mixer.groups,
            (model.qk_head_dim, model.v_head_dim),
            mixer.own_conv_weight() if model.conv_width else None,
            mixer.key_norm.summed_weight() if model.has_attention and model.qk_norm else None,
            self.layout,
            mixer.head_steps,
            gated=model.output_gate and mixer.cp_group.size() == 1,  # else it stayed with its rows
        )

    def attend(self, query: Tensor | None, read: KeysValues) -> Tensor | None:
        """See Steps: [b, n, H, P] of the attention rows."""
        if query is None:
            return None
        mixer, model, layout = self.mixer, self.model, self.layout
        norm = mixer.query_norm.summed_weight() if model.qk_norm else None
        if not layout.recurrent and not layout.ordered:  # all rows attend, sorted for layers that have both modes
            query, layout = query.index_select(0, layout.rows), layout.in_order
        q = fused.attention_query(query, model.qk_head_dim, norm, layout, mixer.head_steps)
        keys, values = read.attention_keys, read.attention_values
        if mixer.fp8_attention and not layout.recurrent and not layout.isolated:
            return mixer.fp8_attention[0](q, keys, values).unflatten(-1, (-1, model.v_head_dim))
        return ops.attend(q, keys, values, layout)  # type: ignore[arg-type]

    def recur(self, query: Tensor | None, logits: Tensor | None, read: KeysValues) -> Tensor | None:
        """See Steps: [b, s, H, P] by token."""
        if query is None or logits is None:
            return None
        mixer, model, layout = self.mixer, self.model, self.layout
        q = fused.recurrent_query(query, model.qk_head_dim, layout, mixer.head_steps)
        decay, rate = fused.gates(logits, mixer.own(mixer.a_log), mixer.own(mixer.dt_bias), layout, model.mixer)
        keys, values = read.recurrent_keys, read.recurrent_values
        if model.mixer == "mamba2":
            return ops.ssd_scan(q, keys, values, decay, rate, mixer.own(mixer.d))[0]  # type: ignore[arg-type]
        return ops.delta_scan(q, keys, values, decay, rate)[0]  # type: ignore[arg-type]

    def output(self, o_attention: Tensor | None, o_recurrent: Tensor | None, gate: Tensor | None) -> Tensor:
        """See Steps: in rows."""
        group, layout = self.mixer.cp_group, self.layout
        if o_attention is not None and not layout.recurrent and not layout.ordered:  # by token, as those of recurrence
            o_attention, o_recurrent, layout = None, o_attention, layout.in_mode(Mode.RECURRENT)
        if group.size() == 1:
            return self.norm_rows(o_attention, o_recurrent, gate, layout)
        o = heads_to_sequence(fused.in_rows(o_attention, o_recurrent, layout), group)
        return self.norm_rows(o.transpose(0, 1), None, gate, layout.shard(group.size()))

    def norm_rows(
        self, o_attention: Tensor | None, o_recurrent: Tensor | None, gate: Tensor | None, layout: TokenLayout
    ) -> Tensor:
        """Outputs of the rows' own modes and their gate → [s, b, H P] in rows."""
        norm = self.mixer.out_norm
        return fused.gated_norm(o_attention, o_recurrent, gate, norm.summed_weight(), layout, norm.eps)

    def unused(self) -> list[Tensor]:
        """See Steps."""
        mixer, unused = self.mixer, list[Tensor]()
        if self.model.has_attention:
            unused += [] if self.own else [mixer.query_attention.weight]
            unused += [] if self.layout.attention else mixer.attention_parameters()
        if self.model.has_recurrence:
            unused += [] if self.own < self.rows else [mixer.query_recurrent.weight]
            unused += [] if self.layout.recurrent else mixer.recurrent_parameters()
        return unused
