"""Start and stop torch.distributed and megatron-core's process groups."""

from __future__ import annotations

import os
import weakref
from datetime import timedelta
from typing import Protocol

import torch

from oryx_megatron import compat, platform, ranks
from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.errors import ConfigError, first_line


def initialize(parallel: ParallelConfig, *, seed: int) -> None:
    """Join the process group described by torchrun's environment and build megatron-core's groups.

    Without torchrun's environment this process becomes the only rank. Groups of the same sizes that are there already
    stay, for models that use them; of other sizes, they are given up. Random states are seeded per megatron-core's
    rules: equal on data-parallel ranks, distinct on tensor- and pipeline-parallel ranks.

    Raises:
        ConfigError: the environment contradicts itself, or the other ranks do not report in time.
    """
    launch = ranks.read()
    platform.install()
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        timeout = timedelta(seconds=parallel.distributed_timeout)
        if launch is None or (launch.size == 1 and not _address()):
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(platform.backend(), store=store, rank=0, world_size=1, timeout=timeout)
        else:
            _join(launch, timeout)
    if exist():
        if _sizes() == (
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline,
            parallel.context,
            parallel.expert,
        ):
            compat.megatron.forget_models()
            tensor_parallel.model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=platform.has_gpu())
            return
        release()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=parallel.distributed_timeout / 60,
        # Between CPUs every group is gloo already; a second set would only cost start-up time.
        create_gloo_process_groups=platform.has_gpu(),
    )
    # A generator whose state a CUDA graph can hold; megatron-core forks it around dropout even where there is none.
    tensor_parallel.model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=platform.has_gpu())


def exist() -> bool:
    """Whether megatron-core's groups are there."""
    if not torch.distributed.is_initialized():
        return False
    from megatron.core import parallel_state

    return parallel_state.model_parallel_is_initialized()


def _sizes() -> tuple[int, int, int, int, int]:
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )


def _join(launch: ranks.Launch, timeout: timedelta) -> None:
    """Meet the other ranks."""
    place = _address()
    if not place:
        raise ConfigError.of_one_rank(
            f"RANK={launch.rank} needs MASTER_ADDR and MASTER_PORT, where rank 0 listens; start by torchrun"
        )
    try:
        store = compat.torch.store_of_start(start_name(), timeout)
        rank, size = (-1, -1) if store is None else (launch.rank, launch.size)
        torch.distributed.init_process_group(
            platform.backend(), store=store, rank=rank, world_size=size, timeout=timeout
        )
    except (torch.distributed.DistError, ValueError) as error:
        cause = first_line(error)
        raise ConfigError.of_one_rank(
            f"rank {launch.rank} of {launch.size}: the others did not report at {place} ({cause[:200]}); start all "
            "ranks by torchrun, or unset RANK and WORLD_SIZE to run with one"
        ) from None


def _address() -> str:
    address, port = (os.environ.get(name, "").strip() for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"{address}:{port}" if address and port else ""


def start_name() -> str:
    """Differs between the starts of all ranks by one agent, and is the same on all of them.

    torchrun's count of restarts can differ between the agents of several nodes; oryx_megatron.agent fixes that.
    """
    return os.environ.get("ORYX_START") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


class Holder(Protocol):
    """Something that keeps communicators in use."""

    def forget(self) -> None:
        """Let go of them."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()


def hold(holder: Holder) -> None:
    """Have `holder.forget` called before the groups are given up: NCCL waits for CUDA graphs that hold its kernels."""
    _holders.add(holder)


def release() -> None:
    """Give up megatron-core's groups and stay in the default one, for instance before another layout."""
    for holder in list(_holders):
        holder.forget()
    compat.megatron.destroy_groups()


def destroy() -> None:
    """Leave all process groups; harmless when none exist."""
    if torch.distributed.is_initialized():
        release()
        torch.distributed.destroy_process_group()


def is_main_rank() -> bool:
    """True on global rank 0 and where torch.distributed is not in use."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
