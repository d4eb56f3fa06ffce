"""parallel.overlap under mode plans: every data-parallel rank communicates in one order, whatever its plans.

megatron-core reduces a bucket of gradients when it is complete and waits for gathered weights where a module is called.
Which parts of a mixer run, and when their gradients are ready, depends on the plan, which differs between data-parallel
ranks: without care one rank's bucket would meet another one's other bucket.
"""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel

from oryx_megatron.compat.megatron import InOrder
from oryx_megatron.model.mixer import OryxMixer


def keep_order(chunk: DistributedDataParallel) -> None:
    """Make a wrapped model chunk gather and reduce in a fixed order; nothing to do where nothing overlaps."""
    if chunk.ddp_config.overlap_param_gather and chunk.ddp_config.use_distributed_optimizer:
        _gather_whole_mixers(chunk)
    if chunk.ddp_config.overlap_grad_reduce:
        chunk.reduction_order = InOrder(chunk)


def give_up_reduction(chunk: DistributedDataParallel) -> None:
    """Forget what a backward pass has begun that will not be finished."""
    if chunk.ddp_config.overlap_grad_reduce:
        chunk.reduction_order.reset()


def _gather_whole_mixers(chunk: DistributedDataParallel) -> None:
    """Let each mixer wait for all of its weights, also of those that no module call reads (convolution, head norms)."""

    def wait(mixer: OryxMixer, unused: Any) -> None:
        for parameter in filter(lambda parameter: parameter.requires_grad, mixer.parameters()):
            chunk.param_to_bucket_group[parameter].finish_param_sync()

    for module in chunk.modules():
        if isinstance(module, OryxMixer):
            module.register_forward_pre_hook(wait)
