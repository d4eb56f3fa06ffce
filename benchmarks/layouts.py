#!/usr/bin/env python
"""Layouts on the GPUs at hand against what tools/plan.py says of them: peak memory of the fullest GPU, and tokens/s.

    torchrun --nproc-per-node 2 benchmarks/layouts.py 1.4b-gdn --sequence 2048 --batch 32 --micro 8 \\
        --layout tensor=2 --layout pipeline=2 --layout context=2 --layout data=2

Trains every layout for a few steps on made-up text: bf16, distributed optimizer, overlapped reductions, the plan given.
Memory is that of torch's allocator; the planner's, less what it sets aside for CUDA and NCCL. Losses must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from oryx_megatron import parallel, platform
from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import (
    EvaluationConfig,
    ModelConfig,
    ModesConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError
from oryx_megatron.modes import parse_plan
from oryx_megatron.ops import backends
from oryx_megatron.planner import CONTEXT_GIB, GIB, Cluster, Work, estimate, layout_of
from oryx_megatron.testing.layouts import Session, session, tiny_run


@dataclasses.dataclass(frozen=True)
class Found:
    """One layout: what it took, and what the planner said."""

    model: str
    layout: str
    micro: int
    peak_gib: float
    planned_gib: float
    outside_gib: float
    """Memory of the fullest GPU that torch's allocator does not know: CUDA, NCCL, libraries."""
    tokens_per_second: float
    planned_tokens_per_second: float
    loss: float
    """Of the last step."""


def parse_layout(text: str, world: int) -> ParallelConfig:
    """tensor=2,recompute=full → ParallelConfig. `data` is what the others leave and may be named for the reader."""
    changes: dict[str, int | str] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        known = {field.name for field in dataclasses.fields(ParallelConfig)} | {"data"}
        if name not in known or not value:
            raise ConfigError(f"--layout {text}: expected field=value, fields: {', '.join(sorted(known))}")
        changes[name] = int(value) if value.isdecimal() else value
    split = 1
    for name in ("tensor", "pipeline", "context"):
        split *= int(changes.get(name, 1))
    if int(changes.pop("data", world // split)) * split != world:
        raise ConfigError(f"--layout {text}: does not use the {world} ranks there are")
    return ParallelConfig(overlap=True, **changes)  # type: ignore[arg-type]


def run_config(model: ModelConfig, layout: ParallelConfig, arguments: argparse.Namespace) -> RunConfig:
    run = tiny_run(parallel=layout, optimizer=OptimizerConfig(lr=1e-5, cpu_offload=arguments.cpu_offload))
    return dataclasses.replace(
        run,
        model=model,
        data=dataclasses.replace(run.data, sequence_length=arguments.sequence),
        train=dataclasses.replace(
            run.train, global_batch_size=arguments.batch, micro_batch_size=arguments.micro, iterations=10_000
        ),
        modes=ModesConfig(chunk=arguments.chunk, fixed=arguments.plan),
        evaluation=EvaluationConfig(plans=()),
        precision=PrecisionConfig(dtype="bf16" if platform.has_gpu() else "fp32"),
    )


def timed(opened: Session, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and the last loss."""
    seconds, loss = [], 0.0
    for _ in range(steps):
        platform.synchronize()
        begun = time.perf_counter()
        loss, _ = opened.step()
        platform.synchronize()
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[len(seconds) // 2], loss


def measure(model: ModelConfig, layout: ParallelConfig, text: str, arguments: argparse.Namespace) -> Found:
    """Train under one layout; every rank gets the same result."""
    run = run_config(model, layout, arguments)
    world = torch.distributed.get_world_size()
    backends.select(run.kernels, backends.Workload(model, run.precision.dtype))
    with session(run) as opened:
        opened.steps(arguments.warm)
        if platform.has_gpu():
            torch.cuda.reset_peak_memory_stats()
        seconds, loss = timed(opened, arguments.steps)
        own = [platform.peak_memory_bytes() / GIB, 0.0]
        if platform.has_gpu():
            free, total = torch.cuda.mem_get_info()
            own[1] = (total - free - torch.cuda.memory_reserved()) / GIB
    fullest = torch.tensor(own, device=platform.device())
    torch.distributed.all_reduce(fullest, torch.distributed.ReduceOp.MAX)
    if platform.has_gpu():
        torch.cuda.empty_cache()
    plan = parse_plan(arguments.plan, arguments.sequence, chunk=arguments.chunk)
    work = Work(arguments.sequence, arguments.batch, plan.attention_share)
    split = layout_of(model, work, layout, arguments.micro, world)
    planned = estimate(model, Cluster(world), work, split, arguments.micro, layout.recompute, arguments.cpu_offload)
    return Found(
        model.name,
        text,
        arguments.micro,
        float(fullest[0]),
        planned.gib - CONTEXT_GIB,
        float(fullest[1]),
        arguments.batch * arguments.sequence / seconds,
        planned.tokens_per_second,
        loss,
    )


def show(found: Found) -> str:
    """A line of the table; without a GPU there is no peak to tell."""
    known = found.peak_gib > 0
    return (
        f"| {found.model} | {found.layout} | {f'{found.peak_gib:.1f}' if known else '–'} | {found.planned_gib:.1f} "
        f"| {f'{found.planned_gib / found.peak_gib:.2f}' if known else '–'} | {found.tokens_per_second:,.0f} "
        f"| {found.planned_tokens_per_second:,.0f} | {found.planned_tokens_per_second / found.tokens_per_second:.2f} "
        f"| {found.outside_gib:.1f} | {found.loss:.4f} |"
    )


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure every layout; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("models", nargs="+", help="presets or YAML files")
    parser.add_argument("--layout", action="append", required=True, metavar="field=value,…", help="once per layout")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step over all GPUs")
    parser.add_argument("--micro", type=int, default=8, help="sequences per microbatch")
    parser.add_argument("--plan", default="ratio:0.5", help="mode plan of every microbatch")
    parser.add_argument("--cpu-offload", action="store_true", help="optimizer.cpu_offload: its state on the host")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warm", type=int, default=3, help="steps before")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    arguments = parser.parse_args(argv)
    parallel.initialize(ParallelConfig(), seed=1)
    world, results = torch.distributed.get_world_size(), []
    try:
        main_rank = parallel.is_main_rank()
        if main_rank:
            print(f"{world} × {platform.describe()}; {arguments.batch} × {arguments.sequence} tokens a step, "
                  f"{arguments.micro} a microbatch, plan {arguments.plan}")  # fmt: skip
            print("| model | layout | peak GiB | planned | ratio | tokens/s | planned | ratio | outside GiB | loss |")
            print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for name in arguments.models:
            model = load_model(name)
            for text in arguments.layout:
                parallel.release()
                results.append(measure(model, parse_layout(text, world), text, arguments))
                if main_rank:
                    print(show(results[-1]), flush=True)
                    if arguments.out is not None:
                        with replacing(arguments.out) as temporary:
                            temporary.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
    finally:
        parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
