"""Between a rank and the processes that write its part of a checkpoint.

megatron-core forks a process per rank, which forks another that writes; what was written where comes back through a
queue. Its own queue is a server process per rank, with all of torch imported anew (hundreds of MB and seconds), that
stays behind for ever when the rank is killed. Here it is a pipe and a thread of the rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Iterable
from typing import Any

import psutil
from megatron.core.dist_checkpointing.strategies import filesystem_async

GRACE = 20.0
"""Seconds that a report may take from the pipe to the queue after its writer has ended."""


class ReportQueue:
    """What megatron-core uses of a queue: `put` in the writer, `get_nowait` in the rank once the writer has ended."""

    def __init__(self) -> None:
        self._reading, self._writing = multiprocessing.Pipe(duplex=False)
        self._reports: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._receive, daemon=True, name="checkpoint reports").start()

    def _receive(self) -> None:
        while True:
            try:
                self._reports.put(self._reading.recv())
            except (EOFError, OSError):
                self._reading.close()
                return

    def put(self, report: Any) -> None:
        """Send a report; in the writer only. Fails when the rank is gone."""
        self._reading.close()  # this process's copy, which would keep the pipe open
        self._writing.send(report)

    def get_nowait(self) -> Any:
        """The report of a writer that has ended; queue.Empty when it left none."""
        return self._reports.get(timeout=GRACE)


    def close(self) -> None:
        """Let the thread end, once no writer is left that could report."""
        self._writing.close()


def renew_reports() -> None:
    """Give the next saves a queue that no earlier writer can report to."""
    if isinstance(filesystem_async._results_queue, ReportQueue):
        filesystem_async._results_queue.close()
    filesystem_async._results_queue = ReportQueue()


def end_writers(callers: Iterable[Any]) -> None:
    """Kill the writers behind megatron-core's async callers, with the processes that they have started."""
    for caller in callers:
        if caller.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(caller.process.pid).children(recursive=True):
                    child.kill()
        caller.close(abort=True)
