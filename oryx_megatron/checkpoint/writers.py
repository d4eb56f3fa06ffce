"""Between a rank and the processes that write its part of a checkpoint.

megatron-core forks a process per rank, which forks another that writes; what was written where comes back through a
queue. Its own queue is a server process per rank, which imports all of torch once more (hundreds of MB and seconds) and
stays behind for ever when the rank is killed. Here it is a pipe and a thread of the rank.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from oryx_megatron import compat, platform
from oryx_megatron.platform.processes import SIGNALLED, how_it_ended

GRACE = 20.0
"""Seconds that a report may take from the pipe to the queue after its writer has ended."""
LOOK = 0.1
"""Seconds between looks at whether a writer was killed."""


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


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's way to save, with less for the training loop to wait for.

    Weights, which data-parallel ranks hold alike, are divided among them. This and the plan, who writes what, are made
    by a gathering of all ranks' parts and kept for the saves after it. megatron-core would keep them without looking
    whether they still hold; here it does as long as every rank's state has the structure that it had. What is in host
    memory is copied to memory that stays from save to save, as torch keeps the pinned memory that a GPU's tensors are
    copied to: fresh memory costs several times the copy. `.metadata` is not written when all parts are, but by whoever
    calls `describe`, on rank 0.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1, cached_metadata=True)
        self._structure: list[Any] | None = None
        self._shares: Any = None
        """Which rank writes which weights, as megatron-core divides them."""
        self._copies: dict[int, torch.Tensor] = {}
        self.describe: Callable[[], None] = lambda: None

    def forget(self) -> None:
        """Make a new plan at the next save, on all ranks: after a save that may have ended differently on each."""
        self._structure = None

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *writers: str) -> AsyncRequest:
        """See megatron-core."""
        entries = list(nested_values(sharded_state_dict))
        structure = [_structure(entry) for entry in entries]
        changed = torch.tensor([structure != self._structure], dtype=torch.int32, device=platform.device())
        torch.distributed.all_reduce(changed, op=torch.distributed.ReduceOp.MAX)
        alike = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if changed.item():
            self.cached_central_plan = self.cached_local_plan = self.cached_global_metadata = None
            self.validated_cache_reuse = False
            self._shares = determine_main_replica_uniform_distribution(sharded_state_dict, alike)
            self._copies.clear()
        distribute_main_replicas_with_precomputed_distribution(sharded_state_dict, alike, self._shares)
        self._structure = structure
        for i, entry in enumerate(entries):
            if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id) and entry.data.is_cpu:
                if i not in self._copies:
                    self._copies[i] = torch.empty(entry.data.shape, dtype=entry.dtype)
                entry.data = self._copies[i].copy_(entry.data.detach())
        return super().async_save(sharded_state_dict, checkpoint_dir, *writers)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *writers: str) -> AsyncRequest:
        self.describe = lambda: None
        finish = writer.finish

        def keep(metadata: Any, results: Any) -> None:
            self.describe = lambda: finish(metadata, results)

        writer.finish = keep
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *writers)
        if request.async_fn is None:  # nothing of this rank's to write
            return request
        return request._replace(async_fn=functools.partial(_watched, request.async_fn))


def _watched(write: Callable[..., None], *arguments: Any) -> None:
    """Write, in the process under a rank; end when one under it is killed, for which megatron-core would wait."""
    threading.Thread(target=_watch, daemon=True, name="watch writers").start()
    write(*arguments)


def _watch() -> None:
    while True:
        time.sleep(LOOK)
        with contextlib.suppress(ChildProcessError):  # none started yet, or all are joined
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None and ended.si_code != os.CLD_EXITED:
                os._exit(SIGNALLED + ended.si_status)


def _structure(entry: ShardedTensor | ShardedObject) -> tuple[Any, ...]:
    """What a plan depends on."""
    if isinstance(entry, ShardedTensor):
        return entry.key, entry.global_offset, entry.local_shape, entry.global_shape, entry.dtype, entry.replica_id
    return entry.unique_key, entry.replica_id


def look_at(callers: Iterable[Any]) -> tuple[bool, str]:
    """Whether the writers behind megatron-core's async callers have ended; how one of them died, in words, or empty."""
    done, died = True, ""
    for caller in callers:
        process = caller.process
        done = caller.is_current_async_call_done(no_dist=True) and done
        if process is not None and process.exitcode:
            died = f"its writer {how_it_ended(process.exitcode)}"
    return done, died


def renew_reports() -> None:
    """Give the next saves a queue that no earlier writer can report to."""
    compat.megatron.report_to(ReportQueue)


def end_writers(callers: Iterable[Any]) -> None:
    """Kill the writers behind megatron-core's async callers, with the processes that they have started."""
    for caller in callers:
        if caller.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(caller.process.pid).children(recursive=True):
                    child.kill()
        caller.close(abort=True)
