"""Which tokens of a call attend, as tensors: mode plans over texts, batches and generations. Torch only.

Shapes: b batch, s tokens of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .plans_oryx import layer_plans, parse_runs
from .router_oryx import OryxRouter, RouterSteps

ModePlan = str | Callable[[int], Any] | Tensor | Sequence[Any]
"""A spec, a function from position to mode, or a mask that is true where a token attends."""


def distinct_plans(spec: ModePlan, layers: int) -> tuple[list[ModePlan], tuple[int, ...] | None]:
    """The plans in a spec, and which of them each layer has; None for a plan of all layers.

    Raises ValueError for a spec `layers:…` that does not name each of the model's layers once.
    """
    parts = layer_plans(spec, layers) if isinstance(spec, str) else None
    if parts is None:
        return [spec], None
    distinct: list[ModePlan] = list(dict.fromkeys(parts))
    return distinct, tuple(distinct.index(part) for part in parts)


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
        """The modes of a CPU mask [b, s], true where a token attends."""
        union = mask.any(0)
        edges = torch.diff(union.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
        starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
        same = bool((mask == mask[:1]).all())
        return cls(tuple(zip(starts, stops)), not bool(mask.all()), None if same else mask.to(device))


@dataclass(frozen=True)
class LayerModes:
    """Modes of the tokens of one call in every layer, where layers differ."""

    distinct: tuple[Any, ...]
    """TokenModes, or plans on their way to become that."""
    of_layer: tuple[int, ...]
    """Which of them each layer has."""

    @classmethod
    def from_masks(cls, masks: Tensor, device: torch.device) -> LayerModes:
        """The modes of a CPU mask [layers, b, s], true where a token attends in a layer."""
        found: dict[bytes, int] = {}
        of_layer = tuple(found.setdefault(mask.numpy().tobytes(), len(found)) for mask in masks)
        return cls(tuple(TokenModes.from_mask(masks[of_layer.index(i)], device) for i in range(len(found))), of_layer)


class SlotPlan:
    """The plan of a whole generation, per slot: slot i is the i-th column of the padded batch, prompt or new."""

    def __init__(
        self,
        tables_of: Callable[[int], list[Tensor]],
        device: torch.device,
        done: int = 0,
        of_layer: tuple[int, ...] | None = None,
    ) -> None:
        """`tables_of(n)`: bool [b, n + total] on the CPU, with n virtual tokens in front; `done` slots are cached.

        One table, or with `of_layer` as many as it counts: which of them each layer has.
        """
        self.tables_of, self.device, self.done, self.of_layer = tables_of, device, done, of_layer
        self.virtual = -1
        self.widen(0)

    def widen(self, virtual: int) -> None:
        """Count `virtual` tokens before the prompt, as prompt tuning puts them there."""
        if virtual != self.virtual:
            self.done += virtual - max(self.virtual, 0)
            self.virtual, self.tables = virtual, self.tables_of(virtual)
            edges = [(table.all(0).tolist(), table.any(0).tolist()) for table in self.tables]
            self.same = [[a if a == o else None for a, o in zip(every, some)] for every, some in edges]

    def attends(self, start: int, stop: int) -> bool:
        """Whether any of slots start … stop - 1 attends, in any layer."""
        return any(bool(table[:, start:stop].any()) for table in self.tables)

    def modes(self, start: int, stop: int) -> TokenModes | LayerModes | str:
        """Modes of slots start … stop - 1. Plain strings for single tokens: a compiled step then has two variants."""
        found = tuple(self._modes(i, start, stop) for i in range(len(self.tables)))
        return found[0] if self.of_layer is None else LayerModes(found, self.of_layer)

    def _modes(self, number: int, start: int, stop: int) -> TokenModes | str:
        if stop - start == 1 and (attends := self.same[number][start]) is not None:
            return "attention" if attends else "recurrent"
        return TokenModes.from_mask(self.tables[number][:, start:stop], self.device)


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

    def modes(self, s: int) -> TokenModes | LayerModes | str:
        """Modes of the s tokens that arrive."""
        self.plan.widen(s - self.tokens)
        return self.plan.modes(0, s)
