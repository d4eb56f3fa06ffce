"""Both states of a layer, always after the same tokens: keys and values, and the recurrent state with its window.

Torch only: training decodes with `LayerState`, an export with transformers' layers (cache_oryx.py).

Shapes: b batch, t tokens so far, G key/value heads, H heads, N key width, P value width, c channels, w taps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class TwoStates(ABC):
    """The rule of a layer's states: they advance together, at every token, whatever its mode (docs/model.md).

    A recurrent state cannot be rolled back: tokens are taken back all or none, but for those after `mark`, of which
    every state is kept.
    """

    keep_kv = True
    """False: keys and values are not kept; memory does not grow, and attention reads its own call alone."""
    started = False
    """Whether there are tokens."""
    window: Tensor | None
    """Inputs of the convolution at the last w − 1 tokens, [b, c, w − 1]."""
    recurrent: Tensor | None
    """S, [b, H, N, P] fp32."""

    trail: list[tuple[Tensor | None, Tensor | None]] | None = None
    """After `mark`: window and S before the first and after every token since; a mixer adds to it before `advance`."""

    def mark(self) -> None:
        """From now on tokens can be taken back."""
        self.trail = [(self.window, self.recurrent)]

    def keep(self, n: int) -> None:
        """Of the tokens since `mark` keep the first `n`: all states are as if the others had not come."""
        assert self.trail is not None
        if unwanted := len(self.trail) - 1 - n:
            for name, state in zip(("window", "recurrent"), self.trail[n]):
                if state is not None:
                    self._store(name, state)
            self._drop(unwanted)
        self.trail = None

    @abstractmethod
    def _drop(self, n: int) -> None:
        """Forget keys and values of the last `n` tokens, or their number where they are not kept."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens; all of them so far."""

    @abstractmethod
    def _store(self, name: str, new: Tensor) -> None:
        """Replace `window` or `recurrent`."""

    @abstractmethod
    def _count(self, n: int) -> None:
        """`n` tokens more, whose keys and values are not kept."""

    @abstractmethod
    def _tensors(self) -> Iterator[tuple[Any, Any]]:
        """Container and key of every tensor that is kept, batch first."""

    def advance(
        self, keys: Tensor | None, values: Tensor | None, window: Tensor | None, recurrent: Tensor | None, n: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add `n` tokens: keys and values as `append` takes them, the new window and S. Returns all keys and values.

        None is for what a layer lacks: it has one mode only, or no convolution.
        """
        if window is not None:
            self._store("window", window)
        if recurrent is not None:
            self._store("recurrent", recurrent)
        self.started = True
        if self.keep_kv and keys is not None and values is not None:
            return self.append(keys, values)
        self._count(n)
        return keys, values

    def _apply(self, change: Callable[[Tensor], Tensor], resize: bool = False) -> None:
        """Change every tensor; `resize`: to another batch size."""
        for store, name in self._tensors():
            store[name] = change(store[name])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, in all states."""
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._apply(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices], resize=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._apply(lambda x: x.repeat_interleave(repeats, 0), resize=True)

    @property
    def is_croppable(self) -> bool:
        """Whether some tokens can be taken back: not out of a recurrent state or a convolution window."""
        return self.keep_kv and not any(x is not None and x.numel() for x in (self.window, self.recurrent))


class LayerState(TwoStates):
    """States that grow with the text; keys and values [b, capacity, G, ·] as attention reads them."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.window, self.recurrent, self.length = None, None, 0

    def _store(self, name: str, new: Tensor) -> None:
        setattr(self, name, new)

    def _count(self, n: int) -> None:
        self.length += n

    def _drop(self, n: int) -> None:
        self.length -= n

    def _tensors(self) -> Iterator[tuple[Any, Any]]:
        names = ("keys", "values", "window", "recurrent")
        yield from ((self.__dict__, name) for name in names if self.__dict__[name] is not None)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [b, n, G, ·] keys and values; all of them so far, [b, t, G, ·]."""
        new = keys.shape[1]
        if self.keys is None or self.values is None or self.length + new > self.keys.shape[1]:
            self.keys = self._grown(self.keys, keys)
            self.values = self._grown(self.values, values)
        self.keys[:, self.length : self.length + new] = keys
        self.values[:, self.length : self.length + new] = values
        self.length += new
        return self.keys[:, : self.length], self.values[:, : self.length]

    def _grown(self, old: Tensor | None, new: Tensor) -> Tensor:
        # Doubling keeps the cost of copying linear in the number of tokens.
        capacity = max(64, 2 * (self.length + new.shape[1]))
        grown = new.new_empty(new.shape[0], capacity, *new.shape[2:])
        if old is not None:
            grown[:, : self.length] = old[:, : self.length]
        return grown
