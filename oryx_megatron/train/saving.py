"""Checkpoints during training: a save that fails is reported, and training continues with the last good one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from oryx_megatron.checkpoint.manager import Checkpoints
from oryx_megatron.checkpoint.manifest import MakeManifest
from oryx_megatron.errors import CheckpointError
from oryx_megatron.train.callbacks import Callbacks
from oryx_megatron.train.clock import Clock
from oryx_megatron.train.watchdog import Watchdog

log = logging.getLogger(__name__)


class Saver:
    """Saves of one run. Every method is collective.

    Args:
        checkpoints: The engine's.
        timeout: Seconds that a save may take (checkpoint.timeout), on top of faults.hang_timeout.
        clock: Counts the time that training stood still.
        watchdog: Is told of every save.
        callbacks: Are told of every complete checkpoint.
    """

    def __init__(
        self, checkpoints: Checkpoints, timeout: float, clock: Clock, watchdog: Watchdog, callbacks: Callbacks
    ) -> None:
        self.checkpoints, self.timeout = checkpoints, timeout
        self.clock, self.watchdog, self.callbacks = clock, watchdog, callbacks
        self.saved: int | None = None
        """Iteration of the last save that began, or of the checkpoint that was loaded."""
        self.whole: int | None = None
        """Iteration of the newest checkpoint that is complete."""
        self.error: CheckpointError | None = None
        """Why the last save failed."""

    def loaded(self, iteration: int) -> None:
        """The run is at a checkpoint that is there."""
        self.saved = self.whole = iteration

    def save(self, iteration: int, manifest: MakeManifest) -> None:
        """Write a checkpoint, or begin to, unless that of `iteration` is there."""
        if self.saved == iteration:
            return
        self.wait()
        self.saved = iteration
        self._complete(lambda: self.checkpoints.save(iteration, manifest), more=self.timeout)

    def poll(self) -> None:
        """Complete a background save whose writers are done: a look, which takes no time of its own."""
        self._complete(self.checkpoints.poll, more=0.0)

    def wait(self) -> None:
        """Complete the save in progress, if any."""
        self._complete(self.checkpoints.wait, more=self.timeout)

    def finish(self) -> None:
        """Complete the last save.

        Raises:
            CheckpointError: it failed.
        """
        self.wait()
        if self.error is not None:
            raise self.error

    def _complete(self, complete: Callable[[], Path | None], *, more: float) -> None:
        self.watchdog.beat("with a checkpoint", more=more)
        try:
            with self.clock.time("checkpoint"):
                path = complete()
        except CheckpointError as error:
            log.error("%s; training continues, the last good checkpoint stays", error)
            self.error = error
            return
        if path is not None:
            self.error, self.whole = None, self.saved
            self.callbacks.call("on_checkpoint", f"{self.checkpoints.name}/{path.name}")
