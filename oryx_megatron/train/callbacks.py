"""Hooks into the training loop, and the ones that report: terminal, metrics.jsonl, TensorBoard.

A callback sees finished facts and never communicates between ranks, so that an error in one cannot leave other ranks
waiting. Reporting callbacks exist on rank 0 only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from oryx_megatron.config.schema import LoggingConfig, RunConfig
from oryx_megatron.display import shown
from oryx_megatron.errors import ConfigError
from oryx_megatron.train.clock import Clock
from oryx_megatron.train.evaluate import Evaluation
from oryx_megatron.train.history import Events, duration, short, summarize, summary_lines, write_summary
from oryx_megatron.train.metrics import read_lines


@dataclass(frozen=True)
class StepRecord:
    """Facts of one optimizer step over the whole global batch."""

    iteration: int
    """Steps done, this one included."""
    loss: float
    """Nats per token."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate of this step."""
    attention_share: float
    """Share of the tokens in attention mode."""
    tokens: int
    """Tokens read in this step."""
    consumed_samples: int
    """Samples read since the run began."""
    seconds: float
    """Wall time of the step."""
    data_seconds: float
    """Part of it spent waiting for data."""
    forward_backward_seconds: float
    """Part of it from the first microbatch to reduced gradients and the loss."""
    optimizer_seconds: float
    """For the gradient norm, the agreement between ranks, and the update. On a GPU those of the step before: the update
    still runs when the loss is known."""
    model_flops: float
    """Model FLOPs of the step, forward and backward (arch.flops_per_token)."""
    skipped: bool
    """True when the step was bad (loss or gradients not finite, or a spike) and parameters stayed as they were."""


def check_installed(logging: LoggingConfig) -> None:
    """Raise ConfigError for a reporter whose package is missing."""
    for field, wanted, package, off in (
        ("tensorboard", logging.tensorboard, "tensorboard", "false"),
        ("wandb_project", logging.wandb_project, "wandb", "null"),
    ):
        if wanted and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{field}: {package} is not installed; `pip install {package}`, or set it to {off}"
            )


class Callback:
    """Does nothing at every hook."""

    def on_start(self, run: RunConfig, iteration: int) -> None:
        """Before the first step; `iteration` steps were done by earlier processes."""

    def on_step(self, record: StepRecord) -> None:
        """After every step."""

    def on_skip(self, iteration: int, reason: str, path: Path) -> None:
        """After `on_step` of a bad step; `path` is its batch, kept for replay."""

    def on_return(self, iteration: int, to: int, skipped: int) -> None:
        """After a rollback from `iteration` to the checkpoint of `to`; `skipped` samples are left out by now."""

    def on_slow(self, iteration: int, text: str) -> None:
        """When a rank lags behind its peers."""

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        """After every evaluation."""

    def on_checkpoint(self, path: Path) -> None:
        """When a checkpoint is complete."""

    def on_finish(self, iteration: int, reason: str | None) -> None:
        """When the loop ended well and all is saved; `reason` when it was asked to stop before the end."""

    def on_end(self) -> None:
        """After the last step, or when the loop is left by an error."""


class MetricsFile(Callback):
    """metrics.jsonl: a line for every step and for every evaluation result."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def on_start(self, run: RunConfig, iteration: int) -> None:
        self._open(iteration)

    def on_return(self, iteration: int, to: int, skipped: int) -> None:
        self.on_end()
        self._open(to)

    def _open(self, iteration: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Steps after the checkpoint are done again: keep each step once.
        kept = [line for line in read_lines(self.path) if line["iteration"] <= iteration]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)

    def on_step(self, record: StepRecord) -> None:
        self._write({"kind": "step", **asdict(record)})

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        for result in results:
            self._write({"kind": "evaluation", "iteration": iteration, **result.to_dict()})

    def on_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")


class Display(Callback):
    """A line on the terminal every `interval` steps, at most 80 columns wide."""

    def __init__(self, interval: int, iterations: int, out: TextIO = sys.stdout) -> None:
        self.interval, self.iterations, self.out = interval, iterations, out
        self._since: list[StepRecord] = []
        self._started = 0.0
        self._first = 0

    def on_start(self, run: RunConfig, iteration: int) -> None:
        self._started, self._first = time.monotonic(), iteration
        self._write(f"{'step':>13} {'loss':>7} {'grad':>6} {'lr':>8} {'attention':>9} {'tokens/s':>9} {'left':>8}")

    def on_step(self, record: StepRecord) -> None:
        self._since.append(record)
        if record.iteration % self.interval and record.iteration != self.iterations:
            return
        steps, self._since = self._since, []
        tokens = sum(step.tokens for step in steps)
        loss = sum(step.loss for step in steps) / len(steps)
        share = sum(step.attention_share for step in steps) / len(steps)
        left = (
            (time.monotonic() - self._started) / (record.iteration - self._first) * (self.iterations - record.iteration)
        )
        counter = f"{record.iteration}/{self.iterations}"
        self._write(
            f"{counter:>13} {loss:7.4f} {record.grad_norm:6.2f} {record.lr:8.1e} {share:9.0%} "
            f"{short(tokens / sum(step.seconds for step in steps)):>9} {duration(left):>8}"
        )

    def on_skip(self, iteration: int, reason: str, path: Path) -> None:
        self._write(f"  step {iteration} left out: {reason}")

    def on_return(self, iteration: int, to: int, skipped: int) -> None:
        self._started, self._first, self._since = time.monotonic(), to, []
        self._write(f"  rollback from step {iteration} to {to}; skipping {skipped} samples")

    def on_finish(self, iteration: int, reason: str | None) -> None:
        if reason is not None:
            self._write(f"  stopped after step {iteration} ({reason}); everything is saved, start again to go on")

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        for dataset in dict.fromkeys(result.dataset for result in results):
            self._write(f"  evaluation at step {iteration}, {dataset}:")
            for r in (result for result in results if result.dataset == dataset):
                self._write(f"    {r.plan:<24} loss {r.loss:7.4f}   bits per byte {r.bits_per_byte:6.4f}")

    def on_checkpoint(self, path: Path) -> None:
        self._write(f"  saved {path}")

    def _write(self, text: str) -> None:
        self.out.write(shown(text) + "\n")
        self.out.flush()


class History(Callback):
    """events.jsonl, and at the end summary.json and the same on the terminal.

    Args:
        folder: RUN.
        clock: The trainer's, which says how long saves and evaluations took.
        peak_flops: Peak FLOP/s of all ranks together, where known.
        facts: What the start event says of this process group.
        out: Terminal.
    """

    def __init__(
        self, folder: Path, clock: Clock, *, peak_flops: float | None, facts: dict[str, Any], out: TextIO = sys.stdout
    ) -> None:
        self.folder, self.clock, self.peak_flops, self.facts, self.out = folder, clock, peak_flops, facts, out
        self._events = Events(folder)
        self._told = dict(clock.seconds)
        self._iteration = 0

    def on_start(self, run: RunConfig, iteration: int) -> None:
        self._iteration = iteration
        self._events.start(iteration, **self.facts)

    def on_step(self, record: StepRecord) -> None:
        self._iteration = record.iteration

    def on_skip(self, iteration: int, reason: str, path: Path) -> None:
        self._events.add("skip", iteration, reason=reason, record=path.name)

    def on_return(self, iteration: int, to: int, skipped: int) -> None:
        self._events.add("return", iteration, to=to, samples=skipped)

    def on_slow(self, iteration: int, text: str) -> None:
        self._events.add("slow", iteration, text=text)

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        self._events.add("evaluation", iteration, seconds=self._since("evaluation"))

    def on_checkpoint(self, path: Path) -> None:
        self._events.add("checkpoint", self._iteration, seconds=self._since("checkpoint"), path=path.name)

    def on_finish(self, iteration: int, reason: str | None) -> None:
        if (seconds := self._since("checkpoint")) > 1e-3:  # polls since the last one was complete
            self._events.add("checkpoint", iteration, seconds=seconds)
        if reason is None:
            self._events.add("end", iteration)
        else:
            self._events.add("stop", iteration, reason=reason)
        summary = summarize(self.folder, peak_flops=self.peak_flops)
        write_summary(self.folder, summary)
        self.out.write("".join(f"{line}\n" for line in summary_lines(summary)))
        self.out.flush()

    def _since(self, part: str) -> float:
        """Seconds of a part since they were last told."""
        seconds = self.clock.seconds[part] - self._told[part]
        self._told[part] = self.clock.seconds[part]
        return seconds


class TensorBoard(Callback):
    """TensorBoard events in `folder`; none where that cannot be made, which the trainer reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_start(self, run: RunConfig, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that an earlier process did behind its last checkpoint are done again.
        self._writer = SummaryWriter(str(self.folder), purge_step=iteration + 1)

    def on_return(self, iteration: int, to: int, skipped: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.on_end()
        self._writer = SummaryWriter(str(self.folder), purge_step=to + 1)

    def on_step(self, record: StepRecord) -> None:
        if self._writer is None:
            return
        for name in ("loss", "grad_norm", "lr", "attention_share", "data_seconds"):
            self._writer.add_scalar(f"train/{name}", getattr(record, name), record.iteration)
        self._writer.add_scalar("train/tokens_per_second", record.tokens / record.seconds, record.iteration)

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        for r in results if self._writer is not None else ():
            self._writer.add_scalar(f"{r.dataset}/loss/{r.plan}", r.loss, iteration)
            self._writer.add_scalar(f"{r.dataset}/bits_per_byte/{r.plan}", r.bits_per_byte, iteration)

    def on_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
