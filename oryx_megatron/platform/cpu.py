"""Run megatron-core on a machine without a GPU by redirecting what it asks of CUDA to the CPU.

megatron-core 0.16 allocates with `device="cuda"` and `torch.cuda.current_device()`, compares `Tensor.type()` with
`"torch.cuda.FloatTensor"`, and keeps its random states in CUDA generators. Each of those is replaced here, process-wide
and once. Nothing is touched when a GPU is present, so no GPU run can depend on this file.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "eye"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)
_installed = False


class _NoStream:
    """Stands for a CUDA stream or event: the CPU runs everything in order, so waiting is already done."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def is_installed() -> bool:
    """True once `install` has redirected CUDA calls in this process."""
    return _installed


def install() -> None:
    """Redirect; harmless when called again.

    Raises:
        RuntimeError: a GPU is present, where megatron-core must not be redirected.
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("the CPU platform must not be installed on a machine with a GPU")
    if _installed:
        return
    _redirect_devices()
    _redirect_random_states()
    _redirect_tensors()
    _installed = True


def _nothing() -> Callable[..., None]:
    """A new function each time: torch's compiler refuses one object under several names."""
    return lambda *args, **kwargs: None


def _redirect_devices() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init"):
        setattr(cuda, name, _nothing())
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _nothing())
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda device=None: _NoStream()
    cuda.device_count = lambda: 1


def _redirect_random_states() -> None:
    cuda: Any = torch.cuda

    def get_rng_state(device: object = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: object = "cuda") -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state, module.manual_seed = get_rng_state, set_rng_state, manual_seed
    cuda.default_generators = _EveryIndex(torch.default_generator)
    cuda._lazy_call = lambda function, **kwargs: function()
    # megatron-core binds these two by name at import, which may have happened already.
    if bound := sys.modules.get("megatron.core.tensor_parallel.random"):
        bound._lazy_init, bound._lazy_call = cuda._lazy_init, cuda._lazy_call  # type: ignore[attr-defined]


class _EveryIndex:
    """A sequence whose every element, for any index or device, is the CPU generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __getitem__(self, index: object) -> torch.Generator:
        return self.generator


def _redirect_tensors() -> None:
    tensor: Any = torch.Tensor
    original_type = tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.")
        return original_type(self, dtype, *args, **kwargs)

    tensor.type = type_name
    tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor.to = _on_cpu(tensor.to)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return function(*args, **kwargs)

    return redirected


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"
