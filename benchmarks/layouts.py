#!/usr/bin/env python
"""Layouts on the GPUs at hand: Oryx beside megatron-core's GPT, and what tools/plan.py says of memory and speed.

    torchrun --nproc-per-node 2 benchmarks/layouts.py 1.4b-gdn gpt --sequence 2048 --batch 32 --micro 4 \\
        --layout tensor=2 --layout pipeline=2 --layout context=2 --layout data=2

Trains every layout for a few steps on made-up text: distributed optimizer, overlapped reductions, the plan given, with
kernels launched one by one and with CUDA graphs. Memory is what torch's allocator holds on the fullest GPU; the
planner's, less what it sets aside for CUDA and NCCL. Losses of one model must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from peers import gpt_engine

from oryx_megatron import parallel, platform
from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import (
    EvaluationConfig,
    KernelsConfig,
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
from oryx_megatron.planner import (
    CONTEXT_GIB,
    COPY_TERABYTES,
    GIB,
    MEMORY_GIB,
    Cluster,
    Work,
    estimate,
    layout_of,
)
from oryx_megatron.testing.layouts import Session, session, tiny_run
from oryx_megatron.train.engine import MegatronEngine
from oryx_megatron.train.traces import Trace


@dataclasses.dataclass(frozen=True)
class Found:
    """One layout: what it took, and what the planner said."""

    model: str
    layout: str
    micro: int
    graphs: bool
    """CUDA graphs are replayed; else kernels are launched one by one."""
    peak_gib: float
    planned_gib: float
    outside_gib: float
    """Memory of the fullest GPU that torch's allocator does not know: CUDA, NCCL, libraries."""
    tokens_per_second: float
    planned_tokens_per_second: float
    idle: float
    """Share of a step without a kernel, on the rank with most."""
    exchange: float
    """Share of a step in which NCCL's kernels ran, on the rank with most."""
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


def run_config(model: ModelConfig, layout: ParallelConfig, graphs: bool, arguments: argparse.Namespace) -> RunConfig:
    run = tiny_run(
        parallel=layout, optimizer=OptimizerConfig(lr=1e-5, name=arguments.optimizer, cpu_offload=arguments.cpu_offload)
    )
    return dataclasses.replace(
        run,
        model=model,
        data=dataclasses.replace(run.data, sequence_length=arguments.sequence),
        train=dataclasses.replace(
            run.train, global_batch_size=arguments.batch, micro_batch_size=arguments.micro, iterations=10_000
        ),
        modes=ModesConfig(chunk=arguments.chunk, fixed=arguments.plan),
        evaluation=EvaluationConfig(plans=()),
        precision=PrecisionConfig(dtype="bf16" if platform.has_gpu() else "fp32", fp8=arguments.fp8),
        kernels=KernelsConfig(graphs="auto" if graphs else "off"),
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


def measure(name: str, layout: ParallelConfig, text: str, graphs: bool, arguments: argparse.Namespace) -> Found:
    """Train under one layout; every rank gets the same result."""
    peer = name == "gpt"
    model = load_model(arguments.gpt if peer else name)
    run = run_config(model, layout, graphs, arguments)
    if peer:
        run = dataclasses.replace(run, modes=dataclasses.replace(run.modes, fixed="attention"))
    world = torch.distributed.get_world_size()
    backends.select(run.kernels, backends.Workload(model, run.precision.dtype))
    if platform.has_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with session(run, build=gpt_engine if peer else MegatronEngine) as opened:
        opened.steps(arguments.warm)
        seconds, loss = timed(opened, arguments.steps)
        own = [0.0] * 4
        if platform.has_gpu():
            if opened.engine.graphs is not None and opened.engine.graphs.failed:
                raise RuntimeError(f"graphs: {opened.engine.graphs.failed}")
            free, total = torch.cuda.mem_get_info()
            own[:2] = torch.cuda.max_memory_reserved() / GIB, (total - free - torch.cuda.memory_reserved()) / GIB
            profile = Trace.of(opened.step)
            own[2:] = profile.idle / profile.span, profile.exchange / profile.span
            if arguments.profile is not None and parallel.is_main_rank():
                kind = "graphs" if graphs else "launched"
                (arguments.profile / f"{name}-{text}-{kind}.txt").write_text(profile.report())
    most = torch.tensor(own, device=platform.device())
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    plan = parse_plan(arguments.plan, arguments.sequence, chunk=arguments.chunk)
    work = Work(arguments.sequence, arguments.batch, 1.0 if peer else plan.attention_share)
    split = layout_of(model, work, layout, arguments.micro, world)
    name_of_card = torch.cuda.get_device_name() if platform.has_gpu() else ""
    card = next((card for card in COPY_TERABYTES if card.upper() in name_of_card), "h200")
    cluster = Cluster(world, MEMORY_GIB[card], copy_tbps=COPY_TERABYTES[card])
    planned = estimate(
        model, cluster, work, split, arguments.micro, layout.recompute, arguments.cpu_offload, graphs=graphs
    )
    return Found(
        model=name,
        layout=text,
        micro=arguments.micro,
        graphs=graphs,
        peak_gib=float(most[0]),
        planned_gib=planned.gib - CONTEXT_GIB,
        outside_gib=float(most[1]),
        tokens_per_second=arguments.batch * arguments.sequence / seconds,
        planned_tokens_per_second=planned.tokens_per_second,
        idle=float(most[2]),
        exchange=float(most[3]),
        loss=loss,
    )


HEAD = "| model | layout | graphs | tokens/s | vs GPT | planned | GiB | planned | idle | NCCL | loss |"


def show(found: Found, results: list[Found]) -> str:
    """A line of the table; the ratio is against GPT under the same layout at its best setting."""
    peers = [r.tokens_per_second for r in results if (r.model, r.layout) == ("gpt", found.layout)]
    return (
        f"| {found.model} | {found.layout} | {'yes' if found.graphs else 'no'} | {found.tokens_per_second:,.0f} "
        f"| {f'{found.tokens_per_second / max(peers):.2f}' if peers else ''} | {found.planned_tokens_per_second:,.0f} "
        f"| {found.peak_gib:.1f} | {found.planned_gib:.1f} | {found.idle:.1%} | {found.exchange:.1%} "
        f"| {found.loss:.4f} |"
    )


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure every layout; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("models", nargs="+", help="presets or YAML files; gpt: megatron-core's own model")
    parser.add_argument("--gpt", default="1.4b-transformer", help="preset that gives gpt its size")
    parser.add_argument("--graphs", nargs="+", choices=("no", "yes"), default=["no", "yes"], help="launched, replayed")
    parser.add_argument("--fp8", choices=("none", "tensorwise", "delayed", "blockwise"), default="none")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of a step of every case")
    parser.add_argument("--layout", action="append", required=True, metavar="field=value,…", help="once per layout")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step over all GPUs")
    parser.add_argument("--micro", type=int, default=8, help="sequences per microbatch")
    parser.add_argument("--plan", default="ratio:0.5", help="mode plan of every microbatch")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
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
            print(HEAD + "\n" + "|---" * HEAD.count(" | ") + "|---|", flush=True)
        graphs = [word == "yes" for word in arguments.graphs] if platform.has_gpu() else [False]
        for text in arguments.layout:
            for name in arguments.models:
                for replayed in graphs:
                    parallel.release()
                    try:
                        found = measure(name, parse_layout(text, world), text, replayed, arguments)
                    except torch.OutOfMemoryError as error:  # alike on all ranks, which hold the same
                        if main_rank:
                            print(f"{name} {text}: {str(error).splitlines()[0]}", flush=True)
                        continue
                    results.append(found)
                    if main_rank:
                        print(show(found, results), flush=True)
                        if arguments.out is not None:
                            with replacing(arguments.out) as temporary:
                                temporary.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
        if main_rank and "gpt" in arguments.models:  # again, now that all of GPT's are known
            print("\n".join(["", HEAD, "|---" * HEAD.count(" | ") + "|---|", *(show(r, results) for r in results)]))
    finally:
        parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
