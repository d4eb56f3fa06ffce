"""A rank that makes no progress: who hangs, in what, and an end within a bound.

A thread of every rank looks at when its main thread last got on, and leaves a sign of life with the rendezvous store.
After faults.hang_timeout seconds without progress it writes all Python stacks to RUN/faults/stacks-rankN.txt, with
NCCL's flight recorder beside it where there is one, says on stderr what the rank waits in and which ranks give no sign
or hang outside of a collective, and ends the process with errors.HANG_EXIT_CODE. torchrun then starts all ranks again
(--max-restarts): it sends SIGTERM to the rest and kills after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (default 30). So
a hang costs at most hang_timeout, a quarter of it between looks, and that.

Should the main thread hold the interpreter's lock, no thread of Python can run: faulthandler's own, which needs no
lock, then writes the stacks and ends the process a little later.

Where nvidia-resiliency-ext's launcher started this rank, its monitor is told of every step too, at any hang_timeout.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from oryx_megatron import parallel, platform
from oryx_megatron.errors import HANG_EXIT_CODE

log = logging.getLogger(__name__)

LOCKED = 1.5
"""Times hang_timeout after which faulthandler ends a process whose threads cannot run."""
FIRST = 10.0
"""Times hang_timeout that the first step may take: kernels are compiled in it."""
MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
"""Environment variable by which nvidia-resiliency-ext's launcher tells its ranks of their monitor."""


class Watchdog:
    """Watches this rank's main thread. Use as a context manager; `beat` whenever it got on.

    Args:
        folder: RUN.
        timeout: faults.hang_timeout; None does nothing at all.
    """

    def __init__(self, folder: Path, timeout: float | None) -> None:
        self.folder, self.timeout = folder / "faults", timeout
        self.rank = torch.distributed.get_rank()
        self.world = torch.distributed.get_world_size()
        self._doing, self._since, self._allowed = "starting", time.monotonic(), 0.0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: Any = None
        self._main = threading.main_thread().ident
        self._monitor: Any = None

    def __enter__(self) -> Watchdog:
        if MONITOR in os.environ:
            from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

            self._monitor = RankMonitorClient()
            self._monitor.init_workload_monitoring()
        if self.timeout is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.stacks_path.open("w")
            self._main = threading.get_ident()
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self.beat("starting", first=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if self._monitor is not None:
            self._monitor.shutdown_workload_monitoring()
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join(5.0)
            self._file.close()
            if self.stacks_path.stat().st_size == 0:
                self.stacks_path.unlink()

    @property
    def stacks_path(self) -> Path:
        """RUN/faults/stacks-rankN.txt."""
        return self.folder / f"stacks-rank{self.rank}.txt"

    def beat(self, doing: str, *, first: bool = False, more: float = 0.0) -> None:
        """The main thread got on and now does `doing`, which may take hang_timeout, longer the first time.

        Args:
            doing: For messages, e.g. `in step 7`.
            first: Whether kernels may still have to be compiled.
            more: Seconds that it may take on top, for what has a timeout of its own.
        """
        if self._monitor is not None:
            self._monitor.send_heartbeat()
        if self.timeout is None:
            return
        self._allowed = self.timeout * (FIRST if first else 1.0) + more
        self._doing, self._since = doing, time.monotonic()
        faulthandler.dump_traceback_later(LOCKED * self._allowed + 5.0, exit=True, file=self._file)

    # ------------------------------------------------------------------------------------------------- internals

    def _watch(self) -> None:
        assert self.timeout is not None
        store = _store()
        while True:
            idle = time.monotonic() - self._since
            sign = {"time": time.time(), "idle": idle, "doing": self._doing, "host": socket.gethostname()}
            _put(store, f"alive/{self.rank}", sign | {"waits": self._waits_in()})
            if idle > self._allowed:
                self._give_up(store, idle)
            if self._end.wait(min(self.timeout / 4, 10.0)):
                return

    def _give_up(self, store: Any, idle: float) -> None:
        """Write down what is known and end the process."""
        waits = self._waits_in()
        lines = [
            f"rank {self.rank} ({socket.gethostname()}) made no progress for {idle:.0f} s while {self._doing}: "
            f"{waits or 'it waits in no collective'}{self._flight_recorder()}",
            *self._others(store),
        ]
        try:
            self._file.write("\n".join(lines) + "\n\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.flush()
        except OSError as error:
            lines.append(f"stacks could not be written: {error}")
        stacks = f"stacks in {self.stacks_path}; ending with {HANG_EXIT_CODE} for torchrun to restart all ranks"
        sys.stderr.write("".join(f"error on rank {self.rank}: {line}\n" for line in (*lines, stacks)))
        sys.stderr.flush()
        os._exit(HANG_EXIT_CODE)

    def _others(self, store: Any) -> list[str]:
        """What the other ranks' signs of life say: first who gives none, then who hangs outside of a collective."""
        assert self.timeout is not None
        silent, elsewhere = [], []
        if _get(store, f"alive/{self.rank}") is None:  # the store is gone: nothing is known
            return []
        for rank in range(self.world):
            if rank == self.rank:
                continue
            sign = _get(store, f"alive/{rank}")
            if sign is None:
                silent.append(f"rank {rank} has given no sign of life since the start")
                continue
            age = time.time() - sign["time"]
            if age > min(self.timeout / 2, 30.0) + 1.0:
                silent.append(f"rank {rank} ({sign['host']}) gives no sign of life for {age:.0f} s: stopped or gone")
            elif not sign["waits"] and sign["idle"] > self.timeout / 2:
                elsewhere.append(f"rank {rank} ({sign['host']}) is busy {sign['doing']} for {sign['idle']:.0f} s")
        return silent + elsewhere

    def _waits_in(self) -> str:
        """The collective that the main thread is in, and who called it; empty when it is in none."""
        frame = sys._current_frames().get(self._main or 0)
        return _collective(frame) if frame is not None else ""

    def _flight_recorder(self) -> str:
        """Keep NCCL's record of this rank's latest collectives, where there is one; the unfinished one in words."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if dump is None or not platform.has_gpu():
            return ""
        try:
            record = dump()
            path = self.stacks_path.with_name(f"nccl-rank{self.rank}.json")
            path.write_bytes(record if isinstance(record, bytes) else record.encode())
            entries = json.loads(record).get("entries", ())
        except (OSError, RuntimeError, ValueError) as error:
            return f"; NCCL's flight recorder gave nothing ({error})"
        open_ones = [entry for entry in entries if entry.get("state") != "completed"]
        if not open_ones:
            return f"; no collective of NCCL is under way ({path.name})"
        name, group = (open_ones[0].get(key) for key in ("profiling_name", "process_group"))
        return f"; NCCL has not finished {name} of group {group} ({path.name})"


def _collective(frame: FrameType) -> str:
    """Walk up a stack to torch's collective and the first frame outside of torch."""
    name = ""
    for entry, line in traceback.walk_stack(frame):
        file = entry.f_code.co_filename
        inside = "/torch/" in file
        if inside and file.endswith(("distributed_c10d.py", "torch/cuda/__init__.py")):
            function = entry.f_code.co_name
            name = function if not function.startswith("_") else name or function
        elif name and not inside:
            return f"it waits in {name}, called from {Path(file).name}:{line} ({entry.f_code.co_name})"
    return ""


def _store() -> Any:
    """An own connection to the rendezvous store: the main thread's is locked while it waits. None without one."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if torch.distributed.get_world_size() == 1 or not address or not port:
        return None
    try:
        store = torch.distributed.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=10))
        return torch.distributed.PrefixStore(f"watchdog/{parallel.start_name()}", store)
    except (RuntimeError, ValueError) as error:
        log.warning("the watchdog cannot reach the rendezvous store (%s): it will not name other ranks", error)
        return None


def _put(store: Any, key: str, value: dict[str, Any]) -> None:
    if store is not None:
        try:
            store.set(key, json.dumps(value))
        except RuntimeError:
            log.debug("no rendezvous store", exc_info=True)  # its host is gone; this rank hangs soon enough


def _get(store: Any, key: str) -> dict[str, Any] | None:
    try:
        return json.loads(store.get(key)) if store is not None and store.check([key]) else None
    except (RuntimeError, ValueError):
        return None
