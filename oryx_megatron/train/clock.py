"""Where the time of a run goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from oryx_megatron import platform

PARTS = ("data", "forward_backward", "optimizer", "checkpoint", "evaluation")


class Clock:
    """Wall seconds of this process by part of the run."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.longest = dict.fromkeys((*PARTS, "step"), 0.0)

    def add(self, part: str, seconds: float) -> None:
        """Count `seconds`; those of a step are the sum of its parts and counted in `longest` only."""
        if part in self.seconds:
            self.seconds[part] += seconds
        self.longest[part] = max(self.longest[part], seconds)

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Count the seconds spent inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - started)

    def step(self, **seconds: float) -> dict[str, float]:
        """Count a step's parts and the step itself; gives them back."""
        for part, value in seconds.items():
            self.add(part, value)
        return seconds

    @property
    def longest_stop(self) -> float:
        """Seconds that a step, an evaluation and a save took at most."""
        return self.longest["step"] + self.longest["evaluation"] + self.longest["checkpoint"]


class Updates:
    """Seconds of every optimizer update: on a GPU, which is still at it, of the one before."""

    def __init__(self) -> None:
        self._last: tuple[Any, Any] | None = None

    def seconds(self, begun: Any, ended: Any) -> float:
        """Seconds of an update, from its marks (platform.mark)."""
        last, self._last = self._last, (begun, ended)
        if not platform.has_gpu():
            last = self._last
        return platform.seconds_between(*last) if last is not None else 0.0
