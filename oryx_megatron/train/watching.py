"""Following a run from its files alone, as they grow: for the monitor in the terminal and for its page. No torch."""

from __future__ import annotations

import math
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.loading import config_text, from_dict
from oryx_megatron.config.schema import RunConfig, TrainConfig
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.errors import ConfigError
from oryx_megatron.reading import open_regular
from oryx_megatron.train import metrics
from oryx_megatron.train.history import EVENTS, duration, final_loss, parse_event
from oryx_megatron.train.intervals import last_step, mean_seconds, seconds_left
from oryx_megatron.train.records import is_whole, read_records
from oryx_megatron.train.signals import MARKER

WINDOW = 50
"""Latest steps that loss and speed are averaged over."""
SILENT = 300.0
"""Seconds without a new line after which a run is called silent (or ten steps, whichever is longer)."""
FIELDS = {"loss", "grad_norm", "lr", "tokens", "seconds", "skipped"}
"""What is shown of a step."""
ENDED = ("done", "stopped")
"""States in which a loss is the final one."""
FILES = (metrics.NAME, EVENTS, "config.yaml", MARKER)
"""What is read of a run."""


@dataclass
class Followed:
    """One run, read as its files grow; they may be missing, cut off in a line, or replaced at a resume."""

    folder: Path
    name: str
    steps: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    tokens: int = 0
    skipped: int = 0
    evaluations: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    damaged: dict[str, int] = field(default_factory=dict)
    """Lines left out, by file."""
    iterations: int | None = None
    count: SampleCount | None = None
    """Samples by iteration, as config.yaml has them."""
    run: RunConfig | None = None
    """The whole of config.yaml, where this version can read it."""
    changed: float | None = None
    """Unix time of the latest line."""
    _place: tuple[int, int] = (0, 0)
    """Inode and offset of metrics.jsonl up to which it was read."""
    _config: tuple[int, int, int] | None = None
    """Inode, time and size of the config.yaml that was read: a resume, which may extend the run, rewrites it."""

    def look(self) -> None:
        """Read what is new."""
        try:
            with open_regular(self.folder / metrics.NAME) as file:
                facts = os.fstat(file.fileno())
                inode, offset = self._place
                if facts.st_ino != inode or facts.st_size < offset:
                    self._forget()
                    offset = 0
                file.seek(offset)
                content = file.read()
                self.changed = facts.st_mtime
        except OSError:
            self._forget()
            content, facts, offset = b"", None, 0
        whole = content[: content.rfind(b"\n") + 1]
        for text in whole.split(b"\n"):
            if text.strip():
                self._take(metrics.parse_line(text))
        self._place = (facts.st_ino, offset + len(whole)) if facts is not None else (0, 0)
        self._look_at_events()
        self._look_at_config()

    def final(self) -> tuple[float, int, int] | None:
        """The final training loss as the run's summary has it, and its first and last step."""
        return final_loss(list(self.steps), 1 if self.run is None else self.run.logging.interval)

    def left(self) -> float | None:
        """Seconds to the end at the speed of the latest steps; None while the length is unknown.

        Evaluations and saves count where config.yaml tells when they are due and events.jsonl what they take.
        """
        if self.iterations is None or not self.steps:
            return None
        seconds, last = sum(step["seconds"] for step in self.steps), self.steps[-1]["iteration"]
        read = 0 if self.count is None else sum(self.count.batch_at(max(s["iteration"] - 1, 0)) for s in self.steps)
        if self.count is None or read < 1:
            return (self.iterations - last) * seconds / len(self.steps)
        if self.run is None:
            return (self.count.samples_at(self.iterations) - self.count.samples_at(last)) * seconds / read
        took = {kind: mean_seconds(self.events, kind) for kind in ("evaluation", "checkpoint")}
        end = last_step(self.run)
        done = {event["event"] for event in self.events if event.get("iteration") == last}
        return seconds_left(
            self.run,
            last,
            end,
            sample=seconds / read,
            evaluation=took["evaluation"],
            save=took["checkpoint"],
            done=done,
        )

    def loss(self, now: float) -> float:
        """The loss to show: the final one of a run that ended, else the mean of the steps held; NaN for none."""
        if self.state(now) in ENDED and (final := self.final()) is not None:
            return final[0]
        finite = [step["loss"] for step in self.steps if math.isfinite(step["loss"])]
        return sum(finite) / len(finite) if finite else math.nan

    def state(self, now: float) -> str:
        """What the run is doing, in a word or two."""
        last = self.events[-1]["event"] if self.events else ""
        if last == "end":
            return "done"
        if (self.folder / MARKER).exists() or last == "stop":
            return "stopped"
        if self.changed is None:
            return "starting" if last else "no files"
        pace = 10 * max((step["seconds"] for step in self.steps), default=0.0)
        idle = now - max(self.changed, self.events[-1]["time"] if self.events else 0.0)
        return f"silent {duration(idle)}" if idle > max(SILENT, pace) else "running"

    def _look_at_config(self) -> None:
        try:
            facts = os.stat(self.folder / "config.yaml")
            found = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        except OSError:
            found = None
        if found != self._config:
            self._config = found
            self.iterations, self.count, self.run = _length(self.folder)

    def _look_at_events(self) -> None:
        try:
            found = read_records(self.folder / EVENTS, parse_event)
        except OSError:
            self.events = []
        else:
            self.events, self.damaged[EVENTS] = found.lines, found.damaged

    def _take(self, line: dict[str, Any] | None) -> None:
        if line is None:
            self.damaged[metrics.NAME] = self.damaged.get(metrics.NAME, 0) + 1
            return
        if line["kind"] == "step" and line.keys() >= FIELDS:
            self.steps.append(line)
            self.tokens += line["tokens"]
            self.skipped += bool(line["skipped"])
        elif line["kind"] == "evaluation" and line.keys() >= {"dataset", "plan", "loss"}:
            self.evaluations[line["dataset"], line["plan"]] = line

    def _forget(self) -> None:
        self.steps.clear()
        self.evaluations.clear()
        self.tokens = self.skipped = 0
        self.changed = None
        self.damaged[metrics.NAME] = 0


def left_text(run: Followed, now: float) -> str:
    """Time that the steps to come take, as `1:02:03`; nothing for a run that is not under way."""
    remaining = run.left() if run.state(now) == "running" else None
    return "" if remaining is None else duration(remaining)


def fact_text(event: dict[str, Any]) -> str:
    """An event's own fields, in a line."""
    if event["event"] == "change" and event.keys() >= {"field", "before", "after"}:
        return f"{event['field']} {_fact(event['before'])} → {_fact(event['after'])}"
    facts = {key: value for key, value in event.items() if key not in ("event", "time", "iteration", "commit")}
    return ", ".join(f"{key} {_fact(value)}" for key, value in facts.items())


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 1 or not value else f"{value:.4g}"
    return "…" if isinstance(value, (list, dict)) else str(value)


def _length(folder: Path) -> tuple[int | None, SampleCount | None, RunConfig | None]:
    """Iterations of a run, its samples by iteration, and its whole config, as far as its config.yaml says."""
    try:
        config = parse_yaml(config_text(folder / "config.yaml"), str(folder / "config.yaml"))
        value = config["train"]["iterations"]
    except (ConfigError, KeyError, TypeError):
        return None, None, None
    try:
        count = SampleCount.of(from_dict(TrainConfig, config["train"]))
    except ConfigError:
        count = None
    try:
        run = from_dict(RunConfig, config)
    except ConfigError:
        run = None
    return (value, count, run) if is_whole(value) else (None, None, None)
