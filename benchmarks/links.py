#!/usr/bin/env python
"""What NCCL moves between the GPUs at hand, in GB/s that each sends: --nvlink and --network of tools/plan.py.

    torchrun --nproc-per-node 2 benchmarks/links.py
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:PORT benchmarks/links.py      # the slowest link counts

Without GPUs it measures gloo.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from oryx_megatron import parallel, platform
from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config.schema import ParallelConfig


def collectives(size: int, ranks: int) -> dict[str, tuple[Callable[[], object], float]]:
    """By name: a call over `size` bytes of bf16 per rank, and the bytes that a rank sends in it."""
    device = platform.device()
    shard = torch.zeros(size // 2 // ranks * ranks, dtype=torch.bfloat16, device=device)
    other, whole = torch.empty_like(shard), torch.empty(shard.numel() * ranks, dtype=torch.bfloat16, device=device)
    away = (ranks - 1) / ranks
    return {
        "all-to-all": (lambda: dist.all_to_all_single(other, shard), size * away),
        "all-gather": (lambda: dist.all_gather_into_tensor(whole, shard), size * (ranks - 1)),
        "reduce-scatter": (lambda: dist.reduce_scatter_tensor(other, whole), size * (ranks - 1)),
        "all-reduce": (lambda: dist.all_reduce(shard), 2 * size * away),
    }


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Mean of `repeats` calls in a row, after three."""
    for _ in range(3):
        call()
    platform.synchronize()
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    platform.synchronize()
    return (time.perf_counter() - begun) / repeats


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[8, 64, 256], help="per rank (default 8 64 256)")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args(argv)
    parallel.initialize(ParallelConfig(), seed=1)
    try:
        ranks = dist.get_world_size()
        if parallel.is_main_rank():
            print(f"{ranks} × {platform.describe()}")
            print("| collective | MiB per rank | ms | GB/s sent per rank |\n|---|---|---|---|", flush=True)
        for mib in arguments.mib:
            for name, (call, sent) in collectives(mib * 2**20, ranks).items():
                took = seconds(call, arguments.repeats)
                if parallel.is_main_rank():
                    print(f"| {name} | {mib} | {1e3 * took:.3f} | {sent / took / 1e9:.1f} |", flush=True)
    finally:
        parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
