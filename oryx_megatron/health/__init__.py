"""Check the nodes of a job before it starts, and name the bad one.

    srun --ntasks-per-node 8 oryx health RUN.yaml --gpus 8
    torchrun --nnodes 2 … -m oryx_megatron.health RUN.yaml --gpus 8 --json

Looks at: ranks that never come; GPUs, their memory and speed; clocks; output folder (space, speed, shared by all
nodes); code, Python, packages and config the same everywhere; all-reduce within each node, between neighbours, over
all. One line per finding, with the nodes it is about. Exit code 1 when there is one.

How it works: ranks put what they found into a key-value store on rank 0, with a deadline, so that a rank that is
silent or stuck is a finding too and not a hang. Bandwidth is measured along a ring of node pairs: a node that is slow
with both of its neighbours is the slow one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from oryx_megatron import platform
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.errors import ConfigError, first_line
from oryx_megatron.health import machine
from oryx_megatron.health.rank import Rank
from oryx_megatron.health.report import Fault, Options, Report
from oryx_megatron.paths import expand_arguments

if TYPE_CHECKING:
    import torch.distributed as dist
else:
    dist = platform.late("torch.distributed")

__all__ = ["Fault", "Options", "Report", "check", "main"]


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, check, print (rank 0)."""
    parser = Parser("oryx_megatron.health", description=__doc__)
    parser.add_argument("config", nargs="?", metavar="RUN.yaml", help="run config that is about to start")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="its overrides")
    d = Options()
    add = parser.add_argument
    add("--output", metavar="FOLDER", help="folder to write to (default: the config's output_dir)")
    add("--gpus", type=int, default=d.gpus, help="GPUs that every node should have (default: %(default)s)")
    add("--max-skew", type=float, default=d.max_skew, help="seconds between clocks (default: %(default)s)")
    add("--min-free-gb", type=float, default=d.min_free_gb, help="free space (default: %(default)s)")
    add("--min-write-mbs", type=float, default=d.min_write_mbs, help="MB/s per node (default: %(default)s)")
    add("--write-mb", type=int, default=d.write_mb, help="MB to write per node (default: %(default)s)")
    add("--min-gbps", type=float, default=d.min_gbps, help="all-reduce between nodes, GB/s (default: only compare)")
    add("--slow", type=float, default=d.slow, help="share of the good nodes' speed (default: %(default)s)")
    add("--reduce-mb", type=float, default=d.reduce_mb, help="MB per rank to reduce (default: %(default)s)")
    add("--timeout", type=float, default=d.timeout, help="seconds to wait for a rank (default: %(default)s)")
    add("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_intermixed_args(argv)
    expand_arguments(arguments, "--output")
    a = vars(arguments)
    as_json = a.pop("json")
    report = check(Options(**a | {"overrides": tuple(a["overrides"])}))
    if os.environ["RANK"] == "0":
        text = json.dumps(dataclasses.asdict(report), ensure_ascii=False) if as_json else "\n".join(report.lines())
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    if dist.is_initialized():  # a collective failed: leaving it in good order could wait for ever
        os._exit(1)
    return 1 if report.findings else 0


def check(options: Options, clock: Callable[[], float] = time.time) -> Report:
    """Check the nodes of this job; every rank calls it, with torchrun's, srun's or no environment.

    Args:
        options: Thresholds.
        clock: Unix time of this rank's node.

    Raises:
        ConfigError: rank 0 cannot be reached, or does not answer.
    """
    rank, world = machine.environment()
    started = time.monotonic()
    store = machine.store(rank, world, options.timeout)
    me = Rank(options, store, rank, world, clock)
    if rank == 0:
        try:
            return me.lead()
        finally:
            me.remove_token()
    try:
        return me.follow()
    except dist.DistError as error:
        raise ConfigError.of_one_rank(
            f"{me.node}: rank 0 on {os.environ['MASTER_ADDR']} fell silent after {time.monotonic() - started:.0f} s "
            f"({first_line(error)})"
        ) from None
