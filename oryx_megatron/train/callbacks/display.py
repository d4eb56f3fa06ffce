"""Progress on the terminal."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import TextIO

from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.display import shown
from oryx_megatron.train.callbacks.base import Callback, StepRecord
from oryx_megatron.train.clock import Clock
from oryx_megatron.train.evaluate import Evaluation
from oryx_megatron.train.history import duration, read_events, short
from oryx_megatron.train.intervals import last_step, mean_seconds, seconds_left
from oryx_megatron.train.metrics import NAME as METRICS
from oryx_megatron.train.metrics import read_lines

RECENT = 50
"""Latest steps from which the time left is computed."""


class Display(Callback):
    """A line on the terminal every `interval` steps, at most 80 columns wide.

    Args:
        folder: RUN.
        clock: The trainer's, which says how long saves and evaluations take.
        interval: logging.interval.
        iterations: train.iterations.
        out: Terminal; None: standard output.
    """

    def __init__(self, folder: Path, clock: Clock, interval: int, iterations: int, out: TextIO | None = None) -> None:
        self.folder, self.clock, self.interval, self.iterations = folder, clock, interval, iterations
        self.out = out or sys.stdout
        self._since: list[StepRecord] = []
        self._losses: list[float] = []
        """Of the steps behind the last line, those before a resume included: the last line is the final loss."""
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        """Seconds and samples of the latest steps; without the first of this process once there are others."""
        self._warming = True
        self._counts = {"evaluation": 0, "checkpoint": 0}
        self._known = dict.fromkeys(self._counts, 0.0)
        """Seconds that one took in earlier starts."""
        self._run: RunConfig | None = None
        self._last = iterations

    def on_start(self, run: RunConfig, iteration: int) -> None:
        self._run, self._last = run, last_step(run)
        events = read_events(self.folder)
        self._known = {kind: mean_seconds(events, kind) for kind in self._counts}
        self._begin(iteration)
        self._write(f"{'step':>13} {'loss':>7} {'grad':>6} {'lr':>8} {'attention':>9} {'tokens/s':>9} {'left':>8}")

    def on_step(self, record: StepRecord) -> None:
        assert self._run is not None
        self._since.append(record)
        if self._warming and self._recent:  # the first step of a process compiles and fills caches
            self._recent.clear()
            self._warming = False
        self._recent.append((record.seconds, SampleCount.of(self._run.train).batch_at(record.iteration - 1)))
        if not record.skipped:
            self._losses.append(record.loss)
        if record.iteration % self.interval and record.iteration not in (self.iterations, self._last):
            return
        steps, self._since = self._since, []
        losses, self._losses = self._losses, []
        tokens = sum(step.tokens for step in steps)
        loss = sum(losses) / len(losses) if losses else record.loss
        share = sum(step.attention_share for step in steps) / len(steps)
        counter = f"{record.iteration}/{self.iterations}"
        self._write(
            f"{counter:>13} {loss:7.4f} {record.grad_norm:6.2f} {record.lr:8.1e} {share:9.0%} "
            f"{short(tokens / sum(step.seconds for step in steps)):>9} {duration(self._left(record.iteration)):>8}"
        )

    def _left(self, iteration: int) -> float:
        """Seconds to the end, evaluations and saves included."""
        assert self._run is not None
        seconds, samples = map(sum, zip(*self._recent, strict=True))
        return seconds_left(
            self._run,
            iteration,
            self._last,
            sample=seconds / samples,
            evaluation=self._each("evaluation"),
            save=self._each("checkpoint"),
        )

    def _each(self, kind: str) -> float:
        """Seconds that one evaluation or save takes."""
        count = self._counts[kind]
        return self.clock.seconds[kind] / count if count else self._known[kind]

    def _begin(self, iteration: int) -> None:
        """Take up the steps that an earlier process did behind its last line."""
        first = iteration - iteration % self.interval
        lines = read_lines(self.folder / METRICS)
        steps = [line for line in lines if line["kind"] == "step" and first < line["iteration"] <= iteration]
        self._since, self._losses = [], [step["loss"] for step in steps if not step.get("skipped")]

    def on_skip(self, iteration: int, reason: str, path: Path) -> None:
        self._write(f"  step {iteration} skipped: {reason}")

    def on_rollback(self, iteration: int, to: int, skipped: int) -> None:
        self._begin(to)
        self._write(f"  rollback from step {iteration} to {to}; skipping {skipped} samples")

    def on_finish(self, iteration: int, reason: str | None, saved: int | None) -> None:
        if reason is None:
            return
        kept = "nothing is saved" if saved is None else f"the newest checkpoint is of step {saved}"
        if saved == iteration:
            kept = "checkpoint saved"
        how = "increase or remove it to continue" if reason == "train.exit_after" else "rerun the command to resume"
        self._write(f"  stopped after step {iteration} ({reason}); {kept}")
        self._write(f"  {how}")

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        self._counts["evaluation"] += 1
        for dataset in dict.fromkeys(result.dataset for result in results):
            self._write(f"  evaluation at step {iteration}, {dataset}:")
            for r in (result for result in results if result.dataset == dataset):
                apart = ", ".join(f"{mode} {loss:.4f}" for mode, loss in r.modes.items()) if len(r.modes) > 1 else ""
                self._write(f"    {r.plan:<24} loss {r.loss:7.4f}   bits per byte {r.bits_per_byte:6.4f}")
                if apart:
                    self._write(f"    {'':<24}   by mode: {apart}")
                if r.ema_loss is not None:
                    self._write(f"    {'':<24} loss {r.ema_loss:7.4f}   of the average (train.ema)")

    def on_checkpoint(self, path: str) -> None:
        self._counts["checkpoint"] += 1
        self._write(f"  saved {path}")

    def _write(self, text: str) -> None:
        self.out.write(shown(text) + "\n")
        self.out.flush()
