"""The norms, linear layers and autograd functions that a layer is made of besides its mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from oryx_megatron import ops, platform
from oryx_megatron.model.config import OryxTransformerConfig


@dataclass
class OryxMixerSubmodules:
    """The linear layers of the mixer."""

    in_proj: ModuleSpec | type
    """Column-parallel, megatron-core's or TransformerEngine's."""
    decay_proj: ModuleSpec | type
    """Column-parallel and never in FP8: its width is no multiple of 16 and gates need the precision."""
    out_proj: ModuleSpec | type
    """Row-parallel."""
    query_proj: ModuleSpec | type | None = None
    """For queries that are projections of their own, so that each is computed for some rows only; its inputs are on
    every rank already. None: queries are rows of in_proj."""


class RMSNorm(torch.nn.Module):
    """RMSNorm over the residual stream, without TransformerEngine; unlike torch's, it works under sequence parallelism.

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


class ConvWeight(torch.nn.Module):
    """Taps of the depthwise convolution over key and value channels, [channels, width]."""

    def __init__(self, config: OryxTransformerConfig, channels: int, width: int) -> None:
        super().__init__()
        weight = torch.empty(channels, width, dtype=config.params_dtype, device=_device(config))
        self.weight = torch.nn.Parameter(weight)


class LocalLinear(torch.nn.Module):
    """Column shard of a linear layer whose input is whole on every tensor-parallel rank; never in FP8."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: OryxTransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = False  # as TransformerEngine's have it
        self.tp_group = tp_group
        shape = (output_size // tp_group.size(), input_size)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=_device(config)))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[…, input_size] → […, output_size / tp], and no bias."""
        return F.linear(x, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight with its place in the whole one."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


def _device(config: OryxTransformerConfig) -> torch.device | None:
    return None if config.use_cpu_initialization else platform.device()


class WithZeroGradients(torch.autograd.Function):
    """Identity on the first tensor that gives the others zero gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others))


class Rows(torch.autograd.Function):
    """x, its first rows, and its last rows; the gradients of the three meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.first, ctx.last, ctx.shape = first, last, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:first], x[last:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        whole, head, tail = grads
        first, last, length = ctx.first, ctx.last, ctx.shape[0]
        pieces = [(0, first, head), (last, length, tail)]
        given = [(start, stop, grad) for start, stop, grad in pieces if grad is not None and stop > start]
        if whole is None and len(given) == 1 and given[0][:2] == (0, length):
            return given[0][2], None, None
        like = next((grad for grad in grads if grad is not None), None)
        if like is None:
            return None, None, None
        overlap = len(given) == 2 and given[0][1] > given[1][0]
        covered = (len(given) == 2 and not overlap) or any(piece[:2] == (0, length) for piece in given)
        if whole is None or overlap or not covered:
            total = like.new_zeros(ctx.shape) if whole is None else whole.clone()
            for start, stop, grad in given:
                total[start:stop] += grad
        else:
            total = torch.empty_like(whole)
            for start, stop, grad in given:
                torch.add(whole[start:stop], grad, out=total[start:stop])
        return total, None, None
