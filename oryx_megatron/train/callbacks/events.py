"""RUN/events.jsonl, and at the end the summary."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, TextIO

from oryx_megatron.config.schema import RunConfig
from oryx_megatron.train.callbacks.base import Callback, StepRecord
from oryx_megatron.train.clock import Clock
from oryx_megatron.train.evaluate import Evaluation
from oryx_megatron.train.history import Events, summarize, summary_lines, write_summary

log = logging.getLogger(__name__)


class History(Callback):
    """events.jsonl, and at the end summary.json and the same on the terminal.

    Args:
        folder: RUN.
        clock: The trainer's, which says how long saves and evaluations took.
        peak_flops: Peak FLOP/s of all ranks together, where known.
        facts: What the start event says of this process group.
        out: Terminal; None: standard output.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        peak_flops: float | None,
        facts: dict[str, Any],
        out: TextIO | None = None,
    ) -> None:
        self.folder, self.clock, self.peak_flops, self.facts = folder, clock, peak_flops, facts
        self.out = out or sys.stdout
        self._events = Events(folder)
        self._told = dict(clock.seconds)
        self._iteration = 0
        self._interval = 1

    def on_start(self, run: RunConfig, iteration: int) -> None:
        self._iteration, self._interval = iteration, run.logging.interval
        self._events.start(iteration, **self.facts)

    def on_change(self, iteration: int, changes: list[tuple[str, Any, Any]]) -> None:
        for field, before, after in changes:
            self._events.add("change", iteration, field=field, before=before, after=after)

    def on_step(self, record: StepRecord) -> None:
        self._iteration = record.iteration

    def on_skip(self, iteration: int, reason: str, path: Path) -> None:
        self._events.add("skip", iteration, reason=reason, record=path.name)

    def on_rollback(self, iteration: int, to: int, skipped: int) -> None:
        self._events.add("rollback", iteration, to=to, samples=skipped)

    def on_slow(self, iteration: int, text: str) -> None:
        log.warning("step %d: %s", iteration, text)
        self._events.add("slow", iteration, text=text)

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        self._events.add("evaluation", iteration, seconds=self._since("evaluation"))

    def on_checkpoint(self, path: str) -> None:
        self._events.add("checkpoint", self._iteration, seconds=self._since("checkpoint"), path=Path(path).name)

    def on_finish(self, iteration: int, reason: str | None, saved: int | None) -> None:
        if (seconds := self._since("checkpoint")) > 1e-3:  # polls since the last one was complete
            self._events.add("checkpoint", iteration, seconds=seconds)
        if reason is None:
            self._events.add("end", iteration)
        else:
            self._events.add("stop", iteration, reason=reason, saved=saved)
        summary = summarize(self.folder, peak_flops=self.peak_flops, interval=self._interval)
        write_summary(self.folder, summary)
        self.out.write("".join(f"{line}\n" for line in summary_lines(summary)))
        self.out.flush()

    def _since(self, part: str) -> float:
        """Seconds of a part since they were last told."""
        seconds = self.clock.seconds[part] - self._told[part]
        self._told[part] = self.clock.seconds[part]
        return seconds
