"""Compile the gated delta rule's kernels while the run still imports, in a process of its own.

The longest of flash_qla's kernels compiles for the better part of a minute. A run meets it half a minute after its
start, when all is imported and the model is built; it needs torch, tilelang and flash_qla alone. The process runs one
scan of the run's shape, as the run does before its first step, and leaves the kernels in tilelang's cache. There the
run finds them; for one that is in work it waits (`compat.tilelang.take_turns`).

Nothing depends on the process: the run compiles what it does not find. It ends with the run, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from oryx_megatron import compat, platform, ranks
from oryx_megatron.config.schema import RunConfig

log = logging.getLogger(__name__)

WIDTH = 128
"""Of the heads that flash_qla serves."""
DEATH_OF_PARENT, COMPUTE_MODE = 1, 20
"""Numbers of prctl's PR_SET_PDEATHSIG and of CUDA's CU_DEVICE_ATTRIBUTE_COMPUTE_MODE."""
_process: subprocess.Popen[bytes] | None = None
_turns = -1
"""Descriptor of the file by which the run and the process take turns."""


def begin(run: RunConfig) -> None:
    """Start the process on the first rank of those that share a cache, if flash_qla will serve `run` on this machine.

    Not where an earlier one noted that it compiled all kernels of this shape into this cache.
    """
    global _process, _turns
    launch = ranks.read()
    first = launch is None or (launch.local_rank if run.kernels.cache_dir is None else launch.rank) == 0
    if not (first and _sees_gpus() and _serves(run)):
        return
    platform.use_kernel_cache(run.kernels.cache_dir)
    try:
        if (note := _note(shape := _shape(run))).exists():
            return
        _turns = os.memfd_create("turns")
        given = (os.getpid(), _turns, str(note), shape)
        _process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"from oryx_megatron.train import ahead; ahead.work(*{given!r})"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(_turns,),
            start_new_session=True,
        )
    except OSError:
        log.debug("nothing is compiled ahead", exc_info=True)
        return
    compat.tilelang.take_turns(_turns)


def end() -> None:
    """End the process if it is there still: the kernels are ready, nobody waits for it any more."""
    global _process
    if _process is None:
        return
    if _process.poll() is None:
        os.killpg(_process.pid, signal.SIGKILL)
    if status := _process.wait():
        log.debug("not all was compiled ahead: exit code %d", status)
    _process = None
    compat.tilelang.take_turns(None)
    os.close(_turns)


def _sees_gpus() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))  # torch would say, and is not imported yet


def _serves(run: RunConfig) -> bool:
    model, kernels = run.model, run.kernels
    return (
        model.mixer == "gdn"
        and model.has_recurrence
        and model.qk_head_dim == model.v_head_dim == WIDTH
        and run.precision.dtype == "bf16"
        and kernels.recurrence in ("auto", "fla")
        and kernels.mixer in ("auto", "fused")
        and all(platform.installed(package) for package in ("fla", "flash_qla", "tilelang"))
    )


def _shape(run: RunConfig) -> dict[str, int]:
    """What one rank scans, as arguments of `ops.scans.rehearse`."""
    ranks_of_heads = run.parallel.tensor * run.parallel.context
    return {
        "batch": run.train.micro_batch_size,
        "length": run.data.sequence_length,
        "heads": run.model.num_heads // ranks_of_heads,
        "groups": run.model.kv_heads // ranks_of_heads,
    }


def _note(shape: dict[str, int]) -> Path:
    """A file in tilelang's cache: kernels of this shape are there, from these versions."""
    versions = [platform.version(name) for name in ("fla-core", "flash-qla", "tilelang", "torch")]
    name = hashlib.sha256(json.dumps([shape, versions], sort_keys=True).encode()).hexdigest()[:16]
    return Path(os.environ.get("TILELANG_CACHE_DIR", "~/.tilelang/cache")).expanduser() / f"oryx-scan-{name}"


def work(parent: int, turns: int, note: str, shape: dict[str, Any]) -> None:
    """What the process does, and then ends, with 0 if all is compiled."""
    gc.disable()  # a fifth of its imports' time, and it ends soon
    done = False
    with contextlib.suppress(Exception):  # of no consequence for the run, which meets it again if it must
        _end_with(parent)
        done = _may_share_the_gpu() and _compile(turns, Path(note), shape)
    os._exit(0 if done else 1)


def _compile(turns: int, note: Path, shape: dict[str, Any]) -> bool:
    import tilelang
    import torch

    from oryx_megatron.ops import scans

    if not (platform.has_gpu() and tilelang.env.is_cache_enabled()):
        return False
    platform.install()
    compat.tilelang.take_turns(turns)
    with compat.tilelang.side_by_side() as failed:
        scans.rehearse(**shape, widths=(WIDTH, WIDTH), dtype=torch.bfloat16)
        torch.cuda.empty_cache()  # to the run; less than its first step takes
    if not failed:
        note.touch()
    return not failed


def _end_with(parent: int) -> None:
    """End this process, and those that it starts, when `parent` ends or a SIGTERM comes."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    ctypes.CDLL(None).prctl(DEATH_OF_PARENT, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        os.killpg(0, signal.SIGKILL)


def _may_share_the_gpu() -> bool:
    """Whether CUDA lets several processes use this rank's GPU; where one alone may, it is the run."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, count, mode = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return False
    cuda.cuDeviceGet(ctypes.byref(device), platform.local_rank() % count.value)
    return cuda.cuDeviceGetAttribute(ctypes.byref(mode), COMPUTE_MODE, device) == 0 and mode.value == 0
