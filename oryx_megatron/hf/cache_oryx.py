"""The cache of transformers' `generate` for Oryx: both states of every layer, growing or at fixed addresses.

Shapes: b batch, t tokens so far, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    StaticCache,
)

from .configuration_oryx import OryxConfig
from .router_oryx import RouterState
from .states_oryx import TwoStates


class _OfTransformers(TwoStates):
    """What the dynamic and the static layer share.

    The tensors live where transformers' hybrid layers keep them: `keys`, `values` [b, G, t, ·], `conv_states[0]` (the
    window) and `recurrent_states[0]` (S).
    """

    @property
    def window(self) -> Tensor | None:
        return self.conv_states[0] if self.has_previous_state[0] else None

    @property
    def recurrent(self) -> Tensor | None:
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    def advance(self, *args: Any) -> tuple[Tensor | None, Tensor | None]:
        self.has_previous_state[0] = True
        return super().advance(*args)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.update(keys, values)

    def _store(self, name: str, new: Tensor) -> None:
        if name == "window":
            self._replace(self.conv_states, self.is_conv_states_initialized, new)
        else:
            self._replace(self.recurrent_states, self.is_recurrent_states_initialized, new)

    def get_max_length(self) -> int:
        return self.max_cache_len if self.keep_kv and hasattr(self, "max_cache_len") else -1

    def _tensors(self) -> Iterator[tuple[Any, Any]]:
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


class OryxDynamicLayer(_OfTransformers, LinearAttentionAndFullAttentionLayer):
    """Both states of one layer; keys and values grow with the text."""

    def __init__(self, keep_kv: bool = True, **kwargs) -> None:
        super().__init__()
        self.keep_kv, self.seen = keep_kv, 0

    def _replace(self, states: dict, initialized: dict, new: Tensor) -> None:
        states[0], initialized[0] = new, True

    def _count(self, n: int) -> None:
        self.seen += n

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.keep_kv else self.seen

    def _drop(self, n: int) -> None:
        if self.keep_kv:
            self.keys, self.values = self.keys[:, :, :-n], self.values[:, :, :-n]
        else:
            self.seen -= n

    def crop(self, tokens_to_remove: int) -> None:
        n = self._removed(tokens_to_remove)
        if n == self.get_seq_length():
            self.reset()
        elif n:
            self._drop(n)

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.keep_kv)


class OryxStaticLayer(_OfTransformers, LinearAttentionAndStaticFullAttentionLayer):
    """Both states of one layer at fixed addresses, for compiled steps and CUDA graphs."""

    def __init__(self, max_cache_len: int, keep_kv: bool = True, **kwargs) -> None:
        super().__init__(max_cache_len)
        self.keep_kv = keep_kv

    def _replace(self, states: dict, initialized: dict, new: Tensor) -> None:
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
            self._drop(n)

    def _drop(self, n: int) -> None:
        self.cumulative_length.sub_(n)

    def mark(self) -> None:
        """The states' memory is written over: what is kept of them is a copy."""
        self.trail = [tuple(None if x is None else x.clone() for x in (self.window, self.recurrent))]

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        for store, name in self._tensors():
            store[name].zero_()
        self.cumulative_length.zero_()
        self.has_previous_state[0] = self.started = False


class OryxCache(Cache):
    """Keys and values, recurrent state and convolution windows of every layer, always after the same tokens.

    A layer of one mode keeps what that mode reads.

    `max_cache_len` gives the static form: fixed addresses and room for that many tokens. `keep_kv=False` keeps no keys
    and values: constant memory, and attention can only read tokens of its own call.
    `crop` raises ValueError where a recurrent state would have to be rolled back.
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
        kept = [keep_kv and config.modes_of(i) != "recurrent" for i in range(config.num_hidden_layers)]
        if max_cache_len is None:
            layers = [OryxDynamicLayer(keep) for keep in kept]
        else:
            layers = [OryxStaticLayer(max_cache_len, keep) for keep in kept]
        Cache.__init__(self, layers=layers, **kwargs)

    @staticmethod
    def of(cache: Cache | None, config: OryxConfig) -> OryxCache | None:
        """`cache`, an empty `DynamicCache(config=…)` or `StaticCache(config=…)` of transformers made into one of these.

        Raises ValueError for any other: what it holds was not computed by this model.
        """
        layers = getattr(cache, "layers", [])
        if cache is None or (layers and all(isinstance(layer, TwoStates) for layer in layers)):
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

    router: RouterState | None = None
    """Of the tokens that it holds, when a router chose the modes of all of them."""

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that it has room for; -1 where nothing limits them. Layers without keys and values have no limit."""
        layers = self.layers if layer_idx is None else [self.layers[layer_idx]]
        return max([layer.get_max_length() for layer in layers] or [-1])  # dynamo knows no max(default=)

    @property
    def started(self) -> bool:
        """Whether it holds tokens already."""
        return any(layer.started for layer in self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See Cache."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See Cache."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See Cache."""
        super().batch_repeat_interleave(repeats)
        if self.router is not None:
            self._select(torch.arange(len(self.router.history)).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """See Cache; a router's state goes with the tokens: all of them or none."""
        super().crop(*args, **kwargs)
        if not self.started:
            self.router = None

    def reset(self) -> None:
        """See Cache."""
        super().reset()
        self.router = None

    def _select(self, rows: Tensor) -> None:
        if self.router is not None:
            self.router = self.router.select(rows.to(self.router.history.device))


class OryxDynamicCache(OryxCache, DynamicCache):
    """An OryxCache that grows."""


class OryxStaticCache(OryxCache, StaticCache):
    """An OryxCache of fixed size."""

    @property
    def max_cache_len(self) -> int:
        """Tokens that it has room for, -1 without keys and values; PEFT asks for it."""
        return self.get_max_length()
