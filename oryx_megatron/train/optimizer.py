"""Optimizer: megatron-core's, from the run config."""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    _get_param_groups,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config, unwrap_model

from oryx_megatron import compat, platform
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.train import mup, overlap
from oryx_megatron.train.freeze import Frozen
from oryx_megatron.train.layerwise import LayerWise
from oryx_megatron.train.muon import Matrix, Muon, matrices

BUCKET = 40_000_000
"""Parameters that are reduced and gathered at once under parallel.overlap."""


def wrap(run: RunConfig, chunks: list[Any]) -> list[DistributedDataParallel]:
    """Model chunks in megatron-core's data-parallel wrapper, which holds and reduces their gradients."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=run.parallel.overlap,
        overlap_param_gather=run.parallel.overlap and _in_ranges(run),
        use_distributed_optimizer=_in_ranges(run),
        fp8_param_gather=run.precision.fp8_params,
        # An own bucket for all parameters unless communication overlaps with the backward pass.
        bucket_size=None if not run.parallel.overlap else BUCKET,
    )
    wrapped = [
        DistributedDataParallel(
            config=get_model_config(chunk),
            ddp_config=config,
            module=chunk,
            # All buffers of a later chunk in one call; gloo would mix up those of unequal types (torch 2.13).
            disable_bucketing=i > 0 and platform.has_gpu(),
        )
        for i, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        overlap.keep_order(chunk)
    return wrapped


def connect(run: RunConfig, chunks: list[DistributedDataParallel], optimizer: Any) -> None:
    """Give megatron-core's schedules the functions they call around a step."""
    config = get_model_config(chunks[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if run.parallel.overlap:
        config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
        if len(chunks) > 1:
            config.grad_sync_func = [c.start_grad_sync for c in chunks]
        if _in_ranges(run) and len(chunks) > 1:
            config.param_sync_func = [c.start_param_sync for c in chunks]


def build_optimizer(
    run: RunConfig, chunks: list[DistributedDataParallel], frozen: Frozen | None = None
) -> MegatronOptimizer:
    """AdamW or Muon with fp32 master weights; vectors (norms, a_log, dt_bias, d) get no weight decay."""
    settings = run.optimizer
    bf16 = run.precision.dtype == "bf16"
    if settings.cpu_offload and not platform.has_gpu():
        raise ConfigError("optimizer.cpu_offload: there is no GPU here whose memory it could spare; set it to false")
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=run.schedule.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        clip_grad=settings.clip_grad,
        use_distributed_optimizer=_in_ranges(run),
        overlap_param_gather=run.parallel.overlap and _in_ranges(run),
        optimizer_cpu_offload=settings.cpu_offload,
        use_precision_aware_optimizer=settings.cpu_offload,
        optimizer_offload_fraction=1.0 if settings.cpu_offload else 0.0,
    )
    overrides = get_standard_config_overrides(config) | (frozen or Frozen()).overrides()
    compat.megatron.fp32_apart(overrides, ("*.a_log", "*.dt_bias", "*.self_attention.d"))
    compat.megatron.identify_groups()
    if settings.name == "muon":
        return _build_muon(run, config, chunks, overrides)
    overrides |= mup.overrides(run)
    if settings.cpu_offload:
        compat.megatron.count_fp32_as_copied()
        _use_own_cores()
    with compat.megatron.without_gradients():
        return get_megatron_optimizer(config, chunks, overrides, use_gloo_process_groups=platform.has_gpu())


def _in_ranges(run: RunConfig) -> bool:
    """Whether data-parallel ranks own ranges of megatron-core's flat buffers; Muon's own whole parameters."""
    return run.parallel.distributed_optimizer and run.optimizer.name == "adamw"


def _use_own_cores() -> None:
    """A thread for each core of this rank's part of the node: AdamW runs there, and torchrun allows a single one."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(torch.get_num_threads(), len(os.sched_getaffinity(0)) // ranks))


def _build_muon(run: RunConfig, config: OptimizerConfig, chunks: list[Any], overrides: Any) -> MegatronOptimizer:
    """`Muon` inside megatron-core's wrappers: sharded by whole parameters, or not at all."""
    settings = run.optimizer
    known: dict[torch.Tensor, Matrix] = {}
    for chunk in chunks:
        known.update(matrices(unwrap_model(chunk)))
    overrides |= mup.overrides(run, known.__contains__)
    groups = _get_param_groups(chunks, config, overrides)

    def make(own: list[dict[str, Any]]) -> Muon:
        return Muon(
            own,
            matrix_of=known.get,
            group=parallel_state.get_tensor_model_parallel_group(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.muon_momentum,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            dtype=torch.bfloat16 if config.bf16 else torch.float32,
        )

    def allocate(optimizer: Muon, unused: Any = None) -> None:
        optimizer.allocate()

    def state_size(parameter: torch.Tensor) -> int:  # fp32 numbers: the master, and one mean or two
        return parameter.numel() * (2 if parameter in known else 3)

    optimizer: MegatronOptimizer
    if run.parallel.distributed_optimizer:
        plain = make(groups) if config.bf16 else FP32Optimizer(make(groups), config, allocate)
        optimizer = LayerWise(plain, config, ProcessGroupCollection.use_mpu_process_groups(), allocate, size=state_size)
        singles = optimizer.chained_optimizers
    else:
        singles = []
        for experts, ranks in (
            (False, parallel_state.get_model_parallel_group()),
            (True, parallel_state.get_expert_tensor_model_pipeline_parallel_group()),
        ):
            if own := [group for group in groups if group["is_expert_parallel"] == experts]:
                wrapped = (
                    Float16OptimizerWithFloat16Params(make(own), config, None, allocate)
                    if config.bf16
                    else FP32Optimizer(make(own), config, allocate)
                )
                wrapped.grad_stats_parallel_group = ranks
                singles.append(wrapped)
        optimizer = singles[0] if len(singles) == 1 else ChainedOptimizer(singles)
    if config.bf16:  # each Muon now holds the fp32 masters instead of the weights
        for single in singles:
            for weights, masters in zip(single.float16_groups, single.fp32_from_float16_groups, strict=True):
                pairs = zip(weights, masters, strict=True)
                known.update({master: known[weight] for weight, master in pairs if weight in known})
    return optimizer


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Make the reduced gradients ready for the optimizer; their norm over all model-parallel ranks."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip gradients of this norm and update the parameters."""
    config = optimizer.config
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):  # one of its own for experts
        if config.clip_grad > 0 and (parameters := single.get_parameters()):
            beside = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8  # where cpu_offload has gradients
            clip_grad_by_total_norm_fp32(parameters, config.clip_grad, norm, use_decoupled_grad=beside)
    optimizer.step_with_ready_grads()
