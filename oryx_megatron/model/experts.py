"""Mixture of experts: megatron-core's MoE layer in the place of the SwiGLU, and what its routers do.

E experts, of which each token takes k; n tokens of this rank in a microbatch, in whatever order they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from oryx_megatron import compat, platform
from oryx_megatron.config.schema import ModelConfig, ParallelConfig

SUMS = ("tokens", "dropped", "entropy", "z", "balance")
"""What a router adds up beside the tokens of each expert; see ExpertRouter.sums."""


def moe_fields(model: ModelConfig, parallel: ParallelConfig, *, grouped: bool) -> dict[str, Any]:
    """megatron-core's fields of this model's experts; none for a dense model.

    Args:
        grouped: Multiply all experts of a rank in one call of TransformerEngine, and permute the tokens by its
            kernels. Unfused, megatron-core's permutation is a sixth of a step, and adds in no fixed order.
    """
    moe = model.moe
    if moe is None:
        return {}
    share = compat.megatron.router_loss_factor(parallel.tensor * parallel.context)
    layers = [int(moe.in_layer(i)) for i in range(model.num_layers)]
    return {
        "num_moe_experts": moe.experts,
        "moe_layer_freq": 1 if all(layers) else layers,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score,
        "moe_router_pre_softmax": moe.score == "softmax" and moe.top_k == 1,  # over one alone it would be constant
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": _balancing(moe.aux_loss, moe.aux_loss_over),
        "moe_aux_loss_coeff": moe.aux_loss,
        "moe_z_loss_coeff": moe.z_loss * share or None,
        "moe_router_enable_expert_bias": moe.bias_update_rate > 0,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_token_drop_policy": "probs",  # not by position: fused mixers sort the tokens by mode
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped,
        "moe_permute_fusion": grouped,
        # Not moe_router_fusion: TransformerEngine's top k gives a token whose logits are NaN one expert instead of k.
        # The run would end on a wrong number of rows, where the step is one to skip.
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
    }


def _balancing(coefficient: float, over: str) -> str:
    if not coefficient:
        return "none"
    return "seq_aux_loss" if over == "sequence" else "aux_loss"


def moe_spec(fc1: type, fc2: type, activation: type | None, *, grouped: bool) -> ModuleSpec:
    """A MoE layer whose experts are single MLPs of these linears, or with `grouped` TransformerEngine's."""
    mlp = MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2, activation_func=activation)
    experts = ModuleSpec(module=SequentialMLP, submodules=mlp)
    if grouped:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TERowParallelGroupedLinear,
        )
        from megatron.core.transformer.moe.experts import TEGroupedMLP

        linears = MLPSubmodules(
            linear_fc1=TEColumnParallelGroupedLinear,
            linear_fc2=TERowParallelGroupedLinear,
            activation_func=activation,
        )
        experts = ModuleSpec(module=TEGroupedMLP, submodules=linears)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=experts,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=mlp),
            router=ExpertRouter,
        ),
    )


class ExpertRouter(TopKRouter):
    """megatron-core's router, which adds up what it does in training for `take_sums`."""

    def __init__(self, config: TransformerConfig, *args: Any, **keywords: Any) -> None:
        super().__init__(config, *args, **keywords)
        # megatron-core makes its weight in host memory and moves it in the first forward pass. An optimizer without
        # flat buffers of parameters (Muon, or AdamW that is not distributed) has refused it by then.
        if not config.use_cpu_initialization:
            self.to(platform.device())
        self.sums: Tensor | None = None
        """[E + 5] fp64 over the microbatches of this step: tokens that each expert took; tokens; those of their top k
        that no expert took; entropy in nats of the scores over all experts; squared logsumexp of the logits; and this
        rank's part of the load-balancing loss, without its coefficient, once for each microbatch."""

    def routing(self, logits: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """[s, b, E] → weights [n, E], 0 where a token does not go, and where it goes, bool [n, E]."""
        probs, routes = super().routing(logits, *args, **keywords)
        if self.training and torch.is_grad_enabled():
            self._add(logits.detach().flatten(0, -2), routes)
        return probs, routes

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **keywords: Any
    ) -> Tensor:
        """As megatron-core's, which gives it to the backward pass; noted in the last of `sums`.

        It enters the sum over tokens once for each token of the microbatch: 0.16.1 would count those of one sequence
        or of one of the ranks that share it.
        """
        self._own_sums(activation.device)[-1] += aux_loss.detach().double() / aux_loss_coeff
        factor = compat.megatron.router_loss_factor(self.tp_cp_group.size())
        keywords["valid_token_count"] = activation.shape[0] * factor
        return super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff, aux_loss, *args, **keywords)

    def take_sums(self) -> Tensor | None:
        """The sums of this step; the next ones begin at zero. None where the router did not run."""
        taken, self.sums = self.sums, None
        return taken

    def _own_sums(self, device: torch.device) -> Tensor:
        if self.sums is None:
            self.sums = torch.zeros(self.num_experts + len(SUMS), dtype=torch.float64, device=device)
        return self.sums

    @torch.no_grad()
    def _add(self, logits: Tensor, routes: Tensor) -> None:
        logits = logits.float()
        taken, tokens = routes.sum(0), logits.shape[0]
        scores = logits.softmax(-1) if self.score_function == "softmax" else logits.sigmoid()
        shares = scores / scores.sum(-1, keepdim=True)
        sums = self._own_sums(logits.device)
        sums[: self.num_experts] += taken
        sums[self.num_experts] += tokens
        sums[self.num_experts + 1] += tokens * self.topk - taken.sum()
        sums[self.num_experts + 2] += torch.special.entr(shares).sum()
        sums[self.num_experts + 3] += logits.logsumexp(-1).square().sum()


def routers(chunks: list[Any]) -> Iterator[ExpertRouter]:
    """The routers of these model chunks, in order of their layers."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, ExpertRouter))


def expert_weights(layer: MoELayer) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's experts of a layer: number among all of them, weights of fc1 and fc2."""
    for local, number in enumerate(layer.local_expert_indices):
        if isinstance(layer.experts, SequentialMLP):
            expert = layer.experts.local_experts[local]
            yield number, expert.linear_fc1.weight, expert.linear_fc2.weight
        else:  # TransformerEngine's, which keeps one parameter for each
            fc1, fc2 = layer.experts.linear_fc1, layer.experts.linear_fc2
            yield number, getattr(fc1, f"weight{local}"), getattr(fc2, f"weight{local}")
