"""Progress on the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.display import shown
from oryx_megatron.train.callbacks.base import Callback, StepRecord
from oryx_megatron.train.evaluate import Evaluation
from oryx_megatron.train.history import duration, short


class Display(Callback):
    """A line on the terminal every `interval` steps, at most 80 columns wide."""

    def __init__(self, interval: int, iterations: int, out: TextIO = sys.stdout) -> None:
        self.interval, self.iterations, self.out = interval, iterations, out
        self._since: list[StepRecord] = []
        self._started = 0.0
        self._done = 0
        """Samples since then."""
        self._count: SampleCount | None = None

    def on_start(self, run: RunConfig, iteration: int) -> None:
        self._started, self._done, self._count = time.monotonic(), 0, SampleCount.of(run.train)
        self._write(f"{'step':>13} {'loss':>7} {'grad':>6} {'lr':>8} {'attention':>9} {'tokens/s':>9} {'left':>8}")

    def on_step(self, record: StepRecord) -> None:
        assert self._count is not None
        self._since.append(record)
        self._done += self._count.batch_at(record.iteration - 1)
        if record.iteration % self.interval and record.iteration != self.iterations:
            return
        steps, self._since = self._since, []
        tokens = sum(step.tokens for step in steps)
        loss = sum(step.loss for step in steps) / len(steps)
        share = sum(step.attention_share for step in steps) / len(steps)
        remaining = self._count.samples_at(self.iterations) - self._count.samples_at(record.iteration)
        left = (time.monotonic() - self._started) / self._done * remaining  # steps to come may be larger
        counter = f"{record.iteration}/{self.iterations}"
        self._write(
            f"{counter:>13} {loss:7.4f} {record.grad_norm:6.2f} {record.lr:8.1e} {share:9.0%} "
            f"{short(tokens / sum(step.seconds for step in steps)):>9} {duration(left):>8}"
        )

    def on_skip(self, iteration: int, reason: str, path: Path) -> None:
        self._write(f"  step {iteration} skipped: {reason}")

    def on_rollback(self, iteration: int, to: int, skipped: int) -> None:
        self._started, self._done, self._since = time.monotonic(), 0, []
        self._write(f"  rollback from step {iteration} to {to}; skipping {skipped} samples")

    def on_finish(self, iteration: int, reason: str | None) -> None:
        if reason is not None:
            self._write(f"  stopped after step {iteration} ({reason}); everything is saved, start again to go on")

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        for dataset in dict.fromkeys(result.dataset for result in results):
            self._write(f"  evaluation at step {iteration}, {dataset}:")
            for r in (result for result in results if result.dataset == dataset):
                self._write(f"    {r.plan:<24} loss {r.loss:7.4f}   bits per byte {r.bits_per_byte:6.4f}")

    def on_checkpoint(self, path: str) -> None:
        self._write(f"  saved {path}")

    def _write(self, text: str) -> None:
        self.out.write(shown(text) + "\n")
        self.out.flush()
