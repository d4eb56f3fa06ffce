"""State of an optimizer whose data-parallel ranks own whole parameters (train/layerwise.py), for any other layout.

megatron-core's description of it holds for the same number of data-parallel ranks only: it numbers the parameters that
a rank owns. Here each tensor has the name of its weight; what is no tensor is the number of updates, the same for all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

from oryx_megatron.checkpoint.shards import PREFIX, by_parameter

STEP = "step"


def owns_whole(optimizer: Any) -> bool:
    """Whether this module describes an optimizer."""
    return isinstance(optimizer, LayerWiseDistributedOptimizer)


def sharded_optimizer_state(optimizer: Any, model_state: dict[str, Any], step: int) -> dict[str, Any]:
    """Sharded state of such an optimizer after `step` updates.

    `model_state` says where its weights lie in the whole tensors.
    """
    sharded = by_parameter(model_state)
    parameters = {
        i: {
            name: owned(make_sharded_optimizer_tensor(sharded[weight], tensor, f"{PREFIX}{name}"))
            for name, tensor in tensors.items()
        }
        for i, (weight, tensors) in enumerate(_tensors(optimizer))
    }
    return {"param_state": parameters, STEP: step}


@torch.no_grad()
def fill(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Copy what was read for `sharded_optimizer_state` into the optimizer, and tell the other ranks its weights."""
    for i, (weight, tensors) in enumerate(_tensors(optimizer)):
        for name, tensor in tensors.items():
            tensor.copy_(loaded["param_state"][i][name])
        weight.copy_(tensors["param"])
    for state in _states(optimizer):
        state[STEP] = loaded[STEP]
    optimizer.allgather_params()


def masters(single: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights of an optimizer that is not sharded by ranges, or of this rank's share, each with what is updated.

    That is its fp32 master, or the weight itself where it is fp32.
    """
    if not hasattr(single, "float16_groups"):
        return [(parameter, parameter) for group in single.param_groups for parameter in group["params"]]
    pairs = []
    for weights, copies, plain in zip(
        single.float16_groups, single.fp32_from_float16_groups, single.fp32_from_fp32_groups, strict=True
    ):
        pairs += [*zip(weights, copies, strict=True), *((parameter, parameter) for parameter in plain)]
    return pairs


def _tensors(optimizer: Any) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """This rank's weights, each with its state and, as `param`, its fp32 master or itself."""
    (single,) = optimizer.chained_optimizers
    single.optimizer.allocate()
    found = []
    for weight, master in masters(single):
        state = {name: tensor for name, tensor in single.optimizer.state[master].items() if name != STEP}
        found.append((weight, state | {"param": master.detach()}))
    return found


def _states(optimizer: Any) -> list[dict[str, Any]]:
    (single,) = optimizer.chained_optimizers
    return list(single.optimizer.state.values())


def owned(entry: Any) -> Any:
    """A sharded tensor of which there is no copy on other data-parallel ranks."""
    return replace(entry, replica_id=(*entry.replica_id[:2], 0))
