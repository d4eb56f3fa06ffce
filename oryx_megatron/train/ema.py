"""Exponential moving average of the weights, beside the optimizer's masters: `train.ema`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from oryx_megatron.checkpoint.optimizers import kind_of
from oryx_megatron.checkpoint.state import gather_weights
from oryx_megatron.config.schema import EmaConfig

log = logging.getLogger(__name__)


class WeightAverage:
    """average ← decay · average + (1 - decay) · weights after every applied step, in fp32.

    Each rank averages the masters that it updates: with a sharded optimizer its share of them.

    Args:
        settings: Decay, and the step with whose weights the average begins.
        chunks: Model chunks of this rank.
        optimizer: Their optimizer.
    """

    def __init__(self, settings: EmaConfig, chunks: list[Any], optimizer: Any) -> None:
        self.settings, self.chunks = settings, chunks
        self._kind = kind_of(optimizer)
        self.parts = self._kind.held_parts()
        self._averages = [part.average for part in self.parts]
        self._masters = [part.master for part in self.parts]
        self.begun = False
        """Whether there is an average yet; the same on all ranks."""

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take the weights in that step `iteration`, from 1, has made."""
        if not self.begun and iteration < self.settings.start:
            return
        if self._averages and self.begun:
            torch._foreach_lerp_(self._averages, self._masters, 1 - self.settings.decay)
        elif self._averages:
            torch._foreach_copy_(self._averages, self._masters)
        self.begun = True

    def loaded(self, iteration: int, *, found: bool) -> None:
        """Told after a load of step `iteration`: whether the checkpoint had an average, which then is in `parts`."""
        start = self.settings.start
        self.begun = found and iteration >= start
        if found and not self.begun:
            log.info("train.ema.start %d: the average of the checkpoint of step %d is dropped", start, iteration)
        elif not found and iteration >= start:
            log.info("train.ema: the checkpoint has no average; a new one begins")

    @contextlib.contextmanager
    def in_place(self) -> Iterator[bool]:
        """The model holds the averages inside, if there are any: whether it does. Afterwards its weights, bit by bit.

        Collective.
        """
        if not self.begun:
            yield False
            return
        gather_weights(self.chunks)
        weights = [parameter for chunk in self.chunks for parameter in chunk.parameters() if parameter.requires_grad]
        # A copy, not a cast of the masters: in fp32 those are the weights.
        kept = [weight.detach().clone() for weight in weights]
        try:
            self._show()
            yield True
            gather_weights(self.chunks)  # what an interleaved schedule may have begun to gather
        finally:
            with torch.no_grad():
                for weight, before in zip(weights, kept, strict=True):
                    weight.copy_(before)

    @torch.no_grad()
    def _show(self) -> None:
        """Bring the averages into the model, on all ranks."""
        for part in self.parts:
            part.weight.view(-1)[part.start : part.stop].copy_(part.average.view(-1))
        self._kind.share_weights(self.chunks)
