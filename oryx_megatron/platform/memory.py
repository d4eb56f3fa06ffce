"""How much memory there is, for sizes that no machine holds to be refused before anything is allocated."""

from __future__ import annotations

import psutil
import torch

from oryx_megatron.errors import ConfigError
from oryx_megatron.platform.gpu import has_gpu


def device_bytes() -> int:
    """Memory of this rank's GPU; on a CPU that of the host, with swap."""
    if has_gpu():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return host_bytes()


def used_bytes() -> int:
    """Most bytes that tensors of this rank took on its GPU so far; on a CPU what the process has. Waits for nothing."""
    if has_gpu():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def host_bytes() -> int:
    """Memory of the host, with swap; a job may be allowed less."""
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def check(what: str, wanted: int, there: int, advice: str) -> None:
    """Raise ConfigError where `what` takes more bytes than are `there` in all."""
    if wanted > there:
        raise ConfigError(f"{what} take {_size(wanted)} on each rank, but there are {_size(there)} in all; {advice}")


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count < 2**80 else f"more than {2**50:,} GiB"
