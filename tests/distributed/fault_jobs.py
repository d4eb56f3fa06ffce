"""Real torchrun jobs of a tiny model, and what a cluster does to them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

RANKS = 2
SMALL = ("model.num_layers=1", "train.global_batch_size=4", "data.split=[9, 0, 1]", "checkpoint.asynchronous=true")


class Job:
    """One torchrun agent with its ranks, in RUN = `folder`; a context manager that leaves no process behind."""

    def __init__(
        self,
        config: Path,
        folder: Path,
        *overrides: str,
        restarts: int = 0,
        agent: Sequence[str] = ("torch.distributed.run",),
    ) -> None:
        self.folder = folder
        command = [sys.executable, "-m", *agent, "--standalone", f"--nproc-per-node={RANKS}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "oryx_megatron.train", str(config)]
        self.command = [*command, f"output_dir={folder}", *SMALL, *overrides]

    def __enter__(self) -> Job:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder / "log").open("a")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self.command, stdout=self._log, stderr=self._log, env=environment, start_new_session=True
        )
        return self

    def __exit__(self, *exception: object) -> None:
        everyone = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone += [child for process in everyone for child in process.children(recursive=True)]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._log.close()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def finish(self, timeout: float = 300.0) -> int:
        """Wait for the agent; gives its exit code."""
        return self.process.wait(timeout)

    def ranks(self) -> dict[int, psutil.Process]:
        """Living processes by rank."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error, KeyError):
                    if child.status() != psutil.STATUS_ZOMBIE:
                        found[int(child.environ()["RANK"])] = child
        return found

    def iteration(self) -> int:
        """Steps done, as metrics.jsonl says."""
        lines = steps(self.folder)
        return lines[-1]["iteration"] if lines else 0

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = 200.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"torchrun ended while waiting for {what}:\n{self.log()[-6000:]}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.log()[-6000:]}"
            time.sleep(0.005)

    def wait_for_ranks(self, old: set[int]) -> dict[int, psutil.Process]:
        """All ranks, none of them among the process ids `old`."""
        found: dict[int, psutil.Process] = {}

        def fresh() -> bool:
            found.clear()
            found.update(self.ranks())
            return len(found) == RANKS and not old & {process.pid for process in found.values()}

        self.wait_for(fresh, "new ranks")
        return found

    def kill_at_random(self, rng: random.Random, moment: str, old: set[int]) -> set[int]:
        """kill -9 of a random rank of the processes that came after `old`; gives the ids of those killed off.

        Moments: `start` (within seconds of its birth), `step` (any time after some steps), `save` (a checkpoint is
        being written).
        """
        ranks = self.wait_for_ranks(old)
        if moment == "start":
            time.sleep(rng.uniform(0.0, 4.0))
        else:
            before = self.started()
            self.wait_for(lambda: self.started() > before or self.continued(), "a start")
            goal = self.iteration() + rng.randint(1, 3)
            self.wait_for(lambda: self.iteration() >= goal, f"step {goal}")
            if moment == "save":
                root = self.folder / "checkpoints"
                self.wait_for(lambda: any(root.glob(".writing_*/*")), "a save")
            else:
                time.sleep(rng.uniform(0.0, 0.3))
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks[rng.randrange(RANKS)].send_signal(signal.SIGKILL)
        return {process.pid for process in ranks.values()}

    def started(self) -> int:
        """Starts in the run's history."""
        path = self.folder / "events.jsonl"
        return path.read_text().count('"event": "start"') if path.exists() else 0

    def continued(self) -> bool:
        """Whether the latest start has done a step."""
        path, events = self.folder / "metrics.jsonl", self.folder / "events.jsonl"
        return path.exists() and events.exists() and path.stat().st_mtime > events.stat().st_mtime


def steps(folder: Path) -> list[dict[str, Any]]:
    """Steps in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return list(_lines(path.read_text())) if path.exists() else []


def losses(folder: Path) -> list[float]:
    lines = steps(folder)
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # being written
            content = json.loads(line)
            if content["kind"] == "step":
                yield content
