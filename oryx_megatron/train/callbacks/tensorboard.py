"""TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oryx_megatron.config.schema import RunConfig
from oryx_megatron.train.callbacks.base import Callback, StepRecord
from oryx_megatron.train.evaluate import Evaluation


class TensorBoard(Callback):
    """TensorBoard events in `folder`; none where that cannot be made, which the trainer reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_start(self, run: RunConfig, iteration: int) -> None:
        self._open(iteration)

    def on_rollback(self, iteration: int, to: int, skipped: int) -> None:
        self.on_end()
        self._open(to)

    def _open(self, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps behind the checkpoint are done again.
        self._writer = SummaryWriter(str(self.folder), purge_step=iteration + 1)

    def on_step(self, record: StepRecord) -> None:
        if self._writer is None:
            return
        for name in ("loss", "grad_norm", "lr", "attention_share", "data_seconds"):
            self._writer.add_scalar(f"train/{name}", getattr(record, name), record.iteration)
        for name, value in record.scalars().items():
            self._writer.add_scalar(f"train/{name}", value, record.iteration)
        self._writer.add_scalar("train/tokens_per_second", record.tokens / record.seconds, record.iteration)

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        for r in results if self._writer is not None else ():
            self._writer.add_scalar(f"{r.dataset}/loss/{r.plan}", r.loss, iteration)
            self._writer.add_scalar(f"{r.dataset}/bits_per_byte/{r.plan}", r.bits_per_byte, iteration)
            if r.ema_loss is not None:
                self._writer.add_scalar(f"{r.dataset}/ema_loss/{r.plan}", r.ema_loss, iteration)

    def on_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
