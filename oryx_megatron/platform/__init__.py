"""CPU or GPU: the one place that knows what megatron-core assumes of CUDA.

`install()` must run before a megatron-core model, optimizer or schedule is built; `parallel.initialize` calls it.
"""

from __future__ import annotations

import torch

from oryx_megatron import ranks
from oryx_megatron.platform import cpu
from oryx_megatron.platform.gpu import (
    KERNEL_CACHES,
    capability,
    cuda_versions,
    describe,
    gpu_names,
    has_gpu,
    installed,
    missing_package,
    multiprocessors,
    peak_flops,
    transformer_engine_missing,
    use_kernel_cache,
    version,
    wrong_triton_for_fla,
)
from oryx_megatron.platform.source import git_commit

__all__ = [
    "KERNEL_CACHES",
    "backend",
    "capability",
    "cuda_versions",
    "describe",
    "device",
    "git_commit",
    "gpu_names",
    "has_gpu",
    "install",
    "installed",
    "local_rank",
    "missing_package",
    "multiprocessors",
    "peak_flops",
    "peak_memory_bytes",
    "synchronize",
    "transformer_engine_missing",
    "use_kernel_cache",
    "version",
    "wrong_triton_for_fla",
]


def install() -> None:
    """Prepare this process for megatron-core: choose the GPU of this local rank, or redirect CUDA calls to the CPU."""
    if has_gpu():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    else:
        cpu.install()


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """Name of the torch.distributed backend: NCCL between GPUs, gloo between CPUs."""
    return "cpu:gloo,cuda:nccl" if has_gpu() else "gloo"


def local_rank() -> int:
    """Rank within the node, from torchrun's environment; 0 outside of it."""
    launch = ranks.read()
    return 0 if launch is None else launch.local_rank


def synchronize() -> None:
    """Wait for the device, so that a host clock reads finished work."""
    if has_gpu():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak bytes allocated on this rank's GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if has_gpu() else 0
