"""Layers of the Hugging Face model: norm, convolution, attention, the mixer, SwiGLU.

Unlike the rest of the project this file guards its imports of fla, mamba_ssm and causal_conv1d, because an export runs
without them; what they compute is in plain torch in recurrences_oryx.py.

Shapes: b batch, s tokens of this call, t tokens so far, H query heads, G key/value heads (H = r G), N key width,
P value width, c = G (N + P) convolution channels, w taps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_oryx import OryxConfig
from .experts_oryx import OryxMoE
from .modes_oryx import TokenModes
from .norm_conv_oryx import causal_conv, next_window, rms_norm
from .recurrences_oryx import delta_gates, gated_delta_rule, ssd, ssd_gates, unit, wide, with_skip
from .rotary_oryx import rotate
from .states_oryx import TwoStates

try:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
except ImportError:
    chunk_gated_delta_rule = None
try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined = None
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None


class OryxRMSNorm(nn.Module):
    """RMSNorm over the last dimension, with an optional SiLU gate behind it; computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, gate).to(self.weight.dtype)


class OryxShortConv(nn.Module):
    """Causal depthwise convolution; the last tap weighs the token itself."""

    def __init__(self, channels: int, width: int, activation: str | None, kernels: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.activation, self.kernels = activation, kernels

    def forward(self, x: Tensor, window: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [b, s, c], window [b, c, w - 1] of earlier inputs, valid [b, s] → y [b, s, c] and the new window.

        Tokens that are not valid are left out, wherever they stand: the others convolve as if they were not there.
        """
        s, w = x.shape[1], self.weight.shape[1]
        place = counts = None
        if valid is not None:
            counts = valid.sum(1)
            if s > 1:
                order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
                place = order.argsort(dim=1)[..., None].expand_as(x)
                x = x.gather(1, order[..., None].expand_as(x))
        if self.kernels and causal_conv1d_fn is not None and x.is_cuda and window is None and 2 <= w <= 4 and s > 1:
            y = causal_conv1d_fn(x.transpose(1, 2), self.weight, None, activation=self.activation).transpose(1, 2)
            window = next_window(x, w - 1, None, counts)
        else:
            y, window = causal_conv(x, self.weight, silu=self.activation == "silu", initial=window, counts=counts)
        return (y if place is None else y.gather(1, place)), window

    def windows(self, x: Tensor, window: Tensor | None) -> list[Tensor]:
        """The windows after each of the tokens x [b, s, c], none of them padding; `window` of earlier inputs."""
        w, x = self.weight.shape[1], x.transpose(1, 2)
        first = x.new_zeros(*x.shape[:2], w - 1) if window is None else window
        full = torch.cat([first.to(x.dtype), x], -1)
        return [full[..., t + 1 : t + w] for t in range(x.shape[-1])]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out: query [b, H, s, N], key and value [b, G, t, ·] → [b, s, H, P], weights.

    The mask is added, or true where a key is read.
    """
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=wide(scores.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


@dataclass
class OryxContext:
    """What the layers of one call that have the same modes share."""

    modes: TokenModes
    masks: tuple[Any, ...] = ()
    """Attention mask of each of `modes.runs`, in the form the attention implementation wants."""
    key_counts: tuple[int | None, ...] = ()
    """Keys each run may see, counted from the first; None: all."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines [b, s, N / 2] of attention's queries and keys."""
    rotary_recurrent: tuple[Tensor, Tensor] | None = None
    """The same of the recurrence's, where it is rotated."""
    valid: Tensor | None = None
    """bool [b, s], false for padding; None when there is none."""
    output_attentions: bool = False


class OryxTokenMixer(nn.Module):
    """One layer's mixer: shared keys and values, an attention query and a recurrent query."""

    def __init__(self, config: OryxConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        modes = config.modes_of(layer_idx)
        self.attends, self.recurs = modes != "recurrent", modes != "attention"
        self.shared_query = config.shared_query and modes == "both"
        d, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        n, p = config.head_dim, config.value_head_dim
        self.num_key_value_groups = heads // groups
        self.is_causal, self.scaling = True, n**-0.5
        self.widths = [groups * n, groups * p]
        self.kernels = config.kernels == "auto"

        def linear(width: int) -> nn.Linear:
            return nn.Linear(d, width, bias=False)

        self.k_proj, self.v_proj = linear(groups * n), linear(groups * p)
        if self.shared_query:
            self.q_proj = linear(heads * n)
        elif self.attends:
            self.q_attention_proj = linear(heads * n)
        if self.recurs and not self.shared_query:
            self.q_recurrent_proj = linear(heads * n)
        self.gate_proj = linear(heads * p) if config.output_gate else None
        activation = "silu" if config.mixer == "gdn" else None
        self.conv = (
            OryxShortConv(sum(self.widths), config.conv_width, activation, self.kernels) if config.conv_width else None
        )
        if self.attends and config.qk_norm:
            self.query_norm, self.key_norm = OryxRMSNorm(n, config.rms_norm_eps), OryxRMSNorm(n, config.rms_norm_eps)
        if self.recurs:
            self.decay_proj = linear(heads * (2 if config.mixer == "gdn" else 1))
            # fp32 in a half-precision model too: `from_config` builds it under torch's default dtype.
            exact = wide(torch.get_default_dtype())
            for name in config.fp32_parameters:
                self.register_parameter(name, nn.Parameter(torch.empty(heads, dtype=exact)))
        self.out_norm = OryxRMSNorm(p, config.rms_norm_eps)
        self.out_proj = nn.Linear(heads * p, d, bias=False)
        self.out_proj.residual = True

    def forward(self, x: Tensor, context: OryxContext, layer: TwoStates | None = None) -> tuple[Tensor, Tensor | None]:
        """x [b, s, d] → [b, s, d], and when asked for attention weights [b, H, s, t], zero for recurrent tokens.

        `layer` holds this layer's states of earlier tokens and is advanced.
        """
        config, modes = self.config, context.modes
        valid = None if context.valid is None else context.valid.to(x.device)
        kv = torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        window = state = None
        windows: list[Tensor | None] | None = None  # after each token, where tokens may be taken back
        states: list[Tensor | None] | None = None
        trail = None if layer is None else layer.trail
        if layer is not None and trail is not None:
            windows, states = [None] * x.shape[1], [None] * x.shape[1]
            if self.conv is not None:
                windows = self.conv.windows(kv, layer.window)
        if self.conv is not None:
            kv, window = self.conv(kv, None if layer is None else layer.window, valid)
        k, v = (y.unflatten(-1, (config.num_key_value_heads, -1)) for y in kv.split(self.widths, -1))

        recurrent = None
        if self.recurs and (modes.recurs or layer is not None):
            state = None if layer is None else layer.recurrent
            recurrent, state = self._recur(x, k, v, state, valid, context, states)
        if trail is not None and windows is not None and states is not None:
            trail += zip(windows, states, strict=True)
        attended, weights = [], []
        k_a = v_a = None
        if self.attends and (modes.runs or (layer is not None and layer.keep_kv)):
            k_a = self.key_norm(k) if config.qk_norm else k
            if config.rotary != "none":
                k_a = rotate(k_a, context.rotary)
            k_a, v_a = k_a.transpose(1, 2), v.transpose(1, 2)
        if layer is not None:
            k_a, v_a = layer.advance(k_a, v_a, window, state, x.shape[1])
        if modes.runs:
            attended, weights = self._attend(x, k_a, v_a, context)
        full = None
        if context.output_attentions:
            full, attended = self._read_weights(x, weights, v_a, modes)

        o = self._choose(recurrent, attended, modes)
        if full is not None and not attended:
            o = o + 0.0 * full.sum().to(o)  # its gradient is zero, not missing
        gate = None if self.gate_proj is None else self.gate_proj(x).unflatten(-1, (config.num_attention_heads, -1))
        y = self.out_proj(self.out_norm(o, gate).flatten(-2))
        if self.training and torch.is_grad_enabled():
            y = y + self._untouched(recurrent is not None, bool(modes.runs))
        return y, full

    def _query(self, x: Tensor, mode: str) -> Tensor:
        project = self.q_proj if self.shared_query else getattr(self, f"q_{mode}_proj")
        return project(x).unflatten(-1, (self.config.num_attention_heads, -1))

    def _attend(self, x: Tensor, k: Tensor, v: Tensor, context: OryxContext) -> tuple[list[Tensor], list[Tensor]]:
        """Attention of the tokens in `modes.runs` over k, v [b, G, t, ·]: one [b, run, H, P] per run."""
        config, runs = self.config, context.modes.runs
        whole = runs == ((0, x.shape[1]),)

        def pick(y: Tensor) -> Tensor:
            return y if whole else torch.cat([y[:, start:stop] for start, stop in runs], 1)

        q = self._query(pick(x), "attention")
        if config.qk_norm:
            q = self.query_norm(q)
        if config.rotary != "none":
            q = rotate(q, (pick(context.rotary[0]), pick(context.rotary[1])))
        attend = eager_attention_forward
        name = config._attn_implementation
        # Compiled, a single fp32 query on a GPU gets strides that torch's kernel for it refuses (torch 2.11).
        single = x.is_cuda and x.shape[1] == 1 and x.dtype == torch.float32 and torch.compiler.is_compiling()
        if name != "eager" and not (name == "sdpa" and single):
            attend = ALL_ATTENTION_FUNCTIONS[name]
        outputs, all_weights = [], []
        parts = q.transpose(1, 2).split([stop - start for start, stop in runs], 2)
        for part, keys, mask in zip(parts, context.key_counts, context.masks):
            mask = None if mask is None else mask.to(x.device)
            o, weights = attend(self, part, k[:, :, :keys], v[:, :, :keys], mask, scaling=self.scaling, dropout=0.0)
            outputs.append(o.reshape(o.shape[0], part.shape[2], part.shape[1], -1))
            all_weights.append(weights)
        return outputs, all_weights

    def _read_weights(
        self, x: Tensor, weights: list[Tensor], v: Tensor | None, modes: TokenModes
    ) -> tuple[Tensor, list[Tensor]]:
        """Attention weights [b, H, s, t], zero for recurrent tokens, and one [b, run, H, P] per run, read by them.

        Read again from what is returned, so that gradients reach it.
        """
        b, s = x.shape[:2]
        full = x.new_zeros(b, self.config.num_attention_heads, s, s if v is None else v.shape[2])
        for (start, stop), part in zip(modes.runs, weights):
            full[:, :, start:stop, : part.shape[-1]] = part
        if modes.rows is not None:
            full = full * modes.rows[:, None, :, None].to(full)
        if not modes.runs:
            return full.requires_grad_(torch.is_grad_enabled()), []
        v = v.repeat_interleave(self.num_key_value_groups, 1)
        return full, [(full[:, :, start:stop] @ v).transpose(1, 2) for start, stop in modes.runs]

    def _recur(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        valid: Tensor | None,
        context: OryxContext,
        after: list[Tensor | None] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Recurrence over all tokens; the output [b, s, H, P] only when some token reads it.

        With `after` token by token: it is filled with the state after each.
        """
        config = self.config
        dtype = v.dtype
        q = self._query(x, "recurrent") if context.modes.recurs else None
        if config.rotary == "both":
            k = rotate(k, context.rotary_recurrent)
            q = None if q is None else rotate(q, context.rotary_recurrent)
        raw = self.decay_proj(x)
        fast = self.kernels and x.is_cuda and x.shape[1] > 1 and dtype in (torch.bfloat16, torch.float16)
        fast = fast and after is None
        if config.mixer == "mamba2":
            dt, decay = ssd_gates(raw, self.dt_bias, self.a_log)
            if valid is not None:  # neither decay nor write
                dt, decay = dt * valid.unsqueeze(-1), decay * valid.unsqueeze(-1)
            if fast and mamba_chunk_scan_combined is not None:
                k, v = (y.repeat_interleave(self.num_key_value_groups, 2) for y in (k, v))
                o, final = mamba_chunk_scan_combined(
                    v, dt, -self.a_log.to(dt).exp(), k, k if q is None else q, chunk_size=128, D=self.d_skip.to(dt),
                    initial_states=None if state is None else state.transpose(-1, -2).contiguous(),
                    return_final_states=True,
                )  # fmt: skip
                return (None if q is None else o), final.transpose(-1, -2)
            o, state = self._scan(ssd, (q, k, v, decay, dt), state, after)
            return (None if o is None else with_skip(o, v, self.d_skip).to(dtype)), state
        decay, beta = delta_gates(*raw.chunk(2, -1), self.dt_bias, self.a_log)
        if valid is not None:
            decay, beta = decay * valid.unsqueeze(-1), beta * valid.unsqueeze(-1)
        if fast and chunk_gated_delta_rule is not None:
            k, v = (y.repeat_interleave(self.num_key_value_groups, 2) for y in (k, v))
            o, state = chunk_gated_delta_rule(
                k if q is None else q, k, v, decay, beta.to(dtype), scale=self.scaling, initial_state=state,
                output_final_state=True, use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            return (None if q is None else o), state
        q = None if q is None else unit(q, self.scaling)
        o, state = self._scan(gated_delta_rule, (q, unit(k), v, decay, beta), state, after)
        return (None if o is None else o.to(dtype)), state

    def _scan(
        self,
        scan: Callable[..., tuple[Tensor | None, Tensor]],
        inputs: tuple[Tensor | None, ...],
        state: Tensor | None,
        after: list[Tensor | None] | None,
    ) -> tuple[Tensor | None, Tensor]:
        chunk = self.config.recurrence_chunk
        if after is None:
            return scan(*inputs, initial=state, chunk=chunk)
        outputs = []
        for t in range(len(after)):
            one = (None if x is None else x[:, t : t + 1] for x in inputs)
            o, state = scan(*one, initial=state, chunk=chunk)
            outputs.append(o)
            after[t] = state
        return (None if outputs[0] is None else torch.cat(outputs, 1)), state

    @staticmethod
    def _choose(recurrent: Tensor | None, attended: list[Tensor], modes: TokenModes) -> Tensor:
        """Each token's output from the mixer it is read by, [b, s, H, P]."""
        if not attended:
            return recurrent
        if not modes.recurs:
            return attended[0]
        parts, end = [], 0
        for (start, stop), o in zip(modes.runs, attended):
            if modes.rows is not None:
                here = modes.rows[:, start:stop, None, None].to(o.device)
                o = torch.where(here, o, recurrent[:, start:stop])
            parts += [recurrent[:, end:start], o]
            end = stop
        return torch.cat([*parts, recurrent[:, end:]], 1)

    def _untouched(self, recurred: bool, attended: bool) -> Tensor:
        """Zero, through the parameters this call left out: data-parallel trainers want a gradient for every one."""
        unused = []
        if self.attends and not attended:
            unused += ["q_attention_proj", "query_norm", "key_norm"]
        if self.recurs and not recurred:
            unused += ["q_recurrent_proj", "decay_proj", "a_log", "dt_bias", "d_skip"]
        zero = self.out_proj.weight.new_zeros(())
        for name, parameter in self.named_parameters():
            if name.split(".")[0] in unused:
                zero = zero + 0.0 * parameter.sum().to(zero)
        return zero


class OryxMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: OryxConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.down_proj.residual = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _mlp(config: OryxConfig, layer: int) -> nn.Module:
    """What a layer, counted from 0, has behind its mixer."""
    if not config.has_experts(layer):
        return OryxMLP(config, config.intermediate_size)
    width = config.moe["shared_ffn_hidden_size"]
    return OryxMoE(config, OryxMLP(config, width) if width else None)


class OryxDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: mixer, then SwiGLU or experts."""

    def __init__(self, config: OryxConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.input_layernorm = OryxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = OryxTokenMixer(config, layer_idx)
        self.pre_mlp_layernorm = OryxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _mlp(config, layer_idx)

    def forward(self, x: Tensor, context: OryxContext, layer: TwoStates | None = None) -> Tensor:
        return self.block(x, context, layer)

    def block(self, x: Tensor, context: OryxContext, layer: TwoStates | None) -> Tensor:
        """What `forward` does; apart from it so that it can be compiled without transformers' wrapping of `forward`."""
        x = x + self.mixer(self.input_layernorm(x), context, layer)[0]
        return x + self.mlp(self.pre_mlp_layernorm(x))


@functools.cache
def compiled_block() -> Callable[..., Tensor]:
    """`OryxDecoderLayer.block` through torch.compile, for steps of single tokens."""
    return torch.compile(OryxDecoderLayer.block)
