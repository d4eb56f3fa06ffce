"""Where the time of a run goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

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

    @property
    def longest_stop(self) -> float:
        """Seconds that a step, an evaluation and a save took at most."""
        return self.longest["step"] + self.longest["evaluation"] + self.longest["checkpoint"]
