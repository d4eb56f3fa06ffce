"""What a trace of torch's profiler says: kernels (CPU operators without a GPU) by time, and gaps without any."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that occupy the GPU."""
CPU_WORK = ("cpu_op",)


@dataclass(frozen=True)
class Trace:
    """Milliseconds, from the begin of the first kernel (copy, operator) to the end of the last."""

    span: float
    idle: float
    """Without any kernel."""
    exchange: float
    """In which NCCL's kernels ran."""
    count: int
    kernels: list[tuple[float, int, str]]
    """Time, calls and name, longest first; of an operator the time outside of those that it calls."""
    gaps: list[tuple[float, str, str]]
    """Length and the kernels around it, longest first."""
    gpu: bool
    """Whether these are kernels of a GPU."""

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Trace:
        """Run `work` on the GPU under torch's profiler."""
        import tempfile

        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(path))
            return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Trace:
        """A trace as torch.profiler exports it, .json.gz."""
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        return cls.from_events(events)

    @classmethod
    def from_events(cls, events: Iterable[dict[str, Any]]) -> Trace:
        """Of Chrome's trace events: `ts` and `dur` in microseconds, `cat`, `name`, `tid`."""
        events = list(events)
        work = [event for event in events if event.get("cat") in GPU_WORK]
        gpu = bool(work)
        if not gpu:
            work = [event for event in events if event.get("cat") in CPU_WORK]
        if not work:
            return cls(0.0, 0.0, 0.0, 0, [], [], gpu)
        work.sort(key=lambda event: (event["ts"], -event["dur"]))
        first = end = work[0]["ts"]
        idle, last = 0.0, work[0]
        gaps: list[tuple[float, str, str]] = []
        for event in work:
            if event["ts"] > end:
                idle += event["ts"] - end
                gaps.append(((event["ts"] - end) / 1e3, last["name"], event["name"]))
            if event["ts"] + event["dur"] > end:
                end, last = event["ts"] + event["dur"], event
        totals: dict[str, tuple[float, int]] = {}
        own = [event["dur"] for event in work] if gpu else _outside_of_calls(work)
        for event, duration in zip(work, own, strict=True):
            time, calls = totals.get(event["name"], (0.0, 0))
            totals[event["name"]] = (time + duration, calls + 1)
        return cls(
            span=(end - first) / 1e3,
            idle=idle / 1e3,
            exchange=sum(time for name, (time, _) in totals.items() if "nccl" in name) / 1e3,
            count=len(work),
            kernels=sorted(((time / 1e3, calls, name) for name, (time, calls) in totals.items()), reverse=True),
            gaps=sorted(gaps, reverse=True),
            gpu=gpu,
        )

    def report(self, kernels: int = 100, gaps: int = 25, width: int = 150) -> str:
        """The longest of everything, in lines of at most about `width` columns."""
        what = "kernel" if self.gpu else "operator"
        nccl = f", {self.exchange:.1f} ms of NCCL" if self.gpu else ""
        lines = [
            f"{self.count} {what}s in {self.span:.1f} ms, {self.idle:.1f} ms without one{nccl}",
            f"{'ms':>9} {'calls':>6}  {what}{'' if self.gpu else ', without those that it calls'}",
        ]
        lines += [f"{time:9.3f} {calls:6d}  {name[: width - 18]}" for time, calls, name in self.kernels[:kernels]]
        lines += [f"longest gaps: ms, {what} before, {what} after"]
        half = (width - 16) // 2
        lines += [f"{gap:9.3f}  {before[:half]}  →  {after[:half]}" for gap, before, after in self.gaps[:gaps]]
        return "\n".join(lines) + "\n"


def _outside_of_calls(work: list[dict[str, Any]]) -> list[float]:
    """Duration of each event less those that began and ended in it on its thread; `work` is in order of begin."""
    own = [event["dur"] for event in work]
    open_: dict[Any, list[int]] = defaultdict(list)
    for number, event in enumerate(work):
        stack = open_[event.get("pid"), event.get("tid")]
        while stack and work[stack[-1]]["ts"] + work[stack[-1]]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(number)
    return own
