"""Stopping a run from outside so that it can be started again: signals, the time limit of a job, the marker file.

SIGTERM, SIGUSR1, SIGINT and SIGHUP only leave a note; rank 0 says at once what follows. At the end of every step all
ranks add up their notes (in the all-reduce that makes the attention share), so that all stop after the same step, save,
and leave. A second SIGINT, at least a second after the first, ends the process at once: a terminal and torchrun may
both deliver the first. Where SIGHUP was ignored from the start, as under nohup, it stays so: the terminal may close.

How the outside learns that the run wants to resume:
- rank 0 writes RUN/requeue (JSON: code, reason, iteration, time) when the checkpoint is complete, and removes it when a
  run starts. It is there if, and only if, the run stopped with everything saved and has steps left. While a router is
  trained at the end of a run (the config's `router`), it is there too: the next start does that.
- without torchrun the process exits with errors.REQUEUE_EXIT_CODE.
- under torchrun ranks exit with 0. torchrun takes every other code for a failure, would start the ranks again while
  restarts are left, and itself only ever exits with 0 or 1. So a launch script looks for the marker:
      torchrun …; code=$?; [[ -e $RUN/requeue ]] && code=75

Signals under torchrun (torch/distributed/elastic): the agent forwards SIGTERM, SIGINT and SIGHUP (--signals-to-handle
names others, such as SIGUSR1, of which it would die) to the process groups of its ranks, waits
TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (environment, default 30) and kills. Set it to what a step and a save take. The
agent then exits with 1; the marker tells that all is well. Signals sent to any one rank have the same effect and leave
the agent alone. Under nohup torchrun still takes SIGHUP; oryx_megatron.agent does not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil

from oryx_megatron.config.schema import FaultsConfig
from oryx_megatron.data.files import write_json
from oryx_megatron.errors import REQUEUE_EXIT_CODE, ConfigError

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
REASONS = (*(s.name for s in SIGNALS), "time limit")
"""Why a run may stop early; a rank's notes are as many numbers, 0 or 1."""
TIME_LIMIT_AT = "ORYX_TIME_LIMIT_AT"
"""Environment variable: unix time at which the job ends."""
MARKER = "requeue"
MARKER_FILE = "ORYX_REQUEUE_MARKER"
"""Environment variable: a file to leave beside RUN/requeue."""
ECHO = 1.0
"""Seconds within which a second SIGINT counts as the first one's copy."""


@dataclass(frozen=True)
class Stop:
    """How a run ended before its end."""

    reason: str
    iteration: int
    """Steps done, all saved."""


class StopRequest:
    """This rank's notes of why the run should stop.

    Args:
        main: Whether this rank says so when the first signal comes.
    """

    def __init__(self, *, main: bool = False) -> None:
        self._signals = [0.0] * len(SIGNALS)
        self._interrupted = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._told = not main
        self._limit: float | None = None
        self._margin = 0.0

    def install(self) -> Self:
        """Take over the signals; in the main thread only."""
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        return self

    def restore(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def limit_time(self, faults: FaultsConfig) -> None:
        """Ask to stop `time_margin` before the job ends.

        Raises:
            ConfigError: ORYX_TIME_LIMIT_AT is no unix time.
        """
        limits = [] if faults.time_limit is None else [_job_started() + faults.time_limit]
        if text := os.environ.get(TIME_LIMIT_AT, "").strip():
            try:
                limits.append(float(text))
            except ValueError:
                raise ConfigError(f"{TIME_LIMIT_AT}: {text!r} is no unix time in seconds; unset it") from None
        self._limit, self._margin = min(limits, default=None), faults.time_margin

    def notes(self, *, longest: float = 0.0, started: bool = True) -> list[float]:
        """One number for each of REASONS, 1 where this rank wants to stop.

        Args:
            longest: Seconds that a step, an evaluation and a save took together; a margin is at least twice this.
            started: Whether this process has done a step; the time limit waits for one, so that every start gets on.
        """
        late = self._limit is not None and time.time() > self._limit - max(self._margin, 2 * longest)
        return [*self._signals, float(late and started)]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals[SIGNALS.index(signal.Signals(number))] = 1.0
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now - self._interrupted > ECHO:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        if not self._told:
            self._told = True
            again = "; Ctrl-C again ends at once, without saving" if number == signal.SIGINT else ""
            text = f"{signal.Signals(number).name}: finishing what is under way, then saving a checkpoint{again}\n"
            with contextlib.suppress(OSError):  # no print: the signal may have come in the middle of one
                os.write(2, text.encode())


def decide(votes: Sequence[float]) -> str | None:
    """Why to stop, from the sums of all ranks' notes and so the same on all of them; None to continue."""
    return " and ".join(reason for reason, count in zip(REASONS, votes, strict=True) if count > 0) or None


def write_marker(folder: Path, stop: Stop) -> None:
    """Leave RUN/requeue."""
    content = {"code": REQUEUE_EXIT_CODE, "reason": stop.reason, "iteration": stop.iteration, "time": time.time()}
    for path in _markers(folder):
        write_json(path, content)


@contextlib.contextmanager
def resumable(folder: Path, stop: Stop) -> Iterator[None]:
    """Leave RUN/requeue meanwhile: if killed inside, the run asks a launch script to be started again."""
    write_marker(folder, stop)
    try:
        yield
    finally:
        remove_marker(folder)


def remove_marker(folder: Path) -> None:
    """Remove RUN/requeue, as a start does."""
    for path in _markers(folder):
        path.unlink(missing_ok=True)


def _markers(folder: Path) -> dict[Path, None]:
    """RUN/requeue, and where the job's script looks for it: of a run on object storage that is elsewhere."""
    named = os.environ.get(MARKER_FILE, "").strip()
    return dict.fromkeys([folder / MARKER, *([Path(named)] if named else [])])


def exit_code() -> int:
    """What a stopped run's process returns: torchrun would count any code but 0 as a failure."""
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else REQUEUE_EXIT_CODE


def _job_started() -> float:
    """Unix time at which this process began, or torchrun's agent, which outlives restarts of its ranks."""
    process = psutil.Process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process = process.parent() or process
    return process.create_time()
