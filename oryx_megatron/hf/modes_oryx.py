"""Which tokens of a call attend, as tensors: mode plans over texts, batches and generations. Torch only.

Shapes: b batch, s tokens of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .plans_oryx import parse_runs
from .router_oryx import OryxRouter, RouterSteps

ModePlan = str | Callable[[int], Any] | Tensor | Sequence[Any]
"""A spec, a function from position to mode, or a mask that is true where a token attends."""


def plan_mask(plan: ModePlan, length: int, *, chunk: int, prompt: int | None = None, shorter: bool = False) -> Tensor:
    """Mask, bool [length] on the CPU, true where a token of a text of `length` tokens attends.

    `plan` is a spec (`plans_oryx.FORMS`), a function from position to mode ("attention", "recurrent" or a truth value),
    or a mask of that length. `ratio:R` and `every:K` count chunks of `chunk` tokens; `prompt` is the number of tokens
    given before generation. `shorter`: the N of `prefix:N` and `last:N` may be more than the text has; a default plan
    meets texts of any length. Raises ValueError with the plan and what is wrong with it.
    """
    if isinstance(plan, str):
        mask = torch.zeros(length, dtype=torch.bool)
        for start, stop, attends in parse_runs(plan, length, chunk=chunk, prompt=prompt, shorter=shorter):
            mask[start:stop] = attends
        return mask
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


class RoutedPlan:
    """The plan of a generation whose tokens' modes a router chooses as they come."""

    def __init__(self, model: Any, share: float, done: int = 0) -> None:
        """`model` has `route` (modeling_oryx.OryxModel); `done` slots are cached."""
        self.model, self.share, self.done = model, share, done
        self.steps: RouterSteps | None = None
        self._least = 0.0

    def begin_steps(self, cache: Any) -> None:
        """From here on tokens come one by one, to `next_modes`, and a static cache holds what came before."""
        router: OryxRouter = self.model.mode_router
        self.steps = RouterSteps(router, cache.router, cache.get_max_length())
        self._least = router.threshold(self.share)  # waits for the device: once

    def next_modes(self, tokens: Tensor) -> TokenModes | str:
        """Modes of the next token of each row [b, 1]."""
        assert self.steps is not None  # begin_steps came before
        return self._modes((self.steps.step(tokens) > self._least).cpu(), tokens)

    def end_steps(self, cache: Any) -> None:
        """The cache knows the text as it is now."""
        assert self.steps is not None
        cache.router, self.steps = self.steps.state(), None

    def modes(self, tokens: Tensor | None, mask: Tensor | None, cache: Any) -> TokenModes | str:
        """Modes of tokens [b, s], the next of a text; mask [b, ≥ s]: its last columns are false at padding.

        ValueError for what `route` cannot do.
        """
        valid = None if mask is None or tokens is None or tokens.shape[1] == 1 else mask[:, -tokens.shape[1] :].bool()
        attends = self.model.route(self.share, tokens, valid, cache)
        assert tokens is not None  # `route` refuses
        return self._modes(attends, tokens)

    @staticmethod
    def _modes(attends: Tensor, tokens: Tensor) -> TokenModes | str:
        if tokens.shape[1] == 1 and bool((attends == attends[0]).all()):
            return "attention" if bool(attends[0]) else "recurrent"
        return TokenModes.from_mask(attends, tokens.device)


@dataclass(frozen=True)
class FirstSlots:
    """The prompt's `tokens` slots, where PEFT may put virtual tokens before them on their way to forward."""

    plan: SlotPlan
    tokens: int

    def modes(self, s: int) -> TokenModes | str:
        """Modes of the s tokens that arrive."""
        self.plan.widen(s - self.tokens)
        return self.plan.modes(0, s)
