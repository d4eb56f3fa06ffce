"""What happened to a run over all its starts: RUN/events.jsonl, and the summary made from it. Needs no torch.

Events, one JSON object a line with `event`, `time` (unix) and `iteration`:
    start       the processes began (ranks, host, commit); iteration: where they resumed
    lost        the one before was killed; time: when it last wrote anything
    checkpoint  seconds that training stood still for it
    evaluation  seconds
    skip        a bad step was skipped (reason)
    rollback    back to an older checkpoint (to, samples: skipped so far); `return` in older files
    slow        a rank lags behind its peers (rank, host, times)
    change      resumed with another value than the checkpoint's (field, before, after)
    stop        ended before train.iterations (reason; saved: iteration of the newest checkpoint)
    end         all steps done
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from oryx_megatron.data.files import write_json
from oryx_megatron.display import shown
from oryx_megatron.train import metrics
from oryx_megatron.train.records import is_amount, is_text, is_whole, parse_record, read_records

log = logging.getLogger(__name__)

EVENTS, SUMMARY = "events.jsonl", "summary.json"


class Events:
    """Appends to events.jsonl; on rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / EVENTS

    def start(self, iteration: int, **facts: Any) -> None:
        """A process group begins: close the one before it, should it have died."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before, began = read_events(self.folder), psutil.Process().create_time()
        if before and before[-1]["event"] not in ("stop", "end", "lost"):
            written = [p.stat().st_mtime for p in (self.path, self.folder / metrics.NAME) if p.exists()]
            lost = min(max(written), began)
            self._append({"event": "lost", "time": lost, "iteration": before[-1]["iteration"]})
        self._append({"event": "start", "time": began, "iteration": iteration, **facts})

    def add(self, event: str, iteration: int, **facts: Any) -> None:
        """Append one event of now."""
        self._append({"event": event, "time": time.time(), "iteration": iteration, **facts})

    def _append(self, line: dict[str, Any]) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            cut = size and os.pread(descriptor, 1, size - 1) != b"\n"  # by a crash: this line must not join that one
            file.write((b"\n" if cut else b"") + json.dumps(line).encode() + b"\n")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Events of a run, oldest first; damaged lines are left out, which the log says once."""
    path = folder / EVENTS
    found = read_records(path, parse_event)
    if (damage := found.damage()) is not None:
        log.warning("%s: %s", shown(path), damage)
    return found.lines


def parse_event(text: bytes) -> dict[str, Any] | None:
    """One line of an events.jsonl; None when it is damaged."""
    return parse_record(text, {"event": is_text, "time": is_amount, "iteration": is_whole}, {"seconds": is_amount})


def count_starts(events: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """How often a run was started again after a stop (resumes), and how often after its processes died (restarts)."""
    before = [last["event"] for last, event in itertools.pairwise(events) if event["event"] == "start"]
    restarts = before.count("lost")
    return len(before) - restarts, restarts


def final_loss(steps: Sequence[dict[str, Any]], interval: int) -> tuple[float, int, int] | None:
    """Mean training loss of the steps behind the last line on the terminal, and the first and last of them.

    Args:
        steps: Lines of metrics.jsonl, ascending; bad steps do not count.
        interval: logging.interval.
    """
    if not steps:
        return None
    last = steps[-1]["iteration"]
    first = (last - 1) // interval * interval + 1
    losses = [step["loss"] for step in steps if step["iteration"] >= first and not step.get("skipped")]
    return (sum(losses) / len(losses), first, last) if losses else None


def summarize(folder: Path, *, peak_flops: float | None = None, interval: int = 1) -> dict[str, Any]:
    """Totals of a run from its metrics.jsonl and events.jsonl.

    Each step counts once, however often it was done: `goodput` is the share of the running time, over all starts, that
    went into steps which the run stands on. Steps without a time split (older runs) count as forward and backward.

    Args:
        folder: RUN.
        peak_flops: Peak FLOP/s of all ranks together, for `mfu` (model FLOPs utilisation over the step time).
        interval: logging.interval, which tells how many steps `loss` is the mean of.
    """
    steps = [line for line in metrics.read_lines(folder / metrics.NAME) if line["kind"] == "step"]
    events = read_events(folder)
    running, began = 0.0, None
    for event in events:
        if event["event"] == "start":
            began = event["time"]
        elif event["event"] in ("lost", "stop", "end") and began is not None:
            running, began = running + event["time"] - began, None
    if began is not None:
        running += time.time() - began

    def spent(kind: str) -> float:
        return sum(event.get("seconds", 0.0) for event in events if event["event"] == kind)

    def total(field: str) -> float:
        return sum(step.get(field, 0.0) for step in steps)

    stepping, data, optimizer = total("seconds"), total("data_seconds"), total("optimizer_seconds")
    useful = sum(step.get("seconds", 0.0) for step in steps if not step.get("skipped"))
    split = {
        "data": data,
        "forward_backward": total("forward_backward_seconds") or stepping - data - optimizer,
        "optimizer": optimizer,
        "checkpoint": spent("checkpoint"),
        "evaluation": spent("evaluation"),
    }
    running = max(running, sum(split.values()))
    resumes, restarts = count_starts(events)
    final = final_loss(steps, interval)
    return {
        "iterations": steps[-1]["iteration"] if steps else 0,
        "loss": final and final[0],
        "loss_steps": final and list(final[1:]),
        "tokens": int(total("tokens")),
        "tokens_per_second": total("tokens") / stepping if stepping else None,
        "mfu": total("model_flops") / stepping / peak_flops if stepping and peak_flops else None,
        "seconds": {"running": running, **split, "other": running - sum(split.values())},
        "goodput": useful / running if running else None,
        "resumes": resumes,
        "restarts": restarts,
        "skipped_steps": sum(event["event"] == "skip" for event in events),
        "rollbacks": sum(event["event"] in ("rollback", "return") for event in events),
    }


def named_steps(first: int, last: int) -> str:
    """Which steps a final loss is of, in words."""
    return f"(step {last})" if first == last else f"(mean of steps {first}–{last})"


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """RUN/summary.json."""
    write_json(folder / SUMMARY, summary)


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary for a terminal of 80 columns."""
    seconds = summary["seconds"]
    running = seconds["running"] or 1.0
    rate, mfu, goodput = summary["tokens_per_second"], summary["mfu"], summary["goodput"]
    speed = "" if rate is None else f", {short(rate)} tokens/s while stepping"
    lines = [
        f"{summary['iterations']} steps, {short(summary['tokens'])} tokens{speed}"
        + ("" if mfu is None else f", MFU {mfu:.1%}"),
        f"{duration(seconds['running'])} running, goodput {goodput or 0:.1%}, resumes {summary['resumes']}, "
        f"restarts {summary['restarts']}, skipped {summary['skipped_steps']}, rollbacks {summary['rollbacks']}",
    ]
    if summary["loss"] is not None:
        lines.insert(1, f"final training loss {summary['loss']:.4f} {named_steps(*summary['loss_steps'])}")
    for part, spent in seconds.items():
        if part != "running":
            lines.append(f"  {part.replace('_', '-'):<18} {duration(spent):>10} {spent / running:7.1%}")
    return lines


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(value: float) -> str:
    """A number in a few characters, as `1.2M`."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"
