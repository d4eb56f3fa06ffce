"""Hooks into the training loop, and what calls them.

A callback sees finished facts and never communicates between ranks, so that an error in one cannot leave other ranks
waiting. Callbacks that report exist on rank 0 only, the profiler's on ranks that it is asked for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oryx_megatron.config.schema import RunConfig
from oryx_megatron.train.evaluate import Evaluation
from oryx_megatron.train.routing import Routing

log = logging.getLogger(__name__)


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
    routing: Routing | None = None
    """What the routers did; None without experts."""
    logit_z_loss: float | None = None
    """Penalty on the normaliser of the softmax, weighted, per token; not part of `loss`. None: off."""
    mtp_losses: list[float] = field(default_factory=list)
    """Nats per token of each head of multi-token prediction, unweighted; not part of `loss`."""
    memory_bytes: int = 0
    """platform.memory.used_bytes of the main rank."""
    loss_by_mode: dict[str, float] = field(default_factory=dict)
    """Nats per token of this rank's microbatches read in one mode (`attention`, `recurrent`) or in both (`mixed`)."""

    def figures(self) -> dict[str, Any]:
        """All but `routing` itself, and of that what is one number; without what this run does not have."""
        apart = ("routing", "mtp_losses")
        own = {name: value for name, value in vars(self).items() if name not in apart and value is not None}
        return own | self.scalars() | ({"mtp_losses": self.mtp_losses} if len(self.mtp_losses) > 1 else {})

    def scalars(self) -> dict[str, float]:
        """What some runs report only: of routers, the z-loss, and the heads' mean loss."""
        found = self.routing.scalars() if self.routing is not None else {}
        if self.logit_z_loss is not None:
            found["logit_z_loss"] = self.logit_z_loss
        if self.mtp_losses:
            found["mtp_loss"] = sum(self.mtp_losses) / len(self.mtp_losses)
        return found


class Callback:
    """Does nothing at every hook."""

    def on_start(self, run: RunConfig, iteration: int) -> None:
        """Before the first step; `iteration` steps were done by earlier processes."""

    def on_change(self, iteration: int, changes: list[tuple[str, Any, Any]]) -> None:
        """After `on_start` of a run that resumes with other values: name, value in the checkpoint, value now."""

    def before_step(self, iteration: int) -> None:
        """Before step number `iteration`, from 1."""

    def on_step(self, record: StepRecord) -> None:
        """After every step."""

    def on_skip(self, iteration: int, reason: str, path: Path) -> None:
        """After `on_step` of a bad step; `path` is its batch, kept for replay."""

    def on_rollback(self, iteration: int, to: int, skipped: int) -> None:
        """When the run rolled back from `iteration` to the checkpoint of `to`; it skips `skipped` samples in all."""

    def on_slow(self, iteration: int, text: str) -> None:
        """When a rank lags behind its peers."""

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        """After every evaluation."""

    def on_checkpoint(self, path: str) -> None:
        """When a checkpoint is complete; `path` may be a URL."""

    def on_finish(self, iteration: int, reason: str | None, saved: int | None) -> None:
        """When the loop ended well; `reason` when that is before train.iterations; `saved`: the newest checkpoint."""

    def on_end(self) -> None:
        """After the last step, or when the loop is left by an error."""


class Callbacks(list[Callback]):
    """Callbacks in the order in which they are called. A full disk costs reports, not the run."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        super().__init__(callbacks)
        self._mute: set[str] = set()

    def call(self, hook: str, *arguments: object) -> None:
        """Call one of the hooks of `Callback` of each."""
        for callback in self:
            with self.writing(type(callback).__name__):
                getattr(callback, hook)(*arguments)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Log an OSError instead of raising it, each kind once until it works again."""
        try:
            yield
        except OSError as error:
            if what not in self._mute:
                log.error("%s cannot write (%s); training continues without it until there is room", what, error)
            self._mute.add(what)
        else:
            self._mute.discard(what)
