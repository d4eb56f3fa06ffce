"""Oryx for Hugging Face transformers 5: a language model that reads each token by attention or by a recurrence.

This file, `configuration_oryx.py` and `recurrences_oryx.py` stand alone: an export copies them beside the weights, and
nothing but torch and transformers is needed to load them (`trust_remote_code=True`). That is why, unlike the rest of
the project, it holds guarded imports of fla, mamba_ssm and causal_conv1d; what they compute is here in plain torch too.

Model: "Multi-Mixer Models: Flexible Sequence Modeling with Shared Representations", arXiv 2605.28769. Recurrences:
Mamba-2 (SSD), arXiv 2405.21060, and Gated DeltaNet, arXiv 2412.06464.

Shapes: b batch, s tokens of this call, t tokens so far, H query heads, G key/value heads (H = r G), N key width,
P value width, c = G (N + P) convolution channels, w taps.

Every layer keeps both states in step whatever the mode of a token: keys and values, and the recurrent state
S [b, H, N, P] fp32 with the window [b, c, w - 1] of the convolutions. The mode only chooses which query reads which.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# First: it says in one line which versions of transformers serve, where the imports below would fail.
from .configuration_oryx import OryxConfig
from .recurrences_oryx import delta_gates, gated_delta_rule, ssd, ssd_gates, unit, wide, with_skip

# isort: split
from transformers import initialization as init
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    StaticCache,
)
from transformers.generation import EosTokenCriteria, GenerationMixin, MaxLengthCriteria
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

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

logger = logging.get_logger(__name__)

ModePlan = str | Callable[[int], Any] | Tensor | Sequence[Any]
"""A spec, a function from position to mode, or a mask that is true where a token attends."""

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls the cache, in arguments and outputs; `forward` and `generate` take both."""

PLAN_FORMS = (
    "attention, recurrent, prefix:N, last:N, ratio:R, every:K, runs:a0-256,r256-512, prompt:PLAN,new:PLAN "
    "(N tokens, R from 0 to 1, every K-th chunk)"
)


# ---------------------------------------------------------------------------------------------------------------------
# Mode plans
# ---------------------------------------------------------------------------------------------------------------------


def plan_mask(plan: ModePlan, length: int, *, chunk: int, prompt: int | None = None, shorter: bool = False) -> Tensor:
    """Mask, bool [length] on the CPU, true where a token of a text of `length` tokens attends.

    `plan` is a spec (`PLAN_FORMS`), a function from position to mode ("attention", "recurrent" or a truth value), or a
    mask of that length. `ratio:R` and `every:K` count chunks of `chunk` tokens; `prompt` is the number of tokens given
    before generation. `shorter`: the N of `prefix:N` and `last:N` may be more than the text has; a default plan meets
    texts of any length. Raises ValueError with the plan and what is wrong with it.
    """
    if isinstance(plan, str):
        return _spec_mask(plan, length, chunk, prompt, shorter)
    if callable(plan):
        return torch.tensor([_attends(plan(i)) for i in range(length)], dtype=torch.bool)
    mask = plan.detach().cpu() if isinstance(plan, Tensor) else torch.tensor([_attends(mode) for mode in plan])
    if mask.shape != (length,):
        raise ValueError(f"mode plan of shape {list(mask.shape)} does not fit a text of {length} tokens")
    return mask.bool()


def _attends(mode: Any) -> bool:
    if isinstance(mode, str) and mode not in ("attention", "recurrent"):
        raise ValueError(f"mode plan: `{mode}` is neither `attention` nor `recurrent`")
    return mode == "attention" if isinstance(mode, str) else bool(mode)


def check_default_plan(config: OryxConfig) -> None:
    """Raise ValueError when the plan of calls that give none cannot be followed, whatever the text."""
    plan = config.default_plan
    if not isinstance(plan, str):
        raise ValueError(f"OryxConfig.mode_plan is {plan!r}; a plan is one of {PLAN_FORMS}")
    _spec_mask(plan, 0, 1, 0, True)
    if config.modes != "both" and plan not in (config.modes, f"prompt:{config.modes},new:{config.modes}"):
        raise ValueError(f"mode plan `{plan}`: this model has {config.modes} mode only; its plan is `{config.modes}`")


def _spec_mask(spec: str, length: int, chunk: int, prompt: int | None, shorter: bool) -> Tensor:
    def wrong(why: str) -> ValueError:
        return ValueError(f"mode plan `{spec}`: {why}; a plan is one of {PLAN_FORMS}")

    def whole(text: str, least: int) -> int:
        if not text.isdecimal() or int(text) < least:
            raise wrong(f"`{text}` is not a whole number of at least {least}")
        return int(text)

    def tokens(text: str) -> int:
        if (count := whole(text, 0)) > length and not shorter:
            raise wrong(f"{count} tokens are more than the {length} of the text")
        return min(count, length)

    kind, colon, value = spec.strip().partition(":")
    value = value.strip()
    index = torch.arange(length)
    chunks = torch.arange(-(-length // chunk))
    if kind in ("attention", "recurrent") and not colon:
        return torch.full((length,), kind == "attention")
    if kind == "prefix":
        return index < tokens(value)
    if kind == "last":
        return index >= length - tokens(value)
    if kind == "ratio":
        if not re.fullmatch(r"\d+\.?\d*|\.\d+", value) or Fraction(value) > 1:
            raise wrong(f"`{value}` is not a number from 0 to 1")
        ratio = Fraction(value)  # exact: 0.29 * 100 chunks are 29, not 28
        attends = [int((i + 1) * ratio) > int(i * ratio) for i in range(len(chunks))]
        return torch.tensor(attends, dtype=torch.bool).repeat_interleave(chunk)[:length]
    if kind == "every":
        return ((chunks + 1) % whole(value, 1) == 0).repeat_interleave(chunk)[:length]
    if kind == "runs":
        mask = torch.zeros(length, dtype=torch.bool)
        end = 0
        for part in map(str.strip, value.split(",")):
            run = re.fullmatch(r"([ar])(\d+)-(\d+)", part)
            if run is None:
                raise wrong(f"`{part}` is no run like a0-256 or r256-512")
            start, stop = int(run[2]), int(run[3])
            if start != end or stop <= start:
                raise wrong(f"run `{part}` is empty or does not start at {end}, where the one before it ends")
            mask[start:stop] = run[1] == "a"
            end = stop
        if length and end != length:  # of no text, only the form is checked
            raise wrong(f"its runs end at {end}, the text at {length}")
        return mask
    if kind == "prompt":
        before, comma, after = value.partition(",new:")
        if not comma:
            raise wrong("`prompt:PLAN` needs `,new:PLAN` after it")
        if "prompt:" in value:
            raise wrong("a prompt plan cannot hold another")
        if prompt is None:
            raise wrong("there is no prompt here, only generate() knows one; use one of the other forms")
        if prompt > length:
            raise wrong(f"the prompt of {prompt} tokens is longer than the text of {length}")
        parts = ((before, prompt), (after, length - prompt))
        return torch.cat([_spec_mask(part, n, chunk, None, shorter) for part, n in parts])
    raise wrong("unknown form")


@dataclass(frozen=True)
class TokenModes:
    """Modes of the s tokens of one call, decided on the host so that only what is read gets computed."""

    runs: tuple[tuple[int, int], ...]
    """Stretches start … stop - 1 in which at least one row attends."""
    recurs: bool
    """Whether some token recurs."""
    rows: Tensor | None = None
    """bool [b, s], true where a token attends, when the rows of the batch differ; else None."""

    @classmethod
    def uniform(cls, attends: bool, length: int) -> TokenModes:
        return cls(((0, length),) if attends and length else (), not attends)

    @classmethod
    def from_mask(cls, mask: Tensor, device: torch.device) -> TokenModes:
        """Of a CPU mask [b, s]."""
        union = mask.any(0)
        edges = torch.diff(union.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
        starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
        same = bool((mask == mask[:1]).all())
        return cls(tuple(zip(starts, stops)), not bool(mask.all()), None if same else mask.to(device))


class SlotPlan:
    """The plan of a whole generation, per slot: slot i is the i-th column of the padded batch, prompt or new."""

    def __init__(self, table_of: Callable[[int], Tensor], device: torch.device, done: int = 0) -> None:
        """`table_of(n)`: bool [b, n + total] on the CPU, with n virtual tokens in front; `done` slots are cached."""
        self.table_of, self.device, self.done = table_of, device, done
        self.virtual = -1
        self.widen(0)

    def widen(self, virtual: int) -> None:
        """Count `virtual` tokens before the prompt, as prompt tuning puts them there."""
        if virtual != self.virtual:
            self.done += virtual - max(self.virtual, 0)
            self.virtual, self.table = virtual, self.table_of(virtual)
            every, some = self.table.all(0).tolist(), self.table.any(0).tolist()
            self.same = [a if a == o else None for a, o in zip(every, some)]

    def modes(self, start: int, stop: int) -> TokenModes | str:
        """Modes of slots start … stop - 1. Plain strings for single tokens: a compiled step then has two variants."""
        if stop - start == 1 and (attends := self.same[start]) is not None:
            return "attention" if attends else "recurrent"
        return TokenModes.from_mask(self.table[:, start:stop], self.device)


@dataclass(frozen=True)
class FirstSlots:
    """The prompt's `tokens` slots, where PEFT may put virtual tokens before them on their way to forward."""

    plan: SlotPlan
    tokens: int

    def modes(self, s: int) -> TokenModes | str:
        """Modes of the s tokens that arrive."""
        self.plan.widen(s - self.tokens)
        return self.plan.modes(0, s)


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


class _TwoStates:
    """What the dynamic and the static layer of the cache share: the recurrent state, the window, and no-KV operation.

    The tensors live where transformers' hybrid layers keep them: `keys`, `values` [b, G, t, ·], `conv_states[0]` (the
    window) and `recurrent_states[0]` (S).
    """

    keep_kv = True
    started = False

    @property
    def window(self) -> Tensor | None:
        return self.conv_states[0] if self.has_previous_state[0] else None

    @property
    def state(self) -> Tensor | None:
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    def advance(self, keys: Tensor | None, values: Tensor | None, window: Tensor | None, state: Tensor | None, n: int):
        """Add `n` tokens: keys and values [b, G, n, ·], new window and state. Returns all keys and values."""
        if window is not None:
            self._store(self.conv_states, self.is_conv_states_initialized, window)
        if state is not None:
            self._store(self.recurrent_states, self.is_recurrent_states_initialized, state)
        self.has_previous_state[0] = True
        self.started = True
        if self.keep_kv:
            return self.update(keys, values)
        self._count(n)
        return keys, values

    def get_max_length(self) -> int:
        return self.max_cache_len if self.keep_kv and hasattr(self, "max_cache_len") else -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices], resize=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, 0), resize=True)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: not out of a recurrent state or a convolution window."""
        fixed = (self.conv_states[0], self.recurrent_states[0])
        return self.keep_kv and not any(x is not None and x.numel() for x in fixed)

    def _tensors(self):
        if self.keep_kv and self.is_initialized:
            yield from ((self.__dict__, "keys"), (self.__dict__, "values"))
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is not None:
                yield states, 0

    def _removed(self, tokens_to_remove: int) -> int:
        """Checked argument of crop: 0 or a negative number, as everywhere in transformers."""
        length, n = int(self.get_seq_length()), -int(tokens_to_remove)
        if n < 0 or n > length:
            raise ValueError(f"OryxCache.crop({tokens_to_remove}): tokens to take back are given as 0 to -{length}")
        if 0 < n < length and not self.is_croppable:
            raise ValueError(
                f"OryxCache.crop({tokens_to_remove}): {n} of {length} tokens cannot be taken back out of a recurrent "
                f"state; crop all {length}, or keep a copy.deepcopy of the cache from before them"
            )
        return n


class OryxDynamicLayer(_TwoStates, LinearAttentionAndFullAttentionLayer):
    """Both states of one layer; keys and values grow with the text."""

    def __init__(self, keep_kv: bool = True, **kwargs) -> None:
        super().__init__()
        self.keep_kv, self.seen = keep_kv, 0

    def _store(self, states: dict, initialized: dict, new: Tensor) -> None:
        states[0], initialized[0] = new, True

    def _count(self, n: int) -> None:
        self.seen += n

    def _apply(self, change: Callable[[Tensor], Tensor], resize: bool = False) -> None:
        for store, name in self._tensors():
            store[name] = change(store[name])

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.keep_kv else self.seen

    def crop(self, tokens_to_remove: int) -> None:
        n = self._removed(tokens_to_remove)
        if n == self.get_seq_length():
            self.reset()
        elif n:
            self.keys, self.values = self.keys[:, :, :-n], self.values[:, :, :-n]

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.keep_kv)


class OryxStaticLayer(_TwoStates, LinearAttentionAndStaticFullAttentionLayer):
    """Both states of one layer at fixed addresses, for compiled steps and CUDA graphs."""

    def __init__(self, max_cache_len: int, keep_kv: bool = True, **kwargs) -> None:
        super().__init__(max_cache_len)
        self.keep_kv = keep_kv

    def _store(self, states: dict, initialized: dict, new: Tensor) -> None:
        if not initialized[0]:
            states[0], initialized[0] = torch.empty_like(new, memory_format=torch.contiguous_format), True
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(states[0])
        states[0].copy_(new)

    def _count(self, n: int) -> None:
        if not self.is_initialized:
            self.cumulative_length = self.cumulative_length.to(
                next(store[name] for store, name in self._tensors()).device
            )
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.cumulative_length)
            self.is_initialized = True
        self.cumulative_length.add_(n)

    def _apply(self, change: Callable[[Tensor], Tensor], resize: bool = False) -> None:
        for store, name in self._tensors():
            if resize:
                store[name] = change(store[name])
            else:
                store[name].copy_(change(store[name]))

    def crop(self, tokens_to_remove: int) -> None:
        n = self._removed(tokens_to_remove)
        if n == int(self.get_seq_length()):
            self.reset()
        else:
            self.cumulative_length.sub_(n)

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        for store, name in self._tensors():
            store[name].zero_()
        self.cumulative_length.zero_()
        self.has_previous_state[0] = self.started = False


class OryxCache(Cache):
    """Keys and values, recurrent state and convolution windows of every layer, always after the same tokens.

    `max_cache_len` gives the static form: fixed addresses and room for that many tokens. `keep_kv=False` keeps no keys
    and values: constant memory, and attention can only read tokens of its own call.
    `crop` raises ValueError where a recurrent state would have to be wound back.
    """

    def __new__(cls, config: OryxConfig | None = None, max_cache_len: int | None = None, *args: Any, **kwargs: Any):
        if cls is OryxCache:
            cls = OryxDynamicCache if max_cache_len is None else OryxStaticCache
        return super().__new__(cls)

    def __init__(
        self, config: OryxConfig, max_cache_len: int | None = None, keep_kv: bool | None = None, **kwargs: Any
    ) -> None:
        keep_kv = config.keep_kv if keep_kv is None else keep_kv
        self.keep_kv = keep_kv and config.has_attention
        if max_cache_len is None:
            layers = [OryxDynamicLayer(self.keep_kv) for _ in range(config.num_hidden_layers)]
        else:
            layers = [OryxStaticLayer(max_cache_len, self.keep_kv) for _ in range(config.num_hidden_layers)]
        Cache.__init__(self, layers=layers, **kwargs)

    @staticmethod
    def of(cache: Cache | None, config: OryxConfig) -> OryxCache | None:
        """`cache`, an empty `DynamicCache(config=…)` or `StaticCache(config=…)` of transformers made into one of these.

        Raises ValueError for any other: what it holds was not computed by this model.
        """
        layers = getattr(cache, "layers", [])
        if cache is None or (layers and all(isinstance(layer, _TwoStates) for layer in layers)):
            return cache
        kind = type(cache)
        why = f"past_key_values is a {kind.__name__}; Oryx needs its own OryxCache(config)"
        if kind not in (DynamicCache, StaticCache) or cache.offloading:
            raise ValueError(why)
        if any(layer.is_initialized for layer in layers):
            raise ValueError(
                f"past_key_values is a {kind.__name__} of keys and values alone; Oryx needs the recurrent state after "
                "them too (of PEFT's methods prompt tuning and p-tuning work, prefix tuning does not)"
            )
        if len(layers) != config.num_hidden_layers:
            raise ValueError(why)
        cache.__class__ = OryxDynamicCache if kind is DynamicCache else OryxStaticCache
        cache.__init__(config, layers[0].max_cache_len if kind is StaticCache else None)
        return cache

    @property
    def started(self) -> bool:
        """Whether it holds tokens already."""
        return any(layer.started for layer in self.layers)


class OryxDynamicCache(OryxCache, DynamicCache):
    """An OryxCache that grows."""


class OryxStaticCache(OryxCache, StaticCache):
    """An OryxCache of fixed size."""

    @property
    def max_cache_len(self) -> int:
        """Tokens that it has room for, -1 without keys and values; PEFT asks for it."""
        return self.get_max_length()


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


class OryxRMSNorm(nn.Module):
    """RMSNorm over the last dimension, with an optional SiLU gate behind it; computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(y.dtype)
        return (y if gate is None else y * F.silu(gate.to(y.dtype))).to(self.weight.dtype)


def rotary_tables(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions [b, s] → cosines and sines [b, s, 1, width] for the rotate-half convention."""
    index = torch.arange(0, width, 2, device=positions.device, dtype=dtype)
    angles = positions.unsqueeze(-1).to(dtype) * base ** (-index / width)
    angles = torch.cat([angles, angles], -1).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [b, s, h, N], all N dimensions."""
    cos, sin = (table.to(device=x.device, dtype=wide(x.dtype)) for table in tables)
    y = x.to(cos.dtype)
    left, right = y.chunk(2, -1)
    return (y * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


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
        place = None
        if valid is not None and s > 1:
            order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
            place = order.argsort(dim=1)[..., None].expand_as(x)
            x = x.gather(1, order[..., None].expand_as(x))
        x = x.transpose(1, 2)
        first = x.new_zeros(*x.shape[:2], w - 1) if window is None else window
        full = torch.cat([first.to(x.dtype), x], -1)
        if self.kernels and causal_conv1d_fn is not None and x.is_cuda and window is None and 2 <= w <= 4 and s > 1:
            y = causal_conv1d_fn(x, self.weight, None, activation=self.activation)
        else:
            exact, taps = (y.to(wide(full.dtype)) for y in (full, self.weight))
            y = sum(exact[..., i : i + s] * taps[:, i, None] for i in range(w))
            y = (F.silu(y) if self.activation else y).to(full.dtype)
        if valid is None:
            window = full[..., s:]
        else:
            last = valid.sum(1)[:, None] + torch.arange(w - 1, device=x.device)
            window = full.gather(2, last[:, None].expand(-1, full.shape[1], -1))
        y = y.transpose(1, 2)
        return (y if place is None else y.gather(1, place)), window


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out: query [b, H, s, N], key and value [b, G, t, ·], additive mask → [b, s, H, P], weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=wide(scores.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


@dataclass
class OryxContext:
    """What all layers of one call share."""

    modes: TokenModes
    masks: tuple[Any, ...] = ()
    """Attention mask of each of `modes.runs`, in the form the attention implementation wants."""
    key_counts: tuple[int | None, ...] = ()
    """Keys each run may see, counted from the first; None: all."""
    rotary: tuple[Tensor, Tensor] | None = None
    valid: Tensor | None = None
    """bool [b, s], false for padding; None when there is none."""
    output_attentions: bool = False


class OryxMixer(nn.Module):
    """One layer's mixer: shared keys and values, an attention query and a recurrent query."""

    def __init__(self, config: OryxConfig) -> None:
        super().__init__()
        self.config = config
        d, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        n, p = config.head_dim, config.value_head_dim
        self.num_key_value_groups = heads // groups
        self.is_causal, self.scaling = True, n**-0.5
        self.widths = [groups * n, groups * p]
        self.kernels = config.kernels == "auto"

        def linear(width: int) -> nn.Linear:
            return nn.Linear(d, width, bias=False)

        self.k_proj, self.v_proj = linear(groups * n), linear(groups * p)
        if config.shared_query:
            self.q_proj = linear(heads * n)
        elif config.has_attention:
            self.q_attention_proj = linear(heads * n)
        if config.has_recurrence and not config.shared_query:
            self.q_recurrent_proj = linear(heads * n)
        self.gate_proj = linear(heads * p) if config.output_gate else None
        activation = "silu" if config.mixer == "gdn" else None
        self.conv = (
            OryxShortConv(sum(self.widths), config.conv_width, activation, self.kernels) if config.conv_width else None
        )
        if config.has_attention and config.qk_norm:
            self.query_norm, self.key_norm = OryxRMSNorm(n, config.rms_norm_eps), OryxRMSNorm(n, config.rms_norm_eps)
        if config.has_recurrence:
            self.decay_proj = linear(heads * (2 if config.mixer == "gdn" else 1))
            # fp32 in a half-precision model too: `from_config` builds it under torch's default dtype.
            exact = wide(torch.get_default_dtype())
            for name in config.fp32_parameters:
                self.register_parameter(name, nn.Parameter(torch.empty(heads, dtype=exact)))
        self.out_norm = OryxRMSNorm(p, config.rms_norm_eps)
        self.out_proj = nn.Linear(heads * p, d, bias=False)
        self.out_proj.residual = True

    def forward(self, x: Tensor, context: OryxContext, layer: _TwoStates | None = None) -> tuple[Tensor, Tensor | None]:
        """x [b, s, d] → [b, s, d], and when asked for attention weights [b, H, s, t], zero for recurrent tokens.

        `layer` holds this layer's states of earlier tokens and is advanced.
        """
        config, modes = self.config, context.modes
        valid = None if context.valid is None else context.valid.to(x.device)
        kv = torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        window = state = None
        if self.conv is not None:
            kv, window = self.conv(kv, None if layer is None else layer.window, valid)
        k, v = (y.unflatten(-1, (config.num_key_value_heads, -1)) for y in kv.split(self.widths, -1))

        recurrent = None
        if config.has_recurrence and (modes.recurs or layer is not None):
            state = None if layer is None else layer.state
            recurrent, state = self._recur(x, k, v, state, valid, context)
        attended, weights = [], []
        k_a = v_a = None
        if config.has_attention and (modes.runs or (layer is not None and layer.keep_kv)):
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
        project = self.q_proj if self.config.shared_query else getattr(self, f"q_{mode}_proj")
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
        if config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
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
        self, x: Tensor, k: Tensor, v: Tensor, state: Tensor | None, valid: Tensor | None, context: OryxContext
    ) -> tuple[Tensor | None, Tensor]:
        """Recurrence over all tokens; the output [b, s, H, P] only when some token reads it."""
        config = self.config
        dtype = v.dtype
        q = self._query(x, "recurrent") if context.modes.recurs else None
        if config.rotary == "both":
            k = rotate(k, context.rotary)
            q = None if q is None else rotate(q, context.rotary)
        raw = self.decay_proj(x)
        fast = self.kernels and x.is_cuda and x.shape[1] > 1 and dtype in (torch.bfloat16, torch.float16)
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
            o, state = ssd(q, k, v, decay, dt, initial=state, chunk=config.recurrence_chunk)
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
        o, state = gated_delta_rule(q, unit(k), v, decay, beta, initial=state, chunk=config.recurrence_chunk)
        return (None if o is None else o.to(dtype)), state

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
        if self.config.has_attention and not attended:
            unused += ["q_attention_proj", "query_norm", "key_norm"]
        if self.config.has_recurrence and not recurred:
            unused += ["q_recurrent_proj", "decay_proj", "a_log", "dt_bias", "d_skip"]
        zero = self.out_proj.weight.new_zeros(())
        for name, parameter in self.named_parameters():
            if name.split(".")[0] in unused:
                zero = zero + 0.0 * parameter.sum().to(zero)
        return zero


class OryxMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: OryxConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.residual = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OryxDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: mixer, then SwiGLU."""

    def __init__(self, config: OryxConfig) -> None:
        super().__init__()
        self.input_layernorm = OryxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = OryxMixer(config)
        self.pre_mlp_layernorm = OryxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = OryxMLP(config)

    def forward(self, x: Tensor, context: OryxContext, layer: _TwoStates | None = None) -> Tensor:
        return self.block(x, context, layer)

    def block(self, x: Tensor, context: OryxContext, layer: _TwoStates | None) -> Tensor:
        """What `forward` does; apart from it so that it can be compiled without transformers' wrapping of `forward`."""
        x = x + self.mixer(self.input_layernorm(x), context, layer)[0]
        return x + self.mlp(self.pre_mlp_layernorm(x))


@functools.cache
def compiled_block() -> Callable[..., Tensor]:
    """`OryxDecoderLayer.block` through torch.compile, for steps of single tokens."""
    return torch.compile(OryxDecoderLayer.block)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What collators for packed documents give beside position_ids that restart, which say it all."""
NO_MATTER = ("output_hidden_states", "return_dict", "token_type_ids")
"""The first two are read by transformers' wrappers of `forward`; there is one type of token."""
AS_ALWAYS = {"is_causal": (None, True), "output_router_logits": (None, False)}
"""Arguments whose other values ask for what Oryx has not."""


def _check_arguments(name: str, kwargs: dict[str, Any], may_be_packed: bool) -> None:
    """Raise for what `forward` was given beside its own arguments and will not do: nothing is dropped in silence."""
    for key, value in kwargs.items():
        if key in NO_MATTER or value is None:
            continue
        if key in PACKING_ARGUMENTS:
            if not may_be_packed:
                raise ValueError(
                    f"{name}: {key} is of packed documents; they are marked by position_ids that restart, and take no "
                    "attention_mask and no cache"
                )
        elif key not in AS_ALWAYS:
            raise TypeError(f"{name}.forward() got an unexpected keyword argument '{key}'")
        elif value not in AS_ALWAYS[key]:
            raise ValueError(f"{name} cannot do {key}={value}")


def _one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


class OryxPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: OryxConfig
    config_class = OryxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OryxDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache", "context"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": OryxDecoderLayer, "attentions": OryxMixer}  # noqa: RUF012

    def __init__(self, config: OryxConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._keep_in_fp32_modules_strict = set(config.fp32_parameters)
        check_default_plan(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config, std = self.config, self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            # Residual branches start small: std / sqrt(2 layers).
            small = getattr(module, "residual", False)
            init.normal_(module.weight, 0.0, std / (2 * config.num_hidden_layers) ** 0.5 if small else std)
        elif isinstance(module, OryxRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, OryxShortConv):
            bound = module.weight.shape[1] ** -0.5  # torch's own default for a depthwise convolution
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, OryxMixer) and config.has_recurrence:
            a = torch.empty_like(module.a_log, dtype=torch.float32).uniform_(*config.decay_init)
            init.copy_(module.a_log, a.log())
            low, high = torch.tensor(config.dt_init).log().tolist()
            dt = torch.empty_like(module.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            if config.mixer == "mamba2":
                init.ones_(module.d_skip)


class OryxModel(OryxPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: OryxConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OryxDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = OryxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.compiled = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mode_plan: ModePlan | TokenModes | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of input_ids [b, s] or inputs_embeds [b, s, d].

        attention_mask [b, t], over the cached tokens too, is false for padding, which enters neither attention nor
        recurrence nor convolution, wherever it stands. `mode_plan` is a spec or function over the real tokens of each
        row up to the end of this call, or a mask [s] or [b, s] over the tokens of this call; default
        `config.default_plan`. Without mask and cache, `position_ids` that restart mark packed documents, which are kept
        apart. `past_key_values` and `cache` are two names of one argument. Raises ValueError with one line on what does
        not fit, TypeError for an argument that is not known here.
        """
        cache = _one_cache(past_key_values, cache)
        _check_arguments("OryxModel", kwargs, position_ids is not None and attention_mask is None and cache is None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, s = x.shape[:2]
        if s == 0:
            raise ValueError("the text is empty: input_ids need at least one token")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("gradient checkpointing recomputes layers and cannot go on from past_key_values")
            use_cache = False
        if attention_mask is None and position_ids is not None and cache is None and s > 1:
            starts = (position_ids.diff(dim=1) != 1) & (position_ids[:, 1:] == 0)
            if torch.compiler.is_exporting():  # one graph for all texts, without a branch: it checks itself
                torch._assert_async(~starts.any(), "an exported Oryx takes no packed documents: position_ids restart")
            elif bool(starts.any()):  # under torch.compile the graph ends here; with fullgraph=True this is an error
                return self._forward_packed(x, starts.expand(b, -1), mode_plan, output_attentions)
        if cache is None and use_cache:
            cache = OryxCache(self.config)
        cache = OryxCache.of(cache, self.config)

        past, slots = 0, None
        static = cache is not None and cache.layers[0].is_compileable
        if cache is not None and cache.started:
            past = cache.get_seq_length()
        if static:
            # A tensor on the device; reading it on the host is left to calls of several tokens.
            past = int(past) if s > 1 else past
            slots = torch.arange(s, device=x.device) + past
            limit = cache.get_max_length()
            if limit >= 0 and isinstance(past, int) and past + s > limit:
                raise ValueError(f"the static cache has room for {limit} tokens, not for {past} + {s}")
        mask, valid = self._padding(attention_mask, b, s, past, slots, cache)
        if position_ids is None:
            if mask is None:
                position_ids = (torch.arange(s, device=x.device) + past)[None]
            else:
                count = mask.long().cumsum(1) - 1
                position_ids = (count[:, -s:] if slots is None else count[:, slots]).clamp(min=0)
        if mode_plan is None and attention_mask is None and b > 1 and s > 1 and not self.training:
            plan = self.config.default_plan
            if (counted := re.match(r"\s*(prompt:)?\s*last:", plan)) is not None:
                why = (
                    f"mode plan `{plan}` counts from the end of each text, and no attention_mask says where the {b} "
                    "texts of this batch end; give one, or one text per call (lm-eval: --batch_size 1)"
                )
                if counted[1] is None:  # lm-eval scores so: modes, and scores, would depend on the batch size
                    raise ValueError(why)
                logger.warning_once(why)
        modes = self._modes(mode_plan, mask, valid, past, slots, b, s, x.device)
        if modes.runs and cache is not None and not cache.layers[0].keep_kv and cache.started:
            raise ValueError(
                "keep_kv=False: the keys and values that attention would read were dropped; use recurrent mode"
            )
        if isinstance(s, torch.SymInt) and torch.compiler.is_exporting() and (modes.recurs or cache is not None):
            raise ValueError(
                "torch.export with a dynamic length: the recurrence loops over its chunks as often as the text it is "
                "exported with needs; export one length, or use_cache=False and mode_plan='attention'"
            )
        masks, key_counts = self._masks(modes, mask, past, slots, cache, x)
        rotary = None
        if self.config.rotary != "none":
            rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rotary_base, wide(x.dtype))
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"`{self.config._attn_implementation}` attention keeps no weights: output_attentions=True gives none; "
                "use attn_implementation='eager'"
            )
            output_attentions = False
        context = OryxContext(modes, masks, key_counts, rotary, valid, bool(output_attentions))
        for i, layer in enumerate(self.layers):
            memory = None if cache is None else cache.layers[i]
            # One compiled block serves all layers: nothing in it depends on which layer it is.
            x = layer(x, context, memory) if not self.compiled else compiled_block()(layer, x, context, memory)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache if use_cache else None})

    def _forward_packed(
        self, x: Tensor, starts: Tensor, plan: ModePlan | TokenModes | None, output_attentions: bool | None
    ) -> BaseModelOutputWithPast:
        """Documents packed into rows, unpacked into one row each, and put back."""
        b, s = x.shape[:2]
        if isinstance(plan, TokenModes) or output_attentions:
            raise ValueError("packed documents take a mode plan as spec, function or mask, and no output_attentions")
        first = torch.cat([starts.new_ones(b, 1), starts], 1).flatten()
        document = first.long().cumsum(0) - 1
        offset = torch.arange(b * s, device=x.device) - first.nonzero().flatten()[document]
        shape = (int(document[-1]) + 1, int(offset.max()) + 1)
        rows = x.new_zeros(*shape, x.shape[-1]).index_put((document, offset), x.flatten(0, 1))
        valid = torch.zeros(shape, dtype=torch.bool, device=x.device)
        valid[document, offset] = True
        if plan is not None and not isinstance(plan, str) and not callable(plan):
            flat = self._token_mask(plan, b, s).to(x.device).flatten()
            plan = torch.zeros_like(valid)
            plan[document, offset] = flat
        out = self(inputs_embeds=rows, attention_mask=valid, use_cache=False, mode_plan=plan)
        return BaseModelOutputWithPast(last_hidden_state=out.last_hidden_state[document, offset].unflatten(0, (b, s)))

    @staticmethod
    def _padding(
        attention_mask: Tensor | None, b: int, s: int, past: int | Tensor, slots: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask over all cache slots, bool [b, t], and over this call's tokens [b, s]; None without padding."""
        if attention_mask is None:
            return None, None
        if attention_mask.dim() != 2 or attention_mask.shape[0] != b:
            raise ValueError(
                f"attention_mask of shape {list(attention_mask.shape)}: Oryx needs [{b}, tokens so far], false for "
                "padding; a recurrence cannot follow a mask of pairs (position_ids that restart mark packed documents)"
            )
        mask = attention_mask.bool()
        limit = cache.get_max_length() if slots is not None else -1
        if limit >= 0 and mask.shape[1] < limit:
            mask = F.pad(mask, (0, limit - mask.shape[1]), value=True)  # what lies ahead, causality hides
        if isinstance(past, int) and mask.shape[1] not in (past + s, limit):
            raise ValueError(f"attention_mask covers {mask.shape[1]} tokens, not {past} cached ones and {s} new ones")
        if s > 1 and not torch.compiler.is_compiling() and bool(mask.all()):
            return None, None
        valid = mask[:, -s:] if slots is None or mask.shape[1] != limit else mask[:, slots]
        return mask, valid

    @staticmethod
    def _token_mask(plan: Any, b: int, s: int) -> Tensor:
        """A mask over this call's tokens, [s] or [b, s] → CPU bool [b, s]."""
        mask = plan if isinstance(plan, Tensor) else torch.as_tensor(plan)
        mask = mask.detach().to("cpu").bool()
        if mask.shape not in ((s,), (b, s)):
            raise ValueError(f"mode plan of shape {list(mask.shape)} does not fit {s} tokens in {b} rows")
        return mask.expand(b, s)

    def _modes(
        self,
        plan: ModePlan | TokenModes | None,
        mask: Tensor | None,
        valid: Tensor | None,
        past: int | Tensor,
        slots: Tensor | None,
        b: int,
        s: int,
        device: torch.device,
    ) -> TokenModes:
        """Modes of this call's tokens. To the default plan `prompt:PLAN,new:PLAN` they are all prompt."""
        by_default = plan is None
        if isinstance(plan, FirstSlots):
            plan = plan.modes(s)
        elif plan is None:
            plan = self.config.default_plan
            if plan.startswith("prompt:"):
                check_default_plan(self.config)  # it may have been set since
                plan = plan.removeprefix("prompt:").partition(",new:")[0].strip()
        if isinstance(plan, TokenModes):
            modes = plan
        elif isinstance(plan, str) and plan in ("attention", "recurrent"):
            modes = TokenModes.uniform(plan == "attention", s)
        elif torch.compiler.is_exporting():
            raise ValueError(
                f"mode plan `{plan if isinstance(plan, str) else 'of a function or mask'}` under torch.export: which "
                "tokens attend is decided on the host; export with mode_plan='attention' or 'recurrent'"
            )
        elif isinstance(plan, str) or callable(plan):
            chunk = self.config.mode_chunk
            if mask is None:
                n = int(past) + s
                rows = plan_mask(plan, n, chunk=chunk, shorter=by_default)[None, -s:]
            else:
                real = mask if slots is None else mask[:, : int(past) + s]
                index = (real.long().cumsum(1) - 1)[:, -s:].clamp(min=0).cpu()
                lengths = {n for n in real.sum(1).tolist() if n}
                tables = {n: plan_mask(plan, n, chunk=chunk, shorter=by_default) for n in lengths}
                tables[0] = torch.zeros(1, dtype=torch.bool)
                rows = torch.stack([tables[n][i] for n, i in zip(real.sum(1).tolist(), index)])
            modes = TokenModes.from_mask(rows, device)
        else:
            modes = TokenModes.from_mask(self._token_mask(plan, b, s), device)
        if modes.runs and not self.config.has_attention:
            raise ValueError("the mode plan asks for attention, but this model has recurrent mode only")
        if modes.recurs and not self.config.has_recurrence:
            raise ValueError("the mode plan asks for recurrence, but this model has attention mode only")
        return modes

    def _masks(
        self,
        modes: TokenModes,
        mask: Tensor | None,
        past: int | Tensor,
        slots: Tensor | None,
        cache: Cache | None,
        x: Tensor,
    ) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
        """Attention mask of each run, and how many keys it is over."""
        name = self.config._attn_implementation
        if not modes.runs or name not in ALL_MASK_ATTENTION_FUNCTIONS:
            return (None,) * len(modes.runs), (None,) * len(modes.runs)
        make = ALL_MASK_ATTENTION_FUNCTIONS[name]
        masks, counts = [], []
        for start, stop in modes.runs:
            if isinstance(past, int):
                keys, count = past + stop, past + stop
            else:  # one token, somewhere in a static cache
                keys, count = cache.get_max_length(), None
            seen = None if mask is None else mask[:, :keys]
            if count is None and "flash" in name:  # which takes no causal mask, but drops keys marked as padding
                ahead = torch.arange(keys, device=x.device) > past
                seen = ~ahead.expand(x.shape[0], -1) if seen is None else seen & ~ahead
            masks.append(
                make(
                    batch_size=x.shape[0],
                    q_length=stop - start,
                    kv_length=keys,
                    q_offset=past + start,
                    kv_offset=0,
                    mask_function=causal_mask_function,
                    attention_mask=seen,
                    allow_is_causal_skip=count is not None,
                    dtype=x.dtype,
                    config=self.config,
                    device=x.device,
                )
            )
            counts.append(count)
        return tuple(masks), tuple(counts)


class OryxForCausalLM(OryxPreTrainedModel, GenerationMixin):
    """Language model; `generate` takes `mode_plan` and `keep_kv` beside its usual arguments."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies this file into the folder

    def __init__(self, config: OryxConfig) -> None:
        super().__init__(config)
        self.model = OryxModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        mode_plan: ModePlan | TokenModes | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, vocabulary], and with `labels` [b, s] (-100: ignored) the next-token loss.

        Arguments and errors as in `OryxModel.forward`; `logits_to_keep` last tokens (0: all), or the tokens it indexes.
        The loss takes transformers' `num_items_in_batch`, `ignore_index` and `shift_labels` too.
        """
        of_loss = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        if output_hidden_states is not None:
            kwargs["output_hidden_states"] = output_hidden_states
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mode_plan=mode_plan,
            cache=_one_cache(past_key_values, cache),
            output_attentions=output_attentions if output_attentions is not None else self.config.output_attentions,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        x = outputs.last_hidden_state
        logits = self.lm_head(x if isinstance(kept, int) else x[:, kept])
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        cache = _one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        return super().generate(*args, **kwargs, **({} if cache is None else {CACHE: cache}))

    # Generation. transformers' generate calls these three on its way; the plan is resolved once, when prompt and
    # number of new tokens are known, and each step gets the modes of its own tokens.

    def _prepare_generated_length(self, generation_config, *args: Any, **kwargs: Any):
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        generation_config._new_tokens = generation_config.max_length - kwargs["input_ids_length"]
        return generation_config

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        """Make the OryxCache, and the SlotPlan of prompt and new tokens."""
        cache = OryxCache.of(model_kwargs.get(CACHE), self.config)
        generation_config._cache_is_the_callers = cache is not None
        keep_kv = getattr(cache, "keep_kv", self.config.keep_kv)
        keep_kv = _setting("keep_kv", model_kwargs, generation_config, keep_kv)
        given = model_kwargs.get("mode_plan") is not None
        plan = _setting("mode_plan", model_kwargs, generation_config, self.config.default_plan)
        positions, mask = model_kwargs["position_ids"], model_kwargs.get("attention_mask")
        prompt, new = positions.shape[-1], generation_config._new_tokens

        def table_of(virtual: int) -> Tensor:
            real = torch.ones(1, prompt, dtype=torch.bool) if mask is None else mask.bool().cpu()
            real = F.pad(real, (virtual, 0), value=True)
            lengths = real.sum(1).tolist()
            tables = {
                n: plan_mask(plan, n + new, chunk=self.config.mode_chunk, prompt=n, shorter=not given)
                for n in sorted(set(lengths))
            }
            index = F.pad(real, (0, new), value=True).long().cumsum(1) - 1
            return torch.stack([tables[n][i] for n, i in zip(lengths, index.clamp(min=0))])

        slots = SlotPlan(table_of, positions.device, 0 if cache is None else int(cache.get_seq_length()))
        # The last new token is never read.
        if not keep_kv and bool(slots.table[:, prompt : prompt + new - 1].any()):
            raise ValueError(
                "keep_kv=False with attention: the mode plan reads new tokens by attention, which needs the keys and "
                "values of earlier ones; keep them, or use a plan like prompt:attention,new:recurrent"
            )
        model_kwargs["mode_plan"] = slots
        if generation_config.use_cache is False or cache is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation `{kind}`: Oryx has `dynamic` and `static`")
        room = None
        if kind == "static":
            # As long as ever asked for, so that a shorter text runs what is compiled; the last new token is never read.
            room = max(
                prompt + new - 1,
                getattr(generation_config, "max_cache_len", None) or 0,
                getattr(self, "_previous_max_cache_length", 0),
            )
            self._previous_max_cache_length = room
        model_kwargs[CACHE] = OryxCache(self.config, room, keep_kv)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        mode_plan: SlotPlan | None = None,
        keep_kv: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict:
        """Arguments of the next forward call, with the modes of its tokens."""
        cache = _one_cache(past_key_values, cache)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if isinstance(mode_plan, SlotPlan):
            tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            # Counted here on the host: a static cache has its length on the device.
            start = 0 if cache is None else mode_plan.done
            mode_plan.done = start + tokens.shape[1]
            # PEFT stands in for this method, calls it, and then adds its tokens.
            wrapped = start == 0 and "prepare_inputs_for_generation" in self.__dict__
            modes = FirstSlots(mode_plan, mode_plan.done) if wrapped else mode_plan.modes(start, mode_plan.done)
            inputs["mode_plan"] = modes
        elif mode_plan is not None:
            inputs["mode_plan"] = mode_plan
        return inputs

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs: Any,
    ):
        """Greedy decoding and sampling; with a static cache the host never waits for the device in between.

        transformers' own loop, which asks the device after every token whether to stop, serves where something looks
        at the text as it grows: streamers, returned scores, other stopping criteria than length and end-of-text.
        """
        cache = model_kwargs.get(CACHE)
        plain = all(isinstance(criterion, MaxLengthCriteria | EosTokenCriteria) for criterion in stopping_criteria)
        in_graph = self.config._attn_implementation in ("eager", "sdpa")  # the others read the device on the host
        if not (
            plain
            and in_graph
            and isinstance(model_kwargs.get("mode_plan"), SlotPlan)
            and isinstance(cache, OryxCache)
            and cache.layers[0].is_compileable
            and streamer is None
            and not synced_gpus
            and not generation_config.return_dict_in_generate
        ):
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        positions = model_kwargs["position_ids"][:, -1:] + 1
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        mask = None
        if cache.keep_kv and model_kwargs.get("attention_mask") is not None:
            mask = self.create_masks_for_generate(model_kwargs["attention_mask"], cache).bool()
        decoder = OryxDecoder(self, cache, positions.expand(input_ids.shape[0], 1), mask)
        return _decode(decoder, outputs.logits[:, -1], input_ids, logits_processor, generation_config, model_kwargs)

    def create_masks_for_generate(
        self, attention_mask: Tensor | None, past_key_values: Cache | None = None, cache: Cache | None = None, **_: Any
    ):
        """The 2D mask, as wide as a static cache: a compiled step sees one shape."""
        limit = _one_cache(past_key_values, cache).get_max_length()
        if attention_mask is None or attention_mask.shape[1] >= limit:
            return attention_mask
        return F.pad(attention_mask, (0, limit - attention_mask.shape[1]), value=1)


class OryxDecoder:
    """Steps of one token over a static cache: compiled, and on a GPU replayed as CUDA graphs, one per kind of step.

    The kinds are: every row attends, every row recurs, rows differ. The first two steps of a kind run as they are
    (they compile and choose kernels), the third is recorded; so short texts pay for nothing they do not use.
    """

    def __init__(self, model: OryxForCausalLM, cache: OryxCache, positions: Tensor, mask: Tensor | None = None) -> None:
        """`positions` [b, 1] of the next tokens; `mask` [b, room], false for padding, or None."""
        self.model, self.cache, self.mask = model, cache, mask
        self.positions = positions.clone()
        self.tokens = torch.zeros_like(self.positions)
        self.rows = torch.zeros_like(self.positions, dtype=torch.bool)
        self.seen: dict[str, int] = {}
        self.graphs: dict[str, tuple[Any, Tensor]] = {}

    @torch.no_grad()
    def step(self, tokens: Tensor, modes: TokenModes | str) -> Tensor:
        """Logits [b, vocabulary] after tokens [b]; overwritten by the next step."""
        kind = modes if isinstance(modes, str) else "rows"
        self.tokens.copy_(tokens[:, None])
        if not isinstance(modes, str):
            rows = modes.rows
            self.rows.copy_(torch.full_like(self.rows, not modes.recurs) if rows is None else rows)
        self.seen[kind] = self.seen.get(kind, 0) + 1
        if kind not in self.graphs and self.tokens.is_cuda and self.seen[kind] > 2:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward(kind)
            self.graphs[kind] = graph, logits
        if kind in self.graphs:
            graph, logits = self.graphs[kind]
            graph.replay()
            return logits
        return self._forward(kind)

    def _forward(self, kind: str) -> Tensor:
        base = self.model.model
        base.compiled = self.tokens.is_cuda
        try:
            out = self.model(
                input_ids=self.tokens,
                attention_mask=self.mask,
                position_ids=self.positions,
                cache=self.cache,
                use_cache=True,
                mode_plan=kind if kind != "rows" else TokenModes(((0, 1),), True, self.rows),
            )
        finally:
            base.compiled = False
        self.positions.add_(1)
        return out.logits[:, -1]


@torch.no_grad()
def _decode(
    decoder: OryxDecoder,
    logits: Tensor,
    input_ids: Tensor,
    logits_processor,
    generation_config,
    model_kwargs: dict,
    period: int = 16,
) -> Tensor:
    """The loop over new tokens. End-of-text is looked for every `period` tokens, in a copy made one period before.

    A cache that the caller keeps may not run ahead of the text, so there it is looked for after every token.
    """
    plan: SlotPlan = model_kwargs["mode_plan"]
    eos, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    b, start = input_ids.shape
    length = generation_config.max_length
    offset = plan.done - start  # slots that are in the cache but not in input_ids
    text = input_ids.new_zeros(b, length)
    text[:, :start] = input_ids
    going = torch.ones(b, dtype=torch.bool, device=text.device)
    exact = generation_config._cache_is_the_callers
    watch = _Watch(text.device)
    end = start
    while True:
        scores = logits_processor(text[:, :end], logits.to(torch.float32, copy=True))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if eos is not None:
            tokens = torch.where(going, tokens, pad)
            going = going & (tokens[:, None] != eos).all(1)
        text[:, end] = tokens
        end += 1
        if end == length:
            break
        if eos is not None and exact and not bool(going.any()):
            break
        if eos is not None and not exact and (end - start) % period == 0 and watch.finished(going):
            break
        logits = decoder.step(tokens, plan.modes(offset + end - 1, offset + end))
    if eos is not None:
        # Rows are padded after their end; what all rows had ended before is cut off.
        ended = (text[:, start:end, None] == eos).any(2)
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, end - start)
        end = start + int(first.max())
    return text[:, :end]


class _Watch:
    """Whether all rows ended, as it was when last asked: the copy to the host runs beside the steps."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flag = torch.zeros((), dtype=torch.bool, pin_memory=self.cuda)
        self.copied: Any = None

    def finished(self, going: Tensor) -> bool:
        if not self.cuda:
            return not bool(going.any())
        done = self.copied is not None and self.copied.query() and bool(self.flag)
        self.flag.copy_(~going.any(), non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record()
        return done


def _setting(name: str, model_kwargs: dict, generation_config: Any, default: Any) -> Any:
    """An argument of generate, an entry of the generation config, or the model's default."""
    value = model_kwargs.pop(name, None)
    value = getattr(generation_config, name, None) if value is None else value
    return default if value is None else value


__all__ = ["OryxCache", "OryxDecoder", "OryxForCausalLM", "OryxModel", "OryxPreTrainedModel", "plan_mask"]
