"""Steps whose numbers are wrong: what counts as one, and when to roll back.

A step is bad when its loss or gradient norm is not finite, or (faults.spike) when its loss is a spike. Its update is
left out on all ranks alike. After faults.bad_steps of them in a row the run rolls back to the last checkpoint before
them and continues with the data after them: `skipped` samples were skipped so far. That number, and the losses of the
running median, are in every checkpoint's manifest, so that a resumed run takes the same decisions.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch

from oryx_megatron.config.schema import FaultsConfig
from oryx_megatron.data.loader import Blend

SCALE = 1.4826
"""From median absolute deviation to standard deviation, for normally distributed values."""


class Guard:
    """Counts bad steps; the same on all ranks, because what it is told is."""

    def __init__(self, faults: FaultsConfig) -> None:
        self.faults = faults
        self.losses: deque[float] = deque(maxlen=faults.spike_window)
        self.skipped = 0
        """Samples skipped by rollbacks."""
        self.row = 0
        """Bad steps since the last good one."""
        self.rollbacks = 0
        """Rollbacks since the last good step."""
        self.rolled_back_to: int | None = None

    def reason(self, loss: float, norm: float) -> str | None:
        """Why a step is bad, or None."""
        if not math.isfinite(loss):
            return "loss is not finite"
        if not math.isfinite(norm):
            return "gradient is not finite"
        limit = self.limit()
        return f"loss {loss:.4f} is a spike above {limit:.4f}" if limit is not None and loss > limit else None

    def limit(self) -> float | None:
        """Loss above which a step is a spike; None while too few are known, or when off."""
        if self.faults.spike is None or len(self.losses) < self.faults.spike_window // 2:
            return None
        median = statistics.median(self.losses)
        deviation = SCALE * statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.faults.spike * max(deviation, 1e-3 * abs(median))

    def good(self, loss: float) -> None:
        """A step was applied."""
        if self.faults.spike is not None:
            self.losses.append(loss)
        self.row = self.rollbacks = 0
        self.rolled_back_to = None

    def bad(self) -> bool:
        """A step was left out; True when it is time for a rollback."""
        self.row += 1
        return 0 < self.faults.bad_steps <= self.row

    def rolled_back(self, to: int, skipped: int) -> None:
        """The run is at step `to` again, and skips `skipped` samples in all."""
        self.rollbacks += 1
        self.rolled_back_to, self.skipped = to, skipped

    def state(self) -> dict[str, Any]:
        """State that a checkpoint keeps, for `load_state`."""
        return {"skipped_samples": self.skipped, "losses": list(self.losses)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint; one written before there was a guard holds nothing."""
        self.skipped = int(state.get("skipped_samples", 0))
        self.losses.clear()
        self.losses.extend(state.get("losses", ()))
        self.row = 0


class Prolonged(Blend):
    """A blend whose last stage begins again at its end: who skips `skipped` samples needs as many more."""

    def __init__(self, blend: Blend, skipped: int) -> None:
        super().__init__(blend.name, blend.datasets, blend.order, len(blend) + skipped, blend.parts, blend.identity)
        self._length = len(blend)
        self._start = int(blend.identity["stages"][-1]["start"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self._length:
            index = self._start + (index - self._length) % (self._length - self._start)
        return super().__getitem__(index)
