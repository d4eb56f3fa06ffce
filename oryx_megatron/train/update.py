"""AdamW over megatron-core's sharded bf16 parameters in one or two passes over memory.

megatron-core divides gradients by the number of tokens, clips them, updates fp32 masters and casts each parameter: four
passes, two reads by the host and several launches a parameter. Here the loss is divided by the number of tokens that a
step can have, before the backward pass; what is left, where labels do not count or gradients are clipped, is one
factor. TransformerEngine's multi_tensor_adam writes masters and bf16 parameters together. The state stays
megatron-core's own, so checkpoints are the same.

(Its multi_tensor_adam_capturable_master would take the factor too, but reads gradients in the parameters' format.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from oryx_megatron import compat, platform
from oryx_megatron.config.schema import RunConfig

CALL = 1024
"""Tensors of one call, as TransformerEngine's own optimizer makes them."""


@dataclass(frozen=True)
class _Group:
    """One parameter group of an optimizer in one step."""

    settings: dict[str, Any]
    """megatron-core's: lr, betas, step …"""
    gradients: list[Tensor]
    calls: list[list[list[Tensor]]]
    """Of each call of the kernel: gradients, bf16 weights, both moments, masters; the last not for fp32 weights."""


class FusedUpdate:
    """Norm and update of megatron-core's distributed optimizers.

    Gradients are divided by the tokens of `begin` alone: see `connect`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._parts: list[DistributedOptimizer] = _parts(optimizer)
        self._clip = float(optimizer.config.clip_grad)
        self._tokens = 1
        self._groups: list[list[_Group]] = [[] for _ in self._parts]
        """Of each part, of the gradients whose norm was last taken: found while the device computes them."""
        # The kernels' flag of an overflow, which concerns fp16.
        self._unused = torch.zeros(1, dtype=torch.int32, device=platform.device())

    @staticmethod
    def serves(run: RunConfig, optimizer: Any) -> bool:
        """Whether this run's optimizer can be updated so; the others go through megatron-core's steps."""
        return (
            run.optimizer.name == "adamw"
            and run.precision.dtype == "bf16"
            and run.parallel.distributed_optimizer
            and not run.optimizer.cpu_offload
            and not run.precision.fp8_params
            and platform.transformer_engine_missing() is None
            and all(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))
        )

    def connect(self, config: Any) -> None:
        """Let megatron-core's schedules divide the loss as `norm` and `apply` expect, and nothing after it."""
        config.grad_scale_func = lambda loss: loss / self._tokens
        config.finalize_model_grads_func = _finalize

    def begin(self, tokens: int) -> None:
        """A step begins that has so many tokens over all ranks, of which some may not count."""
        self._tokens = tokens

    @torch.no_grad()
    def norm(self, tokens: Tensor) -> Tensor:
        """L2 norm over all ranks of the gradients of the mean loss, [] fp32; makes gradients ready for `apply`.

        Args:
            tokens: [] that count in this step.
        """
        from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm

        total = torch.zeros((), device=platform.device())
        for part, groups in zip(self._parts, self._groups, strict=True):
            part.prepare_grads()
            gradients = compat.megatron.gradients_for_norm(part)
            if gradients:
                own, _ = multi_tensor_applier(multi_tensor_l2norm, self._unused, [gradients], False)
                square = own.square().view(())
            else:
                square = torch.zeros_like(total)
            torch.distributed.all_reduce(square, group=part.get_grad_stats_parallel_group())
            total = total + square
            groups[:] = [] if part.is_stub_optimizer else _groups(part)
        return total.sqrt() * (self._tokens / tokens.float().clamp(min=1))

    @torch.no_grad()
    def apply(self, norm: float, tokens: float) -> None:
        """Make gradients those of the mean over `tokens`, clip them, whose norm this is, and apply them.

        The parameters are gathered then.
        """
        factor = self._tokens / max(tokens, 1.0)
        if self._clip > 0:
            factor *= min(1.0, self._clip / (norm + 1e-6))
        for part, groups in zip(self._parts, self._groups, strict=True):
            for group in groups:
                self._apply(part.optimizer, group, factor)
            if not part.ddp_config.overlap_param_gather:
                for chunk in part.model_chunks:
                    chunk.start_param_sync()

    def _apply(self, inner: Any, group: _Group, factor: float) -> None:
        from transformer_engine.pytorch.optimizers import multi_tensor_adam, multi_tensor_applier

        settings = group.settings
        beta1, beta2 = settings["betas"]
        settings["step"] = settings.get("step", 0) + 1
        if group.gradients and factor != 1:
            torch._foreach_mul_(group.gradients, factor)
        for call in group.calls:
            multi_tensor_applier(
                multi_tensor_adam,
                self._unused,
                call,
                settings["lr"],
                beta1,
                beta2,
                settings["eps"],
                settings["step"],
                inner.adam_w_mode,
                1 if settings["bias_correction"] else 0,
                settings["weight_decay"],
            )


def _finalize(model: list[Any], num_tokens: Tensor | None = None, **keywords: Any) -> None:
    """megatron-core's finalize_model_grads, which does not divide by the number of tokens."""
    finalize_model_grads(model, None, **keywords)


def _groups(part: DistributedOptimizer) -> list[_Group]:
    """What an update of each parameter group reads and writes, once gradients are in place."""
    inner, found = part.optimizer, []
    casts = zip(part.shard_fp32_from_float16_groups, part.shard_float16_groups)
    narrow = {id(master): weight for masters, weights in casts for master, weight in zip(masters, weights)}
    for settings in inner.param_groups:
        masters: list[list[Tensor]] = [[], [], [], [], []]
        plain: list[list[Tensor]] = [[], [], [], []]
        for parameter in settings["params"]:
            state = inner.state[parameter]
            if "exp_avg" not in state:
                inner.initialize_state(parameter, False)
            moments = state["exp_avg"], state["exp_avg_sq"]
            weight = narrow.get(id(parameter))
            if weight is None:
                row: tuple[Tensor, ...] = (parameter.grad, parameter.data, *moments)
            else:
                row = (parameter.grad, weight.data, *moments, parameter.data)
            for column, tensor in zip(plain if weight is None else masters, row):
                column.append(tensor)
        calls = [
            [column[start : start + CALL] for column in lists]
            for lists in (masters, plain)
            for start in range(0, len(lists[0]), CALL)
        ]
        found.append(_Group(settings, masters[0] + plain[0], calls))
    return found


def _parts(optimizer: Any) -> list[Any]:
    return compat.megatron.singles(optimizer)
