"""What this machine's GPU and its optional packages can do. Nothing here imports those packages;
torch is imported inside functions, for commands that need none of it."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import logging
import os
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

WRONG_TRITON = ((3, 4, 0), (3, 7, 1))
"""From the first (included) to the second, FLA's gated backward kernels give wrong gradients on Hopper (its #640)."""


def has_gpu() -> bool:
    """True on a machine whose torch sees an NVIDIA GPU."""
    import torch

    return torch.cuda.is_available()


@cache
def capability() -> tuple[int, int]:
    """Compute capability of this rank's GPU, e.g. (9, 0) for Hopper; (0, 0) without one."""
    import torch

    return torch.cuda.get_device_capability() if has_gpu() else (0, 0)


@cache
def multiprocessors() -> int:
    """Number of multiprocessors of this rank's GPU; 1 without one."""
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if has_gpu() else 1


@cache
def shared_memory() -> int | None:
    """Bytes of shared memory that one program can have on this rank's GPU; None without one."""
    import torch

    if not has_gpu():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs leave it out


def gpu_names() -> dict[str, int]:
    """Names of the GPUs that this process sees, and how many there are of each."""
    import torch

    return dict(Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))


def cuda_versions() -> str:
    """CUDA and NCCL that torch was built with."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    return f"CUDA {torch.version.cuda}, NCCL {nccl}"


PEAK_TFLOPS = {"GB200": 2450, "B200": 2250, "H200": 989, "H100": 989, "H20": 148, "A100": 312, "L40S": 362}
"""Dense bf16 peak of data centre GPUs (NVIDIA's data sheets), by a part of their names; the first that fits counts."""


def describe() -> str:
    """This rank's device in words."""
    import torch

    if not has_gpu():
        return f"CPU, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {cuda_versions()}"


def peak_flops() -> float | None:
    """Dense bf16 peak of this rank's GPU in FLOP/s; None on a CPU and for a GPU that is not listed."""
    import torch

    name = torch.cuda.get_device_name() if has_gpu() else ""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


@cache
def installed(package: str) -> bool:
    """Whether `import package` would find something; a part of a package as `flash_attn.cute`."""
    parent, _, _ = package.rpartition(".")
    try:
        return (not parent or installed(parent)) and importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent is there and cannot be imported here (compat/transformer_engine.py)
        return False


def missing_package(package: str, *, gpu: bool = False) -> str | None:
    """Why `package` cannot be used here, or None; with `gpu`, it needs one."""
    if gpu and not has_gpu():
        return "there is no GPU"
    return None if installed(package) else f"{package} is not installed"


def version(distribution: str) -> tuple[int, ...]:
    """Numbers of an installed distribution's version, e.g. (3, 6, 0); empty when it is not installed."""
    try:
        text = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ()
    numbers = []
    for part in text.split("+")[0].split(".")[:3]:
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def wrong_triton_for_fla(flash_qla_serves: bool) -> str | None:
    """Why FLA's gated backward kernels would be wrong on this GPU with these versions, or None.

    flash_qla replaces them where it serves (heads of 128), and tilelang replaces the wrong one of them.
    """
    low, high = WRONG_TRITON
    if capability()[0] != 9 or not low <= version("triton") < high:
        return None
    tilelang = installed("tilelang") and shutil.which("nvcc") is not None
    if tilelang or (flash_qla_serves and installed("flash_qla") and installed("tilelang")):
        return None
    found, fixed = (".".join(map(str, v)) for v in (version("triton"), high))
    return (
        f"Triton {found} on a Hopper GPU gives wrong gradients in FLA's gated kernels; "
        f"install tilelang (and have nvcc on the PATH), or Triton {fixed} or later"
    )


KERNEL_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "cute",
}
"""Environment variables of the compilers that kernels are written for, and a folder for each."""


@cache
def _say_not_used(folder: str, why: str | None) -> None:
    """Once: a command may ask for its cache again."""
    log.warning("kernels.cache_dir %s is not used: %s", folder, why)


def use_kernel_cache(folder: str | None) -> None:
    """Let every kernel compiler keep its results under `folder`; before any of them is imported.

    Variables that are set already stay as they are. Triton keeps what its autotuner found, too. None, or a folder that
    cannot be written (with a warning): each compiler's own folder.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            _say_not_used(folder, error.strerror)
            return
        for variable, name in KERNEL_CACHES.items():
            os.environ.setdefault(variable, str(Path(folder).resolve() / name))


def transformer_engine_missing() -> str | None:
    """Why TransformerEngine cannot be used here, or None."""
    return missing_package("transformer_engine.pytorch", gpu=True)
