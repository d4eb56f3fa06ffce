"""RMSNorm modules for machines without TransformerEngine, and for heads everywhere."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from oryx_megatron import ops, platform
from oryx_megatron.model.config import OryxTransformerConfig


class RMSNorm(torch.nn.Module):
    """RMSNorm over the residual stream; unlike torch's, it works under sequence parallelism.

    There, each tensor-parallel rank sees some tokens only, and megatron-core sums the gradients of weights that are
    marked `sequence_parallel`.
    """

    def __init__(self, config: OryxTransformerConfig, hidden_size: int, eps: float, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[…, hidden_size] → same."""
        return ops.rms_norm(x, self.weight, self.eps)


class HeadNorm(torch.nn.Module):
    """Weight of an RMSNorm over the width of a head, one vector for all heads on all tensor-parallel ranks."""

    def __init__(self, config: OryxTransformerConfig, width: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.tensor_parallel = config.tensor_model_parallel_size > 1
        self.weight = torch.nn.Parameter(torch.empty(width, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def summed_weight(self) -> Tensor:
        """The weight, such that its gradient becomes the sum over the heads of all tensor-parallel ranks.

        Under sequence parallelism megatron-core sums marked gradients once per step; otherwise it is done here.
        """
        if self.tensor_parallel and not self.weight.sequence_parallel:  # type: ignore[attr-defined]
            return copy_to_tensor_model_parallel_region(self.weight)
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[…, width] → same."""
        return ops.rms_norm(x, self.summed_weight(), self.eps)


def _device(config: OryxTransformerConfig) -> torch.device | None:
    return None if config.use_cpu_initialization else platform.device()
