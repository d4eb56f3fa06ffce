#!/usr/bin/env python
"""How long a checkpoint keeps the training loop waiting: in the foreground, and in the background while it trains.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_stall.py 130m-gdn --folder /tmp/stall --layers 4

Trains on made-up text under the layout asked for. The cost of a background save is what the loop gave for it: the time
in save() and in every poll() until it is complete, plus what steps took longer while the writers worked (these last
share the CPUs on a machine without GPUs, which a GPU run does not).
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

from oryx_megatron import parallel
from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import CheckpointConfig, ParallelConfig
from oryx_megatron.testing.layouts import Session, session, tiny_run


def timed_step(opened: Session) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    opened.step()
    return time.perf_counter() - started


def foreground(opened: Session, root: Path, repeats: int) -> list[float]:
    """Seconds of each synchronous save."""
    manager, times = opened.checkpoints(root), []
    for i in range(repeats):
        opened.step()
        torch.distributed.barrier()
        started = time.perf_counter()
        manager.save(i, opened.manifest)
        times.append(time.perf_counter() - started)
    return times


def background(opened: Session, root: Path, repeats: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each save() call, of all its polls, and of the steps while it was under way."""
    manager, starts, polls, steps = opened.checkpoints(root), [], [], []
    for i in range(repeats):
        opened.step()
        torch.distributed.barrier()
        started = time.perf_counter()
        manager.save(i, opened.manifest)
        starts.append(time.perf_counter() - started)
        polled, done = 0.0, None
        while done is None:
            steps.append(timed_step(opened))
            started = time.perf_counter()
            done = manager.poll()
            polled += time.perf_counter() - started
        polls.append(polled)
    return starts, polls, steps


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure both ways; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="preset or YAML file")
    parser.add_argument("--folder", type=Path, required=True, help="where to write; emptied of its two runs at the end")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model)
    if arguments.layers:
        model = dataclasses.replace(model, num_layers=arguments.layers)
    batch = 8
    run = dataclasses.replace(
        tiny_run(parallel=ParallelConfig(tensor=arguments.tensor), modes__chunk=arguments.sequence // 4),
        model=model,
    )
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, sequence_length=arguments.sequence),
        train=dataclasses.replace(run.train, global_batch_size=batch, iterations=10_000),
    )
    waiting = dataclasses.replace(run, checkpoint=CheckpointConfig(asynchronous=False))
    continuing = dataclasses.replace(run, checkpoint=CheckpointConfig(asynchronous=True))
    try:
        with session(waiting) as opened:
            opened.steps(2)
            plain = statistics.median(timed_step(opened) for _ in range(5))
            saves = foreground(opened, arguments.folder / "foreground", arguments.repeats)
        with session(continuing) as opened:
            opened.steps(2)
            starts, polls, steps = background(opened, arguments.folder / "background", arguments.repeats)
        if parallel.is_main_rank():
            size = sum(f.stat().st_size for f in next((arguments.folder / "foreground").glob("iteration_*")).iterdir())
            report(size, plain, saves, starts, polls, steps)
    finally:
        if parallel.is_main_rank():
            for name in ("foreground", "background"):
                shutil.rmtree(arguments.folder / name, ignore_errors=True)
        parallel.destroy()
    return 0


def report(
    size: int, plain: float, saves: list[float], starts: list[float], polls: list[float], steps: list[float]
) -> None:
    """Print the medians and the share."""
    foreground_time = statistics.median(saves)
    loop = statistics.median(a + b for a, b in zip(starts, polls))
    slower = (statistics.mean(steps) - plain) * len(steps) / len(starts)
    print(f"checkpoint {size / 2**20:,.0f} MiB, a step {plain:.3f} s")
    print(f"foreground save                 {foreground_time:8.3f} s")
    print(f"background: save() returns in   {statistics.median(starts):8.3f} s")
    print(f"background: all polls together  {statistics.median(polls):8.3f} s")
    print(f"background: slower steps        {max(slower, 0.0):8.3f} s over {len(steps) / len(starts):.0f} steps")
    print(f"loop waits {loop / foreground_time:.1%} of the foreground time")


if __name__ == "__main__":
    sys.exit(main())
