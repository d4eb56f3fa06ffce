"""Run a function on several ranks of one machine: gloo on CPUs, NCCL where there are GPUs.

On CPUs the ranks are forked from a server process that has imported torch and megatron-core (preload.py): that takes
most of ten seconds. CUDA does not survive a fork, so beside a GPU every rank is a fresh process.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from oryx_megatron import platform


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` in `world_size` new processes that see torchrun's environment.

    Args:
        function: A module-level function; it joins process groups itself (`parallel.initialize`).
        world_size: Number of ranks.
        args: Passed on; must pickle.
        timeout: Seconds until all ranks are ended and the call fails.

    Returns:
        What each rank returned, by rank.

    Raises:
        RuntimeError: a rank raised (with its traceback), died or ran out of time.
    """
    forks = not platform.has_gpu()
    context: Any = torch.multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["oryx_megatron.testing.preload"])
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = dict(os.environ) | _torchrun(world_size, store.port)
        processes = [
            context.Process(
                target=_rank_main, args=(environment | {"RANK": str(rank)}, os.getcwd(), folder, function, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _join(processes, Path(folder), timeout)
            return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()
            del store  # it served all ranks to their end, as that of torchrun's agent does


def _join(processes: list[Any], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        # One failed rank leaves the others waiting in a collective: report it at once.
        failed = [process for process in processes if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    if errors:
        raise RuntimeError("\n".join(errors))
    codes = [process.exitcode for process in processes]
    if any(code != 0 for code in codes):
        raise RuntimeError(f"ranks ended with exit codes {codes} (None: ran longer than {timeout:g} s)")


def _rank_main(
    environment: dict[str, str], cwd: str, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.clear()  # a forked rank has that of the server, as it was when the server began
    os.environ.update(environment | {"LOCAL_RANK": environment["RANK"]})
    os.chdir(cwd)
    rank = environment["RANK"]
    torch.set_num_threads(1)
    try:
        result = function(*args)
        torch.save(result, Path(folder, f"{rank}.pt"))
    except BaseException:  # noqa: BLE001 - whatever it was, the parent process reports it
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _torchrun(world_size: int, port: int) -> dict[str, str]:
    """Its environment, but for the rank: this process hosts the rendezvous store, as torchrun's agent does."""
    size = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return size | place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
