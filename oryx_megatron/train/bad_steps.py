"""Bad steps: their batches, kept for replay, and what to do after several in a row."""

from __future__ import annotations

import json
import logging
import math
import socket
from pathlib import Path
from typing import Any

import torch

from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import TrainingError
from oryx_megatron.train.callbacks import Callbacks
from oryx_megatron.train.guard import Guard
from oryx_megatron.train.remote import run_folder
from oryx_megatron.train.step import Microbatch, Totals

log = logging.getLogger(__name__)

FOLDER = "faults"


class BadSteps:
    """What follows the bad steps of a run; the same decisions on all ranks.

    Args:
        run: The config.
        layout: How ranks are used.
        guard: Counts them.
        callbacks: Are told of them.
        main: Whether this rank writes the records.
    """

    def __init__(self, run: RunConfig, layout: Layout, guard: Guard, callbacks: Callbacks, *, main: bool) -> None:
        self.run, self.layout, self.guard, self.callbacks, self.main = run, layout, guard, callbacks, main
        self.last: dict[str, Any] = {}
        """The last one, as `describe` noted it."""
        self.row = ""
        """The last ones, for messages."""

    @property
    def records(self) -> str:
        """Where the records are, for messages."""
        folder = run_folder(self.run) / FOLDER
        return f"their batches are in {folder} (replay: python -m oryx_megatron.train.replay)"

    def describe(
        self,
        chunks: list[Any],
        batches: list[Microbatch],
        totals: Totals,
        norm: float,
        *,
        iteration: int,
        consumed: int,
        samples: int,
        data_rank: int,
    ) -> None:
        """Note a bad step for its record: what each rank read, under which plans, and what came of it; collective.

        Args:
            chunks: Model chunks, whose gradients are still there.
            batches: The microbatches of this rank.
            totals: Their sums.
            norm: Gradient norm.
            iteration: Number of the step, from 1.
            consumed: Samples read before it.
            samples: Samples in the training data.
            data_rank: Data-parallel rank of this process.
        """
        reason = self.guard.reason(totals.mean_loss if math.isfinite(totals.loss) else totals.loss, norm)
        losses = None if totals.local is None else (totals.local[:, 0] / totals.local[:, 1].clamp(min=1)).tolist()
        micro = self.run.train.micro_batch_size
        bad = [
            name
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if (gradient := getattr(parameter, "main_grad", None)) is not None and not bool(gradient.isfinite().all())
        ]
        mine = {
            "rank": torch.distributed.get_rank(),
            "host": socket.gethostname(),
            "data_rank": data_rank,
            "microbatches": [
                {
                    "samples": [
                        (consumed + (m * self.layout.dp + data_rank) * micro + i) % samples for i in range(micro)
                    ],
                    "plan": str(batch.plan),
                    "loss": None if losses is None else losses[m],
                }
                for m, batch in enumerate(batches)
            ],
            "gradients_not_finite": {"count": len(bad), "first": bad[:4]},
        }
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, {"reason": reason, **mine})
        # The reason of the rank that saw it first serves all, so that all take the same way from here.
        self.last = {
            "iteration": iteration,
            "reason": next(rank["reason"] for rank in ranks if rank["reason"] is not None),
            "loss": totals.mean_loss,
            "grad_norm": norm,
            "seed": self.run.seed,
            "consumed_samples": consumed,
            "skipped_samples": self.guard.skipped,
            "samples": len(batches) * self.layout.dp * micro,
            "ranks": ranks,
        }

    def keep(self) -> None:
        """Write the record of the last one."""
        if self.main:
            path = record_path(run_folder(self.run), self.last["iteration"])
            with self.callbacks.writing(path.name):
                write_record(path, self.last)
            self.callbacks.call("on_skip", self.last["iteration"], self.last["reason"], path)

    def roll_back_before(self) -> int | None:
        """Count the last one; when it is time for a rollback, the iteration before which its checkpoint must be.

        Raises:
            TrainingError: too many rollbacks without a good step in between.
        """
        guard, limit = self.guard, self.run.faults.max_rollbacks
        if not guard.bad():
            return None
        self.row = f"step {self.last['iteration']}: {self.last['reason']}, {guard.row} steps in a row"
        if guard.rollbacks >= limit:
            raise TrainingError(
                f"{self.row}, again after {limit} rollbacks (faults.max_rollbacks); {self.records}: look for a broken "
                "device, lower optimizer.lr, or fix the data"
            )
        # A second time without a good step in between, that checkpoint is to blame itself: take the one before.
        return self.last["iteration"] - guard.row + 1 if guard.rolled_back_to is None else guard.rolled_back_to

    def nothing_before(self) -> TrainingError:
        """There is no checkpoint from before them."""
        return TrainingError(f"{self.row}, and no checkpoint before them for a rollback; {self.records}")

    def rolled_back(self, to: int, skipped: int) -> None:
        """Note that the run is at step `to` again and skips `skipped` samples."""
        self.guard.rolled_back(to, skipped)
        log.warning(
            "%s: rollback to the checkpoint of step %d, skipping the %d samples read since; %s",
            self.row, to, skipped, self.records,
        )  # fmt: skip
        self.callbacks.call("on_rollback", self.last["iteration"], to, skipped)


def record_path(folder: Path, iteration: int) -> Path:
    """RUN/faults/batch-ITERATION.json."""
    return folder / FOLDER / f"batch-{iteration:07d}.json"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Keep the facts of a bad step; numbers that are not finite become text, as JSON has none."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_plain(record), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
