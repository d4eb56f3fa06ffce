"""`python -m oryx_megatron.monitor RUN [RUN …]`: follow runs in the terminal, from their files alone."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from oryx_megatron import storage
from oryx_megatron.cli import main_guard
from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.loading import config_text, from_dict
from oryx_megatron.config.schema import RunConfig, TrainConfig
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.display import shown
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand_arguments, is_url
from oryx_megatron.reading import open_regular
from oryx_megatron.train import metrics
from oryx_megatron.train.history import EVENTS, duration, final_loss, named_steps, parse_event, short
from oryx_megatron.train.moments import last_step, mean_seconds, seconds_left
from oryx_megatron.train.records import is_whole, read_records
from oryx_megatron.train.signals import MARKER

WINDOW = 50
"""Latest steps that loss and speed are averaged over."""
SILENT = 300.0
"""Seconds without a new line after which a run is called silent (or ten steps, whichever is longer)."""
FIELDS = {"loss", "grad_norm", "lr", "tokens", "seconds", "skipped"}
"""What is shown of a step."""
FILES = (metrics.NAME, EVENTS, "config.yaml", MARKER)
"""What is read of a run."""
ENDED = ("done", "stopped")
"""States in which a loss is the final one."""
WIDTH = 80
CLEAR = "\x1b[H\x1b[J"


@main_guard
def main(argv: list[str] | None = None, out: TextIO = sys.stdout) -> int:
    """Follow; see --help."""
    parser = argparse.ArgumentParser(prog="oryx_megatron.monitor", description=(__doc__ or "").replace("`", ""))
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder (output_dir), also s3://…; may not exist yet"
    )
    parser.add_argument("--once", action="store_true", help="print the table once and end")
    parser.add_argument("--interval", type=float, default=5.0, metavar="S", help="seconds between looks (default: 5)")
    arguments = parser.parse_args(argv)
    expand_arguments(arguments, "runs", urls=True)
    if not 0 < arguments.interval < math.inf:
        raise ConfigError(f"--interval {arguments.interval:g}: give seconds above 0")
    copies = {run: storage.Followed(run, FILES) for run in arguments.runs if is_url(run)}
    paths = [copies[run].folder if run in copies else Path(run) for run in arguments.runs]
    followed = [Followed(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    shown: list[str] = []
    while True:
        for copy in copies.values():
            copy.look()
        for run in followed:
            run.look()
        lines = table(followed, time.time())
        if lines != shown or out.isatty():
            out.write((CLEAR if out.isatty() and not arguments.once else "") + "".join(f"{x}\n" for x in lines))
            out.flush()
        shown = lines
        if arguments.once:
            return 0
        time.sleep(arguments.interval)


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
        if self.iterations is None:
            self.iterations, self.count, self.run = _length(self.folder)

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
        return seconds_left(
            self.run, last, end, sample=seconds / read, evaluation=took["evaluation"], save=took["checkpoint"]
        )

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


def table(runs: Sequence[Followed], now: float) -> list[str]:
    """Lines of at most 80 columns: one for each run; below, the latest evaluations and events of a single run."""
    names = [shown(run.name) for run in runs]
    width = min(max(map(len, names)), 18)
    lines = [f"{'run':<{width}} {'step':>13} {'loss':>7} {'grad':>6} {'lr':>7} {'tok/s':>6} {'left':>8} state"]
    for run, name in zip(runs, names, strict=True):
        steps = list(run.steps)
        name = name if len(name) <= width else "…" + name[-(width - 1) :]
        if not steps:
            lines.append(f"{name:<{width}} {'':>52} {run.state(now)}"[:WIDTH])
            continue
        last = steps[-1]
        finite = [step["loss"] for step in steps if math.isfinite(step["loss"])]
        seconds = sum(step["seconds"] for step in steps)
        loss = sum(finite) / len(finite) if finite else math.nan
        counter = f"{last['iteration']}/{run.iterations or '?'}"
        if run.state(now) in ENDED and (final := run.final()) is not None:
            loss = final[0]
        left = ""
        if run.state(now) == "running" and (remaining := run.left()) is not None:
            left = duration(remaining)
        speed = short(sum(step["tokens"] for step in steps) / seconds) if seconds else ""
        lines.append(
            f"{name:<{width}} {counter:>13} {loss:7.4f} {last['grad_norm']:6.2f} {last['lr']:7.1e} {speed:>6} "
            f"{left:>8} {run.state(now)}"[:WIDTH]
        )
    if len(runs) == 1:
        (run,) = runs
        if run.steps:
            skipped = f", {run.skipped} steps skipped" if run.skipped else ""
            over = f"loss and speed over the last {len(run.steps)} steps"
            if run.state(now) in ENDED and (final := run.final()) is not None:
                over = f"final training loss {final[0]:.4f} {named_steps(*final[1:])}"
            lines.append(f"{short(run.tokens)} tokens{skipped}; {over}"[:WIDTH])
        for (dataset, plan), line in run.evaluations.items():
            name = shown(f"{dataset}, {plan}")
            lines.append(f"  {name}: loss {line['loss']:.4f} at step {line['iteration']}"[:WIDTH])
        lines += [_event(event, now) for event in run.events[-5:]]
    for run, name in zip(runs, names, strict=True):
        for file, count in run.damaged.items():
            if count:
                lines.append(f"left out {count} damaged line{'s' * (count > 1)} of {file} of {name}"[:WIDTH])
    return lines


def _event(event: dict[str, Any], now: float) -> str:
    facts = {key: value for key, value in event.items() if key not in ("event", "time", "iteration", "commit")}
    text = ", ".join(f"{key} {_fact(value)}" for key, value in facts.items())
    line = f"  {duration(now - event['time'])} ago, step {event['iteration']}: {event['event']}  {text}"
    return shown(line[: 2 * WIDTH])[:WIDTH].rstrip()


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
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


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    folders = [path.resolve() for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


if __name__ == "__main__":
    sys.exit(main())
