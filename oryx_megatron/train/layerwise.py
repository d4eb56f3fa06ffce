"""Muon's state sharded over data-parallel ranks by whole parameters: each rank updates its own and tells the others.

A sharded AdamW owns ranges of a flat buffer, which cut matrices; Muon needs whole ones. megatron-core's
LayerWiseDistributedOptimizer deals whole parameters out, by size, and DDP gives every rank all gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer


class LayerWise(LayerWiseDistributedOptimizer):
    """megatron-core's, for a model of more than one number format, stepped as the engine steps optimizers."""

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
        if self.dp_cp_params_list is None:
            return
        group = self.pg_collection.dp_cp
        for rank, parameters in enumerate(self.dp_cp_params_list):
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
