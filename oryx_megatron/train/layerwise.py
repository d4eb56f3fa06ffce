"""Muon's state sharded over data-parallel ranks by whole parameters: each rank updates its own and tells the others.

A sharded AdamW owns ranges of a flat buffer, which cut matrices; Muon needs whole ones. megatron-core's
LayerWiseDistributedOptimizer deals whole parameters out, and DDP gives every rank all gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


class LayerWise(LayerWiseDistributedOptimizer):
    """megatron-core's, for a model of more than one number format, stepped as the engine steps optimizers.

    Args:
        optimizer: Of all parameters of this rank; it keeps its share of them.
        config: megatron-core's.
        groups: The ranks that share a parameter: `dp_cp`, of experts `expt_dp`.
        allocate: Makes the state of an optimizer.
        size: Of a parameter's state, in any unit: what the ranks have about equal sums of.
    """

    def __init__(
        self,
        optimizer: Any,
        config: OptimizerConfig,
        groups: ProcessGroupCollection,
        allocate: Callable[..., None],
        *,
        size: Callable[[Tensor], int],
    ) -> None:
        self._size = size
        super().__init__([optimizer], config, groups, [allocate])

    def shard_params(self, optimizers: list[Any], layouts: None = None) -> None:
        """Leave each parameter to one of the ranks that hold it.

        megatron-core's deals by number of elements, in turn: two tables may fall to one rank. And it leaves experts
        whole where a single rank has the rest, so that tensor-parallel ranks would count them twice in the norm.
        """
        (optimizer,) = optimizers
        lists = []
        for experts, group in enumerate((self.pg_collection.dp_cp, self.pg_collection.expt_dp)):
            own_groups = [own for own in optimizer.param_groups if bool(own.get("is_expert_parallel")) == bool(experts)]
            lists.append(dealt([p for own in own_groups for p in own["params"]], group.size(), self._size))
            mine = set(map(id, lists[-1][group.rank()]))
            for own in own_groups:
                own["params"] = [parameter for parameter in own["params"] if id(parameter) in mine]
        self.dp_cp_params_list, self.expt_dp_params_list = lists

    def step_with_ready_grads(self) -> bool:
        """Update own parameters and bring all up to date."""
        done = bool(super().step_with_ready_grads())
        self.allgather_params()
        return done

    @torch.no_grad()
    def allgather_params(self) -> None:
        """Every rank sends its updated parameters to the others, one message for each number format.

        megatron-core's gathers them as one format, which bf16 models with fp32 parameters are not, and in shares of
        unequal size, which gloo cannot.
        """
        _share(self.dp_cp_params_list, self.pg_collection.dp_cp)
        _share(self.expt_dp_params_list, self.pg_collection.expt_dp)


def dealt(parameters: list[Tensor], ranks: int, size: Callable[[Tensor], int]) -> list[list[Tensor]]:
    """Parameters for each of `ranks`: the largest first, each to the rank that has least so far."""
    shares: list[list[Tensor]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for parameter in sorted(parameters, key=size, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].append(parameter)
        loads[rank] += size(parameter)
    return shares


def _share(shares: list[list[Tensor]], group: torch.distributed.ProcessGroup) -> None:
    if group.size() == 1:
        return
    for rank, parameters in enumerate(shares):
        source = torch.distributed.get_global_rank(group, rank)
        for own in _by_format(parameters):
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in own])
            torch.distributed.broadcast(flat, source, group)
            if rank != group.rank():
                for parameter, values in zip(own, flat.split([p.numel() for p in own]), strict=True):
                    parameter.copy_(values.view_as(parameter))


def _by_format(parameters: list[Any]) -> list[list[Any]]:
    formats: dict[torch.dtype, list[Any]] = {}
    for parameter in parameters:
        formats.setdefault(parameter.dtype, []).append(parameter)
    return list(formats.values())
