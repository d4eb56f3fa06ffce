"""optimizer.cpu_offload without a GPU: some tensors count as the GPU's, their clones by `.cpu()` as host memory.

megatron-core's optimizer of two devices, its copies, its groups and its checkpoints are the real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.config.schema import OptimizerConfig, PrecisionConfig
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import session, tiny_run
from oryx_megatron.train import optimizer as own


@contextlib.contextmanager
def two_memories() -> Iterator[None]:
    """Every tensor says that it is on a GPU, but for those that `.cpu()` made and what is made of them."""
    kept = {name: getattr(Tensor, name) for name in ("is_cuda", "cpu", "detach", "clone", "float")}

    def marked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(self: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            result = function(self, *arguments, **keywords)
            if getattr(self, "in_host_memory", False):
                result.in_host_memory = True  # type: ignore[attr-defined]
            return result

        return call

    def cpu(self: Tensor) -> Tensor:
        copy = kept["clone"](self)
        copy.in_host_memory = True
        return copy

    for name in ("detach", "clone", "float"):
        setattr(Tensor, name, marked(kept[name]))
    Tensor.cpu = cpu  # type: ignore[method-assign]
    Tensor.is_cuda = property(lambda self: not getattr(self, "in_host_memory", False))  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(Tensor, name, value)


def as_if_beside_a_gpu() -> None:
    """For the rest of this process."""
    from megatron.core.optimizer import distrib_optimizer, optimizer_config
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    stream = SimpleNamespace(
        wait_stream=lambda *_: None,
        record_event=lambda: SimpleNamespace(synchronize=lambda: None, wait=lambda *_: None),
    )
    torch.cuda.Stream = torch.cuda.current_stream = lambda *_: stream  # type: ignore[assignment, misc]
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment]
    Tensor.pin_memory = lambda self: self  # type: ignore[method-assign]
    empty = torch.empty
    hybrid_optimizer.torch = SimpleNamespace(
        **{**vars(torch), "empty": lambda *size, pin_memory=False, **keywords: empty(*size, **keywords)}
    )
    split = hybrid_optimizer.HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def groups(self: Any, fraction: float) -> Any:
        with two_memories():
            return split(self, fraction)

    hybrid_optimizer.HybridDeviceOptimizer._get_sub_optimizer_param_groups = groups
    distrib_optimizer.HAVE_APEX_OR_TE = True
    optimizer_config.is_te_min_version = lambda version: True


def losses(dtype: str, offload: bool, root: str) -> list[list[float]]:
    """Of three steps, of three more, and of those again after loading."""
    platform.install()
    run = tiny_run(
        "gdn",
        precision=PrecisionConfig(dtype=dtype),
        optimizer=OptimizerConfig(lr=1e-2, cpu_offload=offload),  # type: ignore[arg-type]
    )
    if offload:
        from oryx_megatron.train import engine

        as_if_beside_a_gpu()
        found = own.platform.has_gpu
        build = own.build_optimizer

        def build_beside_a_gpu(*arguments: Any) -> Any:
            own.platform.has_gpu = lambda: True  # type: ignore[assignment]
            own.get_megatron_optimizer, plain = without_gloo(own.get_megatron_optimizer), own.get_megatron_optimizer
            try:
                return build(*arguments)
            finally:
                own.platform.has_gpu, own.get_megatron_optimizer = found, plain

        engine.build_optimizer = build_beside_a_gpu
    with session(run) as opened:
        if offload:
            assert_in_host_memory(opened.optimizer)
        first = [loss for loss, _ in opened.steps(3)]
        manager = opened.checkpoints(Path(root))
        assert manager.save(3, opened.manifest) or manager.wait()
        second = [loss for loss, _ in opened.steps(3)]
    with session(run, iteration=3) as opened:
        assert opened.checkpoints(Path(root)).load() is not None
        return [first, second, [loss for loss, _ in opened.steps(3)]]


def assert_in_host_memory(optimizer: MegatronOptimizer) -> None:
    """Every parameter that the optimizer updates has its copy there."""
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = single.optimizer
        assert isinstance(inner, HybridDeviceOptimizer)
        assert len(inner.gpu_params_map_cpu_copy) == sum(len(group["params"]) for group in inner.param_groups) > 0


def without_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, use_gloo_process_groups: function(*arguments, use_gloo_process_groups=False)


@pytest.mark.parametrize(("dtype", "ranks"), [("bf16", 2), ("fp32", 1)])
def test_state_in_host_memory_trains_and_resumes_as_beside_the_weights(tmp_path: Path, dtype: str, ranks: int) -> None:
    plain, offloaded = (
        run_distributed(losses, ranks, dtype, offload, str(tmp_path / str(offload))) for offload in (False, True)
    )
    tolerance = 1e-4 if dtype == "bf16" else 1e-5  # torch's fused AdamW on the one side
    for own_way, other_way in zip(plain, offloaded, strict=True):
        assert own_way[1] == own_way[2]
        assert other_way[1] == other_way[2]
        assert other_way[0] + other_way[1] == pytest.approx(own_way[0] + own_way[1], rel=tolerance)
