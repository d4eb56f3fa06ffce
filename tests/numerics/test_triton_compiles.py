"""Every kernel of ops/triton compiles for a Hopper GPU, at the widths of the presets; nothing is launched.

Needs Triton, which torch's wheel for CPUs does not bring (make python-3.12 has it), and no GPU. The interpreter of
test_triton_kernels.py runs what the compiler may still refuse: types that do not meet, tiles that do not fit.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from oryx_megatron import ops, parallel, platform
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.model.build import build_chunk
from oryx_megatron.model.config import transformer_config
from oryx_megatron.model.warm import compile_kernels
from oryx_megatron.ops import TokenLayout, backends, scans
from oryx_megatron.testing.fused_steps import FUSED
from oryx_megatron.testing.layouts import tiny_run

pytestmark = [
    pytest.mark.skipif(
        not platform.installed("triton") or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs Triton, and its compiler",
    ),
    pytest.mark.skipif(platform.has_gpu(), reason="tests/gpu runs the compiled kernels"),
]
SHARED_MEMORY = 232_448
"""Bytes that one program of an H100 can have (CUDA C++ programming guide, compute capability 9.0)."""
LEAST_SHARED_MEMORY = 99 << 10
"""The least of GPUs since Ampere (compute capabilities 8.6 and 8.9)."""
HOPPER = ("cuda", 90, 32)
H100_MULTIPROCESSORS = 132


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, list[Any]]:
    """Kernels by name, as they were compiled in the place of being launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        def get_current_target(self) -> Any:
            return GPUTarget(*HOPPER)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    found: dict[str, list[Any]] = {}
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.setdefault(f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}", []).append(kernel)
        return kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(platform, "multiprocessors", lambda: H100_MULTIPROCESSORS)
    return found


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What others' kernels compute is left out."""
    monkeypatch.setattr(ops, "attend", attend)
    monkeypatch.setattr(ops, "delta_scan", delta_scan)
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.destroy()


def attend(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    heads = q.shape[2] // v.shape[2]
    share = 0 * (q.sum() + k.sum())
    return share + v.repeat_interleave(heads, 2)[:, : q.shape[1]]


def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, *, initial: Any = None, final: bool = False
) -> tuple[Tensor, None]:
    share = 0 * (q.sum() + k.sum() + decay.sum() + beta.sum())
    return (share + v.repeat_interleave(q.shape[2] // v.shape[2], 2)).to(v.dtype), None


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("1.4b-gdn", {}), ("1.4b-mamba2", {}), ("130m-gdn", {}), ("130m-gdn", {"qk_head_dim": 256, "v_head_dim": 256})],
    ids=str,
)
def test_kernels_of_a_run(compiled: dict[str, list[Any]], preset: str, changes: dict[str, Any]) -> None:
    model = dataclasses.replace(load_model(preset), vocab_size=128, num_layers=1, **changes)
    run = tiny_run(precision__dtype="bf16", data__documents="isolated", data__sequence_length=256)
    run = dataclasses.replace(run, model=model)
    config = transformer_config(run.model, run.parallel, run.precision, **FUSED)
    compile_kernels(run, [build_chunk(config)])
    assert {"rows.gated_norm_forward", "rows.gated_norm_backward", "rows.swiglu_backward"} <= set(compiled)
    assert ("ssd.grad_keys" in compiled) == (model.mixer == "mamba2")
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.metadata.target.arch == HOPPER[1], name
            assert kernel.asm["cubin"], name
            assert kernel.metadata.shared <= SHARED_MEMORY, name


def compile_scan(dtype: torch.dtype, qk_head_dim: int, v_head_dim: int) -> None:
    """With states at both ends, as generation asks for them."""
    widths = ((4, qk_head_dim), (2, qk_head_dim), (2, v_head_dim))
    given = [torch.randn(1, 130, heads, width, dtype=dtype, requires_grad=True) for heads, width in widths]
    gates = [torch.randn(1, 130, 4, requires_grad=True) for _ in range(2)]
    d, initial = torch.randn(4, requires_grad=True), torch.randn(1, 4, qk_head_dim, v_head_dim, requires_grad=True)
    o, last = scans.ssd_scan(*given, *gates, d, initial=initial, final=True)
    assert last is not None
    torch.autograd.grad(o.float().sum() + last.sum(), [*given, *gates, d, initial])


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [("bf16", (128, 128)), ("bf16", (64, 128)), ("bf16", (128, 32)), ("fp32", (64, 64)), ("fp32", (32, 128))],
    ids=str,
)
def test_shared_memory_of_the_scan(compiled: dict[str, list[Any]], dtype: str, widths: tuple[int, int]) -> None:
    """No kernel needs more than what decides whether a GPU can run them."""
    compile_scan(torch.float32 if dtype == "fp32" else torch.bfloat16, *widths)
    assert set(compiled) == {f"ssd.{name}" for name in ("states", "outputs", "grad_states", "grad_values", "grad_keys")}
    model = dataclasses.replace(load_model("tiny-mamba2"), qk_head_dim=widths[0], v_head_dim=widths[1])
    bound = scans._most_shared_memory(backends.Workload(model, dtype))
    most = max(kernel.metadata.shared for kernels in compiled.values() for kernel in kernels)
    assert most <= max(bound, LEAST_SHARED_MEMORY)
    assert bound / 2 < compiled["ssd.grad_keys"][0].metadata.shared <= bound
