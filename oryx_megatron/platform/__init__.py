"""CPU or GPU: the one place that knows what megatron-core assumes of CUDA.

`install()` must run before a megatron-core model, optimizer or schedule is built; `parallel.initialize` calls it.
Importing this package costs no torch; it defers imports of megatron-core that nothing here uses (compat/hook.py).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from oryx_megatron import compat, ranks
from oryx_megatron.compat import late
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
    shared_memory,
    transformer_engine_missing,
    use_kernel_cache,
    version,
    wrong_triton_for_fla,
)
from oryx_megatron.platform.source import git_commit

if TYPE_CHECKING:
    import torch

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
    "late",
    "leave_default_stream",
    "local_rank",
    "mark",
    "missing_package",
    "multiprocessors",
    "peak_flops",
    "peak_memory_bytes",
    "seconds_between",
    "shared_memory",
    "synchronize",
    "to_device",
    "transformer_engine_missing",
    "use_kernel_cache",
    "version",
    "wrong_triton_for_fla",
]


def install() -> None:
    """Prepare this process for megatron-core: choose the GPU of this local rank, or redirect CUDA calls to the CPU."""
    import torch

    use_kernel_cache(None)
    if has_gpu():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    else:
        compat.torch.install_cpu()


def device() -> torch.device:
    """The device of this rank."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """Name of the torch.distributed backend: NCCL between GPUs, gloo between CPUs."""
    return "cpu:gloo,cuda:nccl" if has_gpu() else "gloo"


def local_rank() -> int:
    """Rank within the node, from torchrun's environment; 0 outside of it."""
    launch = ranks.read()
    return 0 if launch is None else launch.local_rank


def to_device(x: torch.Tensor, where: torch.device | None = None) -> torch.Tensor:
    """`x` on `where` (this rank's device), by a copy that the host does not wait for."""
    where = where or device()
    if where.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(where, non_blocking=True)


def mark() -> Any:
    """A moment of this rank's device, for `seconds_between`: nobody waits for it now."""
    import torch

    if not has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds between two marks that the device has passed."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def leave_default_stream() -> None:
    """Launch what this thread does from here on in a stream of its own: the default one cannot be captured."""
    import torch

    if torch.cuda.current_stream() == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(stream)


def synchronize() -> None:
    """Wait for the device, so that a host clock reads finished work."""
    import torch

    if has_gpu():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak bytes allocated on this rank's GPU; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if has_gpu() else 0
