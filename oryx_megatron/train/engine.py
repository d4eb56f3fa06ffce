"""What moves parameters in a training run: megatron-core, or DeepSpeed (deepspeed.py) behind the same methods."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from oryx_megatron import platform
from oryx_megatron.checkpoint import CheckpointManager
from oryx_megatron.checkpoint.manager import Checkpoints
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.model import build_model
from oryx_megatron.model.warm import compile_in_turn
from oryx_megatron.train.optimizer import (
    apply_gradients,
    build_optimizer,
    build_schedule,
    connect,
    gradient_norm,
    wrap,
)
from oryx_megatron.train.step import Microbatch, Totals, forward_backward

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Model, optimizer and learning rate of one run on this rank. Every method is collective."""

    chunks: list[Any]
    """Model chunks that `forward_backward(…, forward_only=True)` can evaluate."""

    def gradients(self, batches: list[Microbatch]) -> Totals:
        """Forward and backward pass of a step's microbatches."""

    def gradient_norm(self) -> float:
        """Of those gradients, over all ranks, before clipping."""

    def update(self, norm: float) -> None:
        """Clip gradients of this norm and apply them."""

    def discard(self) -> None:
        """Drop the gradients instead of applying them."""

    def learning_rate(self) -> float:
        """Of the next update."""

    def advance(self) -> None:
        """Move the learning rate on by a step, whether or not it was applied."""

    def rewind(self, iteration: int) -> None:
        """Set the learning rate to where `iteration` steps are done."""

    def checkpoints(self, root: Path) -> Checkpoints:
        """The checkpoints of this engine under `root`."""


class MegatronEngine:
    """megatron-core's data-parallel wrapper, optimizer and pipeline schedules."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.chunks: list[Any] = wrap(run, build_model(run.model, run.parallel, run.precision, seed=run.seed))
        warm(run, self.chunks)
        self.optimizer = build_optimizer(run, self.chunks)
        self.schedule = build_schedule(run, self.optimizer)
        connect(run, self.chunks, self.optimizer)

    def gradients(self, batches: list[Microbatch]) -> Totals:
        """See Engine."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return forward_backward(self.chunks, batches, forward_only=False)

    def gradient_norm(self) -> float:
        """See Engine."""
        return gradient_norm(self.optimizer)

    def update(self, norm: float) -> None:
        """See Engine."""
        apply_gradients(self.optimizer, norm)

    def discard(self) -> None:
        """See Engine: the next step begins by clearing them."""

    def learning_rate(self) -> float:
        """See Engine."""
        return float(get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0)

    def advance(self) -> None:
        """See Engine."""
        self.schedule.step(increment=1)

    def rewind(self, iteration: int) -> None:
        """See Engine."""
        self.schedule.num_steps = 0
        self.schedule.step(increment=iteration)

    def checkpoints(self, root: Path) -> CheckpointManager:
        """See Engine."""
        return CheckpointManager(root, self.run.checkpoint, self.chunks, self.optimizer)


def warm(run: RunConfig, chunks: list[Any]) -> None:
    """Compile the kernels of this run's model, where kernels are compiled."""
    if platform.has_gpu():
        log.info("kernels ready after %.0f s", compile_in_turn(run, chunks))
