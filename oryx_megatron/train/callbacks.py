"""Hooks into the training loop, and the ones that report: terminal, metrics.jsonl, TensorBoard, Weights & Biases.

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
from oryx_megatron.errors import ConfigError
from oryx_megatron.train.evaluate import Evaluation
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
    model_flops: float
    """Model FLOPs of the step, forward and backward (arch.flops_per_token)."""
    skipped: bool
    """True when loss or gradients were not finite and parameters stayed as they were."""


def check_installed(logging: LoggingConfig) -> None:
    """Raise ConfigError for a reporter whose package is missing."""
    for field, wanted, package, off in (
        ("tensorboard", logging.tensorboard, "tensorboard", "false"),
        ("wandb_project", logging.wandb_project, "wandb", "null"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{field}: {package} is not installed; `pip install {package}`, or set it to {off}"
            )


class Callback:
    """Does nothing at every hook."""

    def on_start(self, run: RunConfig, iteration: int) -> None:
        """Before the first step; `iteration` steps were done by earlier processes."""

    def on_step(self, record: StepRecord) -> None:
        """After every step."""

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        """After every evaluation."""

    def on_checkpoint(self, path: Path) -> None:
        """When a checkpoint is complete."""

    def on_end(self) -> None:
        """After the last step, or when the loop is left by an error."""


class MetricsFile(Callback):
    """metrics.jsonl: a line for every step and for every evaluation result."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def on_start(self, run: RunConfig, iteration: int) -> None:
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
        if record.skipped:
            self._write(f"  step {record.iteration}: loss or gradient not finite; parameters unchanged")
        if record.iteration % self.interval and record.iteration != self.iterations:
            return
        steps, self._since = self._since, []
        tokens = sum(step.tokens for step in steps)
        loss = sum(step.loss for step in steps) / len(steps)
        share = sum(step.attention_share for step in steps) / len(steps)
        left = (time.monotonic() - self._started) / (record.iteration - self._first) * (
            self.iterations - record.iteration
        )
        counter = f"{record.iteration}/{self.iterations}"
        self._write(
            f"{counter:>13} {loss:7.4f} {record.grad_norm:6.2f} {record.lr:8.1e} {share:9.0%} "
            f"{_short(tokens / sum(step.seconds for step in steps)):>9} {duration(left):>8}"
        )

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        for dataset in dict.fromkeys(result.dataset for result in results):
            self._write(f"  evaluation at step {iteration}, {dataset}:")
            for r in (result for result in results if result.dataset == dataset):
                self._write(f"    {r.plan:<24} loss {r.loss:7.4f}   bits per byte {r.bits_per_byte:6.4f}")

    def on_checkpoint(self, path: Path) -> None:
        self._write(f"  saved {path}")

    def _write(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()


class TensorBoard(Callback):
    """TensorBoard events in `folder`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def on_step(self, record: StepRecord) -> None:
        for name in ("loss", "grad_norm", "lr", "attention_share", "data_seconds"):
            self._writer.add_scalar(f"train/{name}", getattr(record, name), record.iteration)
        self._writer.add_scalar("train/tokens_per_second", record.tokens / record.seconds, record.iteration)

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        for r in results:
            self._writer.add_scalar(f"{r.dataset}/loss/{r.plan}", r.loss, iteration)
            self._writer.add_scalar(f"{r.dataset}/bits_per_byte/{r.plan}", r.bits_per_byte, iteration)

    def on_end(self) -> None:
        self._writer.close()


class WeightsAndBiases(Callback):
    """The same numbers in a Weights & Biases run, continued after a restart."""

    def __init__(self, project: str, run: RunConfig, config: dict[str, Any]) -> None:
        import wandb

        name = Path(run.output_dir).name
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=config)

    def on_step(self, record: StepRecord) -> None:
        self._run.log({f"train/{k}": v for k, v in asdict(record).items()}, step=record.iteration)

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        self._run.log({f"{r.dataset}/{r.plan}/loss": r.loss for r in results}, step=iteration)

    def on_end(self) -> None:
        self._run.finish()


def duration(seconds: float) -> str:
    """As `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"
