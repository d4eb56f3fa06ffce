#!/usr/bin/env python
"""Layouts on the GPUs at hand: Oryx beside megatron-core's models, and what tools/plan.py says of memory and speed.

    torchrun --nproc-per-node 2 benchmarks/layouts.py 1.4b-gdn gpt --sequence 2048 --batch 32 --micro 4 \\
        --layout tensor=2 --layout pipeline=2 --layout context=2 --layout data=2

Trains every layout for a few steps on made-up text: distributed optimizer, overlapped reductions, the plan given, with
kernels launched one by one and with CUDA graphs. Memory is what torch's allocator holds on the fullest GPU; the
planner's, less what it sets aside for CUDA and NCCL. Losses of one model must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from layout_cases import PEERS, Case, Found, parse_layout, row, table
from peers import ENGINES

from oryx_megatron import compat, parallel, platform, ranks, warmup
from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import (
    EvaluationConfig,
    KernelsConfig,
    ModesConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError, first_line
from oryx_megatron.modes import parse_plan
from oryx_megatron.ops import backends
from oryx_megatron.planner import (
    CONTEXT_GIB,
    GIB,
    Cluster,
    Estimate,
    Work,
    estimate,
    layout_of,
)
from oryx_megatron.planner_costs import MEMORY_GIB
from oryx_megatron.testing.layouts import Session, session, tiny_run
from oryx_megatron.train.engine import MegatronEngine
from oryx_megatron.train.traces import Trace


def run_config(case: Case) -> RunConfig:
    """The run that a case trains: megatron-core's models have no mode plans."""
    peer = case.model in PEERS
    layout = parse_layout(case.layout, case.gpus)
    optimizer = OptimizerConfig(lr=1e-5, name=case.optimizer, cpu_offload=case.cpu_offload)  # type: ignore[arg-type]
    run = tiny_run(parallel=layout, optimizer=optimizer)
    return dataclasses.replace(
        run,
        model=load_model(case.shape_of),
        data=dataclasses.replace(run.data, sequence_length=case.sequence),
        train=dataclasses.replace(
            run.train, global_batch_size=case.batch, micro_batch_size=case.micro, iterations=10_000
        ),
        modes=ModesConfig(chunk=case.chunk, fixed="attention" if peer else case.plan),
        evaluation=EvaluationConfig(plans=()),
        precision=PrecisionConfig(dtype="bf16" if platform.has_gpu() else "fp32", fp8=case.fp8),  # type: ignore[arg-type]
        kernels=KernelsConfig(graphs="auto" if case.graphs else "off"),
    )


def planned(case: Case, run: RunConfig, *, graphs: bool) -> tuple[Estimate, str]:
    """What the planner says of a case on this card, and the card's name there."""
    name_of_card = torch.cuda.get_device_name() if platform.has_gpu() else ""
    card = next((card for card in MEMORY_GIB if card.upper() in name_of_card), "h200")
    plan = parse_plan(case.plan, case.sequence, chunk=case.chunk)
    share = 1.0 if case.model in PEERS else plan.attention_share
    work = Work(case.sequence, case.batch, share, cpu_offload=case.cpu_offload, graphs=graphs, fp8=case.fp8)
    split = layout_of(run.model, work, run.parallel, case.micro, case.gpus)
    recompute, cluster = run.parallel.recompute, Cluster.of(card, case.gpus)
    found = estimate(run.model, cluster, work, split, case.micro, recompute)
    return found, card


def timed(opened: Session, steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and the last loss."""
    seconds, loss = [], 0.0
    for _ in range(steps):
        platform.synchronize()
        begun = time.perf_counter()
        loss, _ = opened.step()
        platform.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds, loss


def measure(case: Case, profiles: Path | None = None) -> Found:
    """Train under one layout; every rank gets the same result.

    Args:
        case: What to train.
        profiles: Folder for the kernels of a step.

    Raises:
        ConfigError: such a run would be refused; on all ranks alike.
    """
    run = run_config(case)
    backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
    compat.torch.forget_compiled()  # of the model before, whose widths were others
    if platform.has_gpu():
        gc.collect()  # the model before is held by cycles until then, and would count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with session(run, build=ENGINES.get(case.model, MegatronEngine)) as opened:
        opened.steps(case.warm)
        seconds, loss = timed(opened, case.steps)
        own, captured = [0.0] * 4, opened.engine.graphs
        graphs = captured is not None and not captured.failed
        if platform.has_gpu():
            if captured is not None and captured.failed:
                if case.model not in PEERS:
                    raise RuntimeError(f"graphs: {captured.failed}")
                if parallel.is_main_rank():
                    print(f"{case.name()}: not captured ({captured.failed}), launched instead", flush=True)
            free, total = torch.cuda.mem_get_info()
            own[:2] = torch.cuda.max_memory_reserved() / GIB, (total - free - torch.cuda.memory_reserved()) / GIB
            profile = Trace.of(opened.step)
            own[2:] = profile.idle / profile.span, profile.exchange / profile.span
            if profiles is not None and parallel.is_main_rank():
                kind = "graphs" if graphs else "launched"
                name = f"{Path(case.model).stem}-{case.layout}-{case.sequence}x{case.micro}-{case.fp8}-{kind}.txt"
                profiles.mkdir(parents=True, exist_ok=True)
                (profiles / name).write_text(profile.report())
    most = torch.tensor(own, device=platform.device())
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    on_paper, _ = planned(case, run, graphs=graphs)
    return Found(
        model=case.model,
        layout=case.layout,
        micro=case.micro,
        graphs=graphs,
        peak_gib=float(most[0]),
        planned_gib=on_paper.gib - CONTEXT_GIB,
        outside_gib=float(most[1]),
        tokens_per_second=case.batch * case.sequence / sorted(seconds)[len(seconds) // 2],
        planned_tokens_per_second=on_paper.tokens_per_second,
        idle=float(most[2]),
        exchange=float(most[3]),
        loss=loss,
        gpus=case.gpus,
        sequence=case.sequence,
        batch=case.batch,
        plan="attention" if case.model in PEERS else case.plan,
        fp8=case.fp8,
        optimizer=case.optimizer,
        card=torch.cuda.get_device_name() if platform.has_gpu() else "",
        seconds=tuple(seconds),
    )


def check_memory(case: Case) -> None:
    """ConfigError where a case is far from what the GPU holds, which costs most of a minute to find out."""
    found, card = planned(case, run_config(case), graphs=case.graphs)
    gib = MEMORY_GIB[card]
    if platform.has_gpu() and found.gib > ROOM * gib:
        raise ConfigError(f"needs {found.gib:.0f} GiB on paper, an {card} has {gib:.0f}")


HELD = 1.0
"""GiB that earlier cases may leave in torch's allocator: the peak of the next ones counts them."""


def _held_gib() -> float:
    """Of torch's allocator, on the rank with most."""
    gc.collect()  # models are held by cycles until then
    gib = torch.tensor(torch.cuda.memory_allocated() / GIB if platform.has_gpu() else 0.0, device=platform.device())
    torch.distributed.all_reduce(gib, torch.distributed.ReduceOp.MAX)
    return float(gib)


ROOM = 1.08
"""Of a card's memory that the planner may say is needed: it is within 6 % of what was measured."""


def work_through(cases: list[Case], report: Path, profiles: Path | None) -> None:
    """Measure cases in this process group; rank 0 adds a line of JSON to `report` where each begins and ends.

    What one rank alone may run into (its memory, a kernel) ends this process: the others wait for it in a collective.
    """

    def tell(**line: object) -> None:
        if parallel.is_main_rank():
            with report.open("a") as file:
                file.write(json.dumps(line) + "\n")

    try:
        parallel.initialize(ParallelConfig(), seed=1)
        for number, case in enumerate(cases):
            parallel.release()
            if number and (held := _held_gib()) > HELD:
                tell(anew=f"{held:.1f} GiB of the cases before are still held: the next ones begin anew")
                break
            tell(begun=number)
            try:
                check_memory(case)
                tell(case=number, found=dataclasses.asdict(measure(case, profiles)))
            except ConfigError as error:
                if error.rank_local:
                    raise
                tell(case=number, failed=str(error))
    except Exception as error:  # noqa: BLE001 - whatever it was: the list says it in a line and continues
        line = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        traceback.print_exc()
        report.with_suffix(f".{ranks.rank()}.error").write_text(json.dumps(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # leaving NCCL's groups would wait for the others
    parallel.destroy()


def share_of(case: Case) -> RunConfig:
    """The run of a single rank whose kernels are those of a rank of the case."""
    share = warmup.share_of(run_config(case))
    return dataclasses.replace(share, train=dataclasses.replace(share.train, global_batch_size=case.micro))


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure every layout; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("models", nargs="*", help="presets or YAML files; megatron-core's own: gpt, mcore-gdn")
    parser.add_argument("--gpt", default="1.4b-transformer", help="preset that gives gpt its size")
    parser.add_argument(
        "--hybrid", default="1.4b-gdn-hybrid", help="preset or YAML file that gives mcore-gdn its shape"
    )
    parser.add_argument("--graphs", nargs="+", choices=("no", "yes"), default=["no", "yes"], help="launched, replayed")
    parser.add_argument("--fp8", choices=("none", "tensorwise", "delayed", "blockwise"), default="none")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of a step of every case")
    parser.add_argument("--layout", action="append", default=[], metavar="field=value,…", help="once per layout")
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
    parser.add_argument("--cases", type=Path, help="of layout_list.py: cases as JSON, instead of models and layouts")
    parser.add_argument("--report", type=Path, help="of layout_list.py: where to tell of them")
    parser.add_argument("--compile", action="store_true", help="of layout_list.py: compile the kernels of the cases")
    arguments = parser.parse_args(argv)
    if arguments.cases is not None:
        cases = [Case(**case) for case in json.loads(arguments.cases.read_text())]
        if arguments.compile:
            for case in cases:
                warmup.compile_share(share_of(case))
        else:
            work_through(cases, arguments.report, arguments.profile)
        return 0
    if not arguments.models or not arguments.layout:
        parser.error("give at least one model and one --layout")
    parallel.initialize(ParallelConfig(), seed=1)
    world, results = torch.distributed.get_world_size(), list[Found]()
    try:
        main_rank = parallel.is_main_rank()
        if main_rank:
            print(f"{world} × {platform.describe()}; {arguments.batch} × {arguments.sequence} tokens a step, "
                  f"{arguments.micro} a microbatch, plan {arguments.plan}")  # fmt: skip
            print(table([]), flush=True)
        for case in _asked(arguments, world):
            parallel.release()
            try:
                found = measure(case, arguments.profile)
            except Exception as error:
                # Memory runs out alike on all ranks, which hold the same. Of megatron-core's own models whatever else
                # is a line too, where no other rank waits; of ours it ends the run.
                if not isinstance(error, torch.OutOfMemoryError) and (world > 1 or case.model not in PEERS):
                    raise
                if main_rank:
                    print(f"{case.name()}: {first_line(error)}", flush=True)
                continue
            results.append(found)
            if main_rank:
                print(row(found, results), flush=True)
                if arguments.out is not None:
                    with replacing(arguments.out) as temporary:
                        temporary.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
        if main_rank and set(PEERS) & set(arguments.models):  # again, now that all of theirs are known
            print("\n" + table(results))
    finally:
        parallel.destroy()
    return 0


def _asked(arguments: argparse.Namespace, world: int) -> Iterator[Case]:
    """All models and settings under one layout after the other."""
    graphs = [word == "yes" for word in arguments.graphs] if platform.has_gpu() else [False]
    for layout, model, replayed in itertools.product(arguments.layout, arguments.models, graphs):
        yield Case(
            model=model,
            layout=layout,
            gpus=world,
            graphs=replayed,
            **{
                name: getattr(arguments, name)
                for name in (
                    *("sequence", "batch", "micro", "plan", "fp8", "optimizer", "cpu_offload", "chunk", "gpt"),
                    "hybrid",
                    *("warm", "steps"),
                )
            },
        )


if __name__ == "__main__":
    sys.exit(main())
