"""State of a distributed optimizer as every rank holds it, described so that any other layout can read it.

A data-parallel rank owns a contiguous flat range of each parameter. Such a range of an n-dimensional tensor is a few
rectangles (`boxes`), and a rectangle is what a distributed checkpoint stores. So every rank writes and reads its own
part and nothing is exchanged, where megatron-core's `fully_reshardable` first gathers all of it on all ranks. Names,
shapes and data types in the checkpoint are those of `fully_reshardable`: each reads what the other wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from oryx_megatron import compat, platform
from oryx_megatron.errors import CheckpointError

FORM = "fully_reshardable"
"""megatron-core's name for what is in the checkpoint."""
PREFIX = "optimizer.state."
STATES = ("param", "exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and size along each dimension."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The rectangles that make up elements `start` to `stop` of a row-major tensor, in their order in memory.

    At most 2n - 1 for n dimensions: the rest of the first row, whole rows, the beginning of the last row.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, row - (first * row - start), row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    for offset, size in boxes(shape[1:], start, stop):
        yield (index, *offset), (1, *size)


def own_shards(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers whose state this module describes: one, and one of its own for experts where there are any.

    None of those that megatron-core has to describe: not distributed, with state that is not fp32, in host memory.
    """
    singles = compat.megatron.singles(optimizer)
    plain = all(
        type(single) is DistributedOptimizer
        and not single.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        and not single.ddp_config.use_megatron_fsdp
        and not isinstance(single.optimizer, HybridDeviceOptimizer)
        for single in singles
    )
    return singles if plain else []


def common_step(optimizer: MegatronOptimizer) -> int:
    """Updates done, also where this rank owns nothing that was updated, as in a frozen pipeline stage; collective."""
    steps = [0]
    for single in compat.megatron.singles(optimizer):
        if single.optimizer is None:
            continue
        steps += [int(state["step"]) for state in single.optimizer.state.values() if "step" in state]  # torch's
        steps += [int(group.get("step", 0)) for group in single.optimizer.param_groups if group["params"]]
    most = platform.to_device(torch.tensor(max(steps)))
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _settings(optimizer: DistributedOptimizer, step: int) -> dict[str, Any]:
    """What megatron-core's `state_dict` gives; it fails, or knows no step, where the rank owns nothing."""
    if any(group["params"] for group in optimizer.optimizer.param_groups):
        return optimizer.state_dict()
    groups = optimizer.optimizer.state_dict()["param_groups"]
    plain = [{name: value for name, value in group.items() if name != "params"} | {"step": step} for group in groups]
    return {"optimizer": {"param_groups": plain}}


def sharded_optimizer_state(
    optimizer: DistributedOptimizer, model_state: dict[str, Any], *, step: int = 0, loading: bool = False
) -> dict[str, Any]:
    """Sharded state of an optimizer of `own_shards`.

    Args:
        optimizer: For loading, its state tensors must exist or be of a kind that megatron-core allocates.
        model_state: Sharded state of its model, which says where a parameter lies in the whole tensor.
        step: Of `common_step`.
        loading: Leave the tensors to be read empty; `fill` takes them.

    Raises:
        CheckpointError: a fused weight is stored in parts that do not follow each other in it.
    """
    state = _settings(optimizer, step)
    if loading:  # as megatron-core does: allocates what is not there yet
        optimizer.load_state_dict(_settings(optimizer, step))
    sharded = by_parameter(model_state)
    parameters: dict[int, Any] = {}
    for i, (parameter, start, stop) in enumerate(owned_ranges(optimizer)):
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        pieces = list(
            rectangles(sharded[parameter], parameter, start, stop, optimizer.distributed_optimizer_instance_id)
        )
        parameters[i] = {
            name: {
                j: _named(piece, name, None if loading else tensors[name].detach()[first:last].view(piece.local_shape))
                for j, (piece, first, last) in enumerate(pieces)
            }
            for name in STATES
        }
    if parameters:
        state["param_state"] = parameters
    state["param_state_sharding_type"] = FORM
    return state


@torch.no_grad()
def fill(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Copy what was read for `sharded_optimizer_state` into the optimizer's tensors."""
    parameters = loaded.get("param_state", {})
    for i, (parameter, _, _) in enumerate(owned_ranges(optimizer)):
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        for name in STATES:
            read = parameters[i][name]
            tensors[name].copy_(torch.cat([read[j].flatten() for j in range(len(read))]))


def owned_ranges(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Parameters of which this rank owns something, and the flat range of each."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def frozen_layers(
    optimizer_state: Any, models: list[Any], model_states: list[Any], *, in_ranges: bool
) -> dict[str, ShardedTensor]:
    """Zeros in the place of the optimizer state that frozen layers do not have; collective.

    A checkpoint holds the tensors of all layers as one, which must not have holes where some of the layers are frozen.

    Args:
        optimizer_state: Sharded, of this rank.
        models: Its model chunks.
        model_states: Their sharded state.
        in_ranges: The optimizer's tensors are described by this module, not by megatron-core.
    """
    own = {part.key for entry in nested_values(optimizer_state) for part in built(entry)}
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    kinds: dict[str, set[str]] = {}
    for key in set().union(*ranks):
        if key.startswith(PREFIX):
            kind, _, name = key.removeprefix(PREFIX).partition(".")
            kinds.setdefault(name, set()).add(kind)
    found = {}
    for model, model_state in zip(models, model_states, strict=True):
        sharded = by_parameter(model_state)
        for parameter in model.parameters():
            for part in built(sharded[parameter]) if not parameter.requires_grad else ():
                for kind in kinds.get(part.key, ()):
                    zeros = torch.zeros_like(part.data, dtype=torch.float32)
                    piece = replace(part, key=f"{PREFIX}{kind}.{part.key}", data=zeros, dtype=torch.float32)
                    if in_ranges:
                        shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
                        grid = {"axis_fragmentations": None, "prepend_axis_num": 0}  # as in `rectangles`
                        piece = replace(piece, data=zeros.view(shape), local_shape=shape, **grid)
                    found[f"{kind}.{part.key}.{part.global_offset}"] = piece
    return found


def built(entry: Any) -> list[ShardedTensor]:
    """The tensors that an entry of a sharded state is stored as."""
    if isinstance(entry, ShardedTensorFactory):
        entry = entry.build()
    return [part for part in nested_values({"": entry}) if isinstance(part, ShardedTensor)]


def by_parameter(model_state: dict[str, Any]) -> dict[Tensor, ShardedTensor | ShardedTensorFactory]:
    """The entries of a model's sharded state, by the parameter that each holds."""
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {entry.data: entry for entry in nested_values(sharded)}


def rectangles(
    sharded: ShardedTensor | ShardedTensorFactory, parameter: Tensor, start: int, stop: int, instance: int | None
) -> Iterator[tuple[ShardedTensor, int, int]]:
    """Rectangles of the stored tensors without data, and the range of the rank's flat shard that each holds.

    `instance`: of the distributed optimizer, whose ranks own different ranges; None: all data-parallel ranks have it.
    """
    done = start
    for part, begin in _parts(sharded, parameter):
        end = begin + math.prod(part.local_shape)
        low, high = max(start, begin), min(stop, end)
        if low < high and low != done:
            break
        for offset, size in boxes(tuple(part.local_shape), low - begin, high - begin):
            prepended = part.prepend_axis_num
            own_offset = (0,) * prepended + offset
            piece = replace(
                part,
                data=None,
                dtype=torch.float32,
                local_shape=(1,) * prepended + size,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, own_offset)),
                axis_fragmentations=None,  # no regular grid
                prepend_axis_num=0,
                # Its last component counts data-parallel copies of the weights; of this state there are none.
                replica_id=part.replica_id if instance is None else (*part.replica_id[:2], instance),
            )
            first, done = done, done + math.prod(size)
            yield piece, first - start, done - start
    if done != stop:
        raise CheckpointError(
            f"{sharded.key} is stored in parts that are not all of it; set parallel.distributed_optimizer to false"
        )


def _parts(sharded: ShardedTensor | ShardedTensorFactory, parameter: Tensor) -> Iterator[tuple[ShardedTensor, int]]:
    """The stored tensors that a parameter is made of, in their order in memory, and where in it each begins.

    The parts of a fused weight are made of a tensor without memory: where they lie in it tells where they belong.
    """
    if isinstance(sharded, ShardedTensor):
        yield sharded, 0
        return
    whole = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
    parts = list(nested_values({"": replace(sharded, data=whole).build()}))
    for part in sorted(parts, key=lambda part: part.data.storage_offset()):
        if (part.data is not whole and part.data._base is not whole) or not part.data.is_contiguous():
            raise CheckpointError(
                f"{part.key} is no block of rows of {sharded.key}; set parallel.distributed_optimizer to false"
            )
        yield part, part.data.storage_offset()


def _named(piece: ShardedTensor, name: str, data: Tensor | None) -> ShardedTensor:
    return replace(piece, key=f"{PREFIX}{name}.{piece.key}", data=data)
