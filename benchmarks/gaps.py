"""What a GPU did in a while: its kernels by time, and how long it had none."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that occupy the GPU."""


@dataclass(frozen=True)
class Profile:
    """Milliseconds, from the first kernel (or copy) to the last."""

    span: float
    idle: float
    """Without any kernel."""
    exchange: float
    """In which NCCL's kernels ran."""
    count: int
    kernels: list[tuple[float, int, str]]
    """Time, calls and name, longest first."""
    gaps: list[tuple[float, str, str]]
    """Length and the kernels around it, longest first."""

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Profile:
        """Run `work` under torch's profiler."""
        from torch.profiler import ProfilerActivity

        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(trace))
            with gzip.open(trace) as file:
                events = [event for event in json.load(file)["traceEvents"] if event.get("cat") in GPU_WORK]
        events.sort(key=lambda event: event["ts"])
        first = end = events[0]["ts"]
        idle, exchange, last = 0.0, 0.0, events[0]
        gaps: list[tuple[float, str, str]] = []
        totals: dict[str, tuple[float, int]] = {}
        for event in events:
            name = event["name"]
            time, calls = totals.get(name, (0.0, 0))
            totals[name] = (time + event["dur"], calls + 1)
            exchange += event["dur"] if "nccl" in name else 0.0
            if event["ts"] > end:
                idle += event["ts"] - end
                gaps.append(((event["ts"] - end) / 1e3, last["name"], name))
            if event["ts"] + event["dur"] > end:
                end, last = event["ts"] + event["dur"], event
        kernels = sorted(((time / 1e3, calls, name) for name, (time, calls) in totals.items()), reverse=True)
        return cls((end - first) / 1e3, idle / 1e3, exchange / 1e3, len(events), kernels, sorted(gaps, reverse=True))

    def report(self) -> str:
        """The longest of everything, for a file."""
        lines = [
            f"{self.span:.1f} ms from the first kernel to the last of {self.count}, {self.idle:.1f} ms without one, "
            f"{self.exchange:.1f} ms of NCCL",
            f"{'ms':>9} {'calls':>6}  kernel",
        ]
        lines += [f"{time:9.3f} {calls:6d}  {name[:150]}" for time, calls, name in self.kernels[:100]]
        lines += ["", "longest gaps: ms, kernel before, kernel after"]
        lines += [f"{gap:9.3f}  {before[:60]}  →  {after[:60]}" for gap, before, after in self.gaps[:25]]
        return "\n".join(lines) + "\n"
