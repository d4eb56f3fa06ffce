"""`oryx monitor RUN [RUN …]`: follow runs in the terminal, from their files alone; with --web in a browser.

    oryx monitor runs/mine
    oryx monitor runs/a runs/b --web

Loss and speed are means over the latest 50 steps.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from oryx_megatron import storage
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.display import number_of, shown
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand_arguments, is_url
from oryx_megatron.train import web
from oryx_megatron.train.history import count_starts, duration, named_steps, short
from oryx_megatron.train.watching import ENDED, FILES, Followed, fact_text, left_text

WIDTH = 80
CLEAR = "\x1b[H\x1b[J"


@main_guard
def main(argv: list[str] | None = None, out: TextIO = sys.stdout) -> int:
    """Follow; see --help."""
    parser = Parser("oryx_megatron.monitor", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder (output_dir), also s3://…; may not exist yet"
    )
    parser.add_argument("--web", action="store_true", help="a page with curves, for a browser of this machine")
    parser.add_argument("--port", type=int, default=web.PORT, help="of --web; 0: any free one (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print the table once and end")
    parser.add_argument("--interval", type=float, default=5.0, metavar="S", help="seconds between looks (default: 5)")
    arguments = parser.parse_args(argv)
    expand_arguments(arguments, "runs", urls=True)
    for run in arguments.runs:
        if not is_url(run) and Path(run).is_file():
            raise ConfigError(f"{run} is a file; give a run folder (the config's output_dir)")
    if not 0 < arguments.interval < math.inf:
        raise ConfigError(f"--interval {arguments.interval:g}: give seconds above 0")
    if arguments.web and arguments.once:
        raise ConfigError("--once: a page is served until Ctrl-C; leave out one of --web and --once")
    copies = {run: storage.FollowedFiles(run, FILES) for run in arguments.runs if is_url(run)}
    paths = [copies[run].folder if run in copies else Path(run) for run in arguments.runs]
    if arguments.web:
        runs = [web.Recorded(path, name) for path, name in zip(paths, _names(paths), strict=True)]
        with web.serve(runs, arguments.port, arguments.interval, list(copies.values())) as server:
            out.write(
                f"{server.url} (Ctrl-C ends)\n"
                f"from elsewhere: ssh -L {server.server_port}:{web.HOST}:{server.server_port} THIS_HOST\n"
            )
            out.flush()
            server.serve_forever()
    followed = [Followed(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    told: list[str] = []
    while True:
        for copy in copies.values():
            copy.look()
        for run in followed:
            run.look()
        lines = table(followed, time.time())
        if lines != told or out.isatty():
            out.write((CLEAR if out.isatty() and not arguments.once else "") + "".join(f"{x}\n" for x in lines))
            out.flush()
        told = lines
        if arguments.once:
            return 0
        time.sleep(arguments.interval)


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
        seconds = sum(step["seconds"] for step in steps)
        counter = f"{last['iteration']}/{run.iterations or '?'}"
        left = left_text(run, now)
        speed = short(sum(step["tokens"] for step in steps) / seconds) if seconds else ""
        lines.append(
            f"{name:<{width}} {counter:>13} {run.loss(now):7.4f} {last['grad_norm']:6.2f} {last['lr']:7.1e} {speed:>6} "
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
        resumes, restarts = count_starts(run.events)
        if resumes or restarts:
            lines.append(f"{number_of(resumes, 'resume')}, {number_of(restarts, 'restart')}")
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
    text = fact_text(event)
    line = f"  {duration(now - event['time'])} ago, step {event['iteration']}: {event['event']}  {text}"
    return shown(line[: 2 * WIDTH])[:WIDTH].rstrip()


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
