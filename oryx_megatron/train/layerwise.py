"""Muon's state sharded over data-parallel ranks by whole parameters: each rank updates its own and tells the others.

A sharded AdamW owns ranges of a flat buffer, which cut matrices; Muon needs whole ones. megatron-core's
LayerWiseDistributedOptimizer deals whole parameters out, by size, and DDP gives every rank all gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from torch import Tensor


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

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's parameters, each with what the inner optimizer updates: itself, or its fp32 master."""
        (single,) = self.chained_optimizers
        pairs = []
        for weights, masters, plain in zip(
            *(getattr(single, name, None) or [] for name in ("float16_groups", "fp32_from_float16_groups")),
            getattr(single, "fp32_from_fp32_groups", None) or [],
            strict=True,
        ):
            pairs += [*zip(weights, masters, strict=True), *((parameter, parameter) for parameter in plain)]
        if not hasattr(single, "float16_groups"):
            pairs = [(parameter, parameter) for group in single.param_groups for parameter in group["params"]]
        return pairs


def _by_format(parameters: list[Any]) -> list[list[Any]]:
    formats: dict[torch.dtype, list[Any]] = {}
    for parameter in parameters:
        formats.setdefault(parameter.dtype, []).append(parameter)
    return list(formats.values())
