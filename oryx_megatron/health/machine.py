"""What a rank sees of its own machine, and its place in the job."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform as python_platform
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oryx_megatron import platform, ranks
from oryx_megatron.errors import ConfigError, first_line

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
else:
    torch, dist = platform.late("torch"), platform.late("torch.distributed")


def gpu_facts() -> dict[str, Any]:
    """Memory in use, and the speed and result of a product, on this rank's GPU."""
    index = platform.local_rank() % torch.cuda.device_count()
    facts: dict[str, Any] = {"gpu": index}
    try:
        torch.cuda.set_device(index)
        free, total = torch.cuda.mem_get_info(index)
        facts |= {"used_gb": (total - free) / 1e9, "total_gb": total / 1e9}
        size = 4096
        ones = torch.ones(size, size, dtype=torch.bfloat16, device="cuda")
        seconds = math.inf
        for _ in range(20):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            product = ones @ ones
            torch.cuda.synchronize()
            seconds = min(seconds, time.perf_counter() - begun)
        facts["tflops"] = 2 * size**3 / seconds / 1e12
        if not bool((product == size).all()):
            facts["gpu_error"] = "a product of matrices came out wrong"
    except RuntimeError as error:
        facts["gpu_error"] = first_line(error)
    return facts


def versions() -> dict[str, str]:
    """Python, CUDA, driver and every installed package."""
    versions = {"Python": python_platform.python_version(), "CUDA": str(torch.version.cuda)}
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        versions["NVIDIA driver"] = " ".join(driver.read_text().splitlines()[0].split())
    for package in importlib.metadata.distributions():
        name = package.name
        if name and name not in versions:  # the first on the path is the one that is imported
            versions[name] = package.version
    return versions


def node_name() -> str:
    """Name of this node: Slurm's, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def environment() -> tuple[int, int]:
    """Rank and number of ranks; fills in torchrun's variables from Slurm's, or for a single process."""
    e = os.environ
    if "RANK" not in e and "SLURM_PROCID" in e:
        e |= {"RANK": e["SLURM_PROCID"], "WORLD_SIZE": e["SLURM_NTASKS"], "LOCAL_RANK": e["SLURM_LOCALID"]}
        if "MASTER_ADDR" not in e:
            command = ["scontrol", "show", "hostnames", e.get("SLURM_STEP_NODELIST") or e["SLURM_JOB_NODELIST"]]
            try:
                names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
            except (OSError, subprocess.SubprocessError):
                raise ConfigError("MASTER_ADDR: set it to the first node's address; scontrol is not here") from None
            e |= {"MASTER_ADDR": names[0], "ORYX_NODES": " ".join(names)}
        e.setdefault("MASTER_PORT", str(20000 + int(e["SLURM_JOB_ID"]) % 10000))
    launch = ranks.read()
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in single.items():
        e.setdefault(name, value)
    return (0, 1) if launch is None else (launch.rank, launch.size)


def store(rank: int, world: int, timeout: float) -> dist.Store:
    """The key-value store on rank 0 (under torchrun, its agent's), without waiting for all to come."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        patience = timedelta(seconds=timeout)
        if rank == 0 and not hosted:
            from oryx_megatron.platform.store import serve

            store = serve(address, port, patience, world_size=world, wait_for_workers=False)
        else:
            store = dist.TCPStore(address, port, world, timeout=patience, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise ConfigError.of_one_rank(
            f"{node_name()}: cannot reach rank 0 at {address}:{port}: {first_line(error)}"
        ) from None
    return dist.PrefixStore(f"health/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
