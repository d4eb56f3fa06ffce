"""A window of steps under torch's profiler: RUN/profile/."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from oryx_megatron import platform
from oryx_megatron.data.files import replacing
from oryx_megatron.display import shown
from oryx_megatron.storage import Remote, StorageError
from oryx_megatron.train.callbacks.base import Callback, StepRecord
from oryx_megatron.train.traces import Trace

log = logging.getLogger(__name__)
FOLDER = "profile"
LARGEST = 10
"""Kernels, gaps and allocations that are printed; the file has more."""
HISTORY = 100_000
"""Allocations that a memory snapshot remembers."""
WIDTH = 80


class Profile(Callback):
    """Traces steps `first` to `last`, both included, on this rank; outside of them nothing is done.

    Writes, as RUN/profile/rankR-stepsA-B.*: `trace.json.gz` (chrome://tracing, Perfetto), `memory.pickle` on a GPU
    (pytorch.org/memory_viz), and `txt`, a summary whose beginning goes to the terminal.

    CUDA graphs: the profiler begins and ends between steps, so in no capture; a replayed graph's kernels are traced one
    by one. CUPTI is not torn down at the end, as torch does it for graphs of its own: the next replay would crash.

    Args:
        folder: RUN.
        first: First step, from 1.
        last: Last step.
        out: Terminal; None on ranks that print nothing.
        remote: RUN on object storage, of which `folder` is this machine's part: files are copied there at once, since
            only rank 0's machine copies the rest.
    """

    def __init__(
        self, folder: Path, first: int, last: int, out: TextIO | None = sys.stdout, remote: Remote | None = None
    ) -> None:
        self.folder, self.first, self.last, self.out = folder / FOLDER, first, last, out
        self.remote = None if remote is None else remote / FOLDER
        self._profiler: Any = None
        self._began = self._done = 0
        if platform.has_gpu():
            os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
            os.environ.setdefault("TEARDOWN_CUPTI", "0")

    def before_step(self, iteration: int) -> None:
        if self._profiler is not None or not self.first <= iteration <= self.last:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if platform.has_gpu():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        self._began = iteration
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.start()

    def on_step(self, record: StepRecord) -> None:
        self._done = record.iteration
        if record.iteration >= self.last:
            self._finish()

    def on_rollback(self, iteration: int, to: int, skipped: int) -> None:
        self._finish()

    def on_end(self) -> None:
        self._finish()

    def _finish(self) -> None:
        """End the window, if it is open, and write what was seen."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        platform.synchronize()
        profiler.stop()
        name = f"rank{torch.distributed.get_rank()}-steps{self._began}-{self._done}"
        allocations = _largest_operators(profiler)
        try:
            with replacing(self.folder / f"{name}.trace.json.gz") as temporary:
                # The profiler compresses what is named .gz.
                written = temporary.with_name(f"{temporary.name}.gz")
                profiler.export_chrome_trace(str(written))
                written.rename(temporary)
            if platform.has_gpu():
                allocations = _largest_blocks(torch.cuda.memory._snapshot()) or allocations
                with replacing(self.folder / f"{name}.memory.pickle") as temporary:
                    torch.cuda.memory._dump_snapshot(str(temporary))
        finally:
            if platform.has_gpu():
                torch.cuda.memory._record_memory_history(enabled=None)
        trace = Trace.read(self.folder / f"{name}.trace.json.gz")
        with replacing(self.folder / f"{name}.txt") as temporary:
            temporary.write_text(trace.report() + _listed(allocations, 100, 150))
        place = self._copy(name)
        if self.out is not None:
            text = trace.report(LARGEST, LARGEST, WIDTH) + _listed(allocations, LARGEST, WIDTH)
            where = f"profile of steps {self._began} to {self._done}: {place}/{name}.*"
            self.out.write("".join(f"{shown(line)}\n" for line in (where, *text.splitlines())))
            self.out.flush()

    def _copy(self, name: str) -> Path | Remote:
        """Copy what was written to object storage, for a run there; where it can be found."""
        if self.remote is None:
            return self.folder
        try:
            for path in sorted(self.folder.glob(f"{name}.*")):
                (self.remote / path.name).upload(path)
        except StorageError as error:
            log.error("%s; the profile stays in %s", error, self.folder)
            return self.folder
        return self.remote


def _largest_operators(profiler: Any) -> list[tuple[int, str]]:
    """Bytes that each operator allocated and did not free itself, largest first."""
    field = "self_device_memory_usage" if platform.has_gpu() else "self_cpu_memory_usage"
    found = ((int(getattr(event, field, 0)), event.key) for event in profiler.key_averages())
    return sorted((entry for entry in found if entry[0] > 0), reverse=True)


def _largest_blocks(snapshot: dict[str, Any]) -> list[tuple[int, str]]:
    """Bytes of every living block of a memory snapshot, and the line of ours or of Megatron's that asked for it."""
    found = []
    for segment in snapshot.get("segments", ()):
        for block in segment.get("blocks", ()):
            if block.get("state") != "active_allocated" or not block.get("frames"):
                continue
            frames = [frame for frame in block["frames"] if str(frame.get("filename", "")).endswith(".py")]
            inner = [frame for frame in frames if "/torch/" not in frame["filename"]] or frames
            if inner:
                place = f"{Path(inner[0]['filename']).name}:{inner[0].get('line')} ({inner[0].get('name')})"
                found.append((int(block["size"]), place))
    return sorted(found, reverse=True)


def _listed(allocations: list[tuple[int, str]], count: int, width: int) -> str:
    lines = ["largest allocations: MB, by whom"]
    lines += [f"{size / 1e6:9.3f}  {name[: width - 11]}" for size, name in allocations[:count]]
    return "\n".join(lines) + "\n"
