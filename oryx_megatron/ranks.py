"""Which rank this process is, as a launcher's environment says. What does not fit together is an error, never a guess:
a process that takes itself for the only rank while others were meant trains on all of the data or on a fraction of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from oryx_megatron.errors import ConfigError

OTHERS = (
    ("SLURM_STEP_NUM_TASKS", "srun"),
    ("OMPI_COMM_WORLD_SIZE", "mpirun"),
    ("PMI_SIZE", "mpiexec"),
)
"""What launchers that do not set RANK say of the number of processes that they started."""


_error = ConfigError.of_one_rank
"""The environment is each process's own."""


@dataclass(frozen=True)
class Launch:
    """This process among the ranks that a launcher started."""

    rank: int
    size: int
    local_rank: int


def read() -> Launch | None:
    """What torchrun's environment says; None without it: this process is the only rank.

    Raises:
        ConfigError: variables that are no numbers or contradict each other, with the advice to unset or complete them.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE", least=1)
    local_rank, local_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", least=1)
    if rank is None:
        _check_alone(size or 1, local_rank or 0)
        return None
    if size is None:
        raise _error(f"RANK={rank} is set, but WORLD_SIZE is not: start all ranks by torchrun, or unset RANK")
    if rank >= size:
        raise _error(f"RANK={rank} is no rank of WORLD_SIZE={size}: they count from 0; start all ranks by torchrun")
    if local_size is not None and local_size > size:
        raise _error(f"LOCAL_WORLD_SIZE={local_size} is more than WORLD_SIZE={size}; start all ranks by torchrun")
    if local_rank is not None and local_rank >= (local_size or size):
        among = f"LOCAL_WORLD_SIZE={local_size}" if local_size else f"WORLD_SIZE={size}"
        raise _error(f"LOCAL_RANK={local_rank} is no rank of {among}: they count from 0; start all ranks by torchrun")
    return Launch(rank, size, local_rank or 0)


def rank() -> int:
    """Number of this rank; ConfigError as `read`."""
    launch = read()
    return 0 if launch is None else launch.rank


def world_size() -> int:
    """Number of ranks of this launch; ConfigError as `read`."""
    launch = read()
    return 1 if launch is None else launch.size


def _check_alone(size: int, local_rank: int) -> None:
    """ConfigError when this process is one of several that do not know of each other."""
    if size > 1:
        raise _error(
            f"WORLD_SIZE={size} is set, but RANK is not: this process would be the only rank; start {size} ranks by "
            "torchrun or launch/local.sh --ranks, or unset WORLD_SIZE to run with one"
        )
    if local_rank:
        raise _error(f"LOCAL_RANK={local_rank} is set, but RANK is not; start all ranks by torchrun, or unset it")
    for name, launcher in OTHERS:
        if (tasks := _number(name, least=1) or 1) > 1:
            raise _error(
                f"{name}={tasks} is set, but RANK is not: each of {tasks} processes would be the only rank; start "
                f"torchrun by {launcher}, one on each node (launch/submit.py does), or unset {name} to run with one"
            )
    if task := _number("SLURM_PROCID") or 0:
        raise _error(
            f"SLURM_PROCID={task} is set, but RANK is not: each task would be the only rank; start torchrun by srun, "
            "one on each node (launch/submit.py does), or unset SLURM_PROCID to run with one"
        )


def _number(name: str, *, least: int = 0) -> int | None:
    """An environment variable as a whole number; None when it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:20]) >= least):
        raise _error(f"{name}={text[:40]!r} is no whole number from {least} up; unset it, or start by torchrun")
    return int(text[:20])
