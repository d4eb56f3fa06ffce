"""megatron-core's MoE layer as it is configured here, against experts written out in fp64: outputs, losses, gradients.

n tokens, d hidden size, E experts, k of which each token takes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from oryx_megatron.config.schema import ModelConfig, MoEConfig, ParallelConfig, PrecisionConfig
from oryx_megatron.model import build_model
from oryx_megatron.model.experts import expert_weights
from oryx_megatron.train.routing import routing_of

CASES: dict[str, dict[str, Any]] = {
    "top 2": {},
    "top 1": {"top_k": 1},
    "top 5 of 5": {"top_k": 5},
    "shared": {"shared_ffn_hidden_size": 9},
    "z-loss": {"z_loss": 0.1},
    "balanced over sequences": {"aux_loss_over": "sequence"},
    "no loss": {"aux_loss": 0.0},
    "sigmoid": {"score": "sigmoid", "top_k": 3},
    "sigmoid top 1": {"score": "sigmoid", "top_k": 1},
    "sigmoid with bias": {"score": "sigmoid", "bias_update_rate": 0.1, "aux_loss": 0.0},
    "capacity": {"capacity_factor": 0.6},
    "everything": {"score": "sigmoid", "bias_update_rate": 0.1, "z_loss": 0.1, "capacity_factor": 0.8, "top_k": 3},
}
pytestmark = pytest.mark.usefixtures("one_rank")
LENGTH, ROWS = 13, 3


def model_of(**moe: Any) -> ModelConfig:
    fields: dict[str, Any] = {"experts": 5, "top_k": 2, "ffn_hidden_size": 11, "aux_loss": 0.3, **moe}
    sizes = {"num_layers": 1, "hidden_size": 14, "ffn_hidden_size": 20, "num_heads": 2, "vocab_size": 17}
    return ModelConfig(
        name="t", mixer="gdn", **sizes, qk_head_dim=4, v_head_dim=6, init_std=0.5, moe=MoEConfig(**fields)
    )


def layer_of(model: ModelConfig, dtype: str = "fp32") -> MoELayer:
    (chunk,) = build_model(model, ParallelConfig(), PrecisionConfig(dtype=dtype), seed=3)  # type: ignore[arg-type]
    layer = chunk.decoder.layers[0].mlp
    assert isinstance(layer, MoELayer)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.linspace(-0.4, 0.3, layer.router.num_experts))
    return layer


def swiglu(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, up = (x @ fc1.T).chunk(2, -1)
    return (F.silu(gate) * up) @ fc2.T


def written_out(x: Tensor, weights: dict[str, Tensor], bias: Tensor | None, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """[s, b, d] → the layer's output, and its losses as they enter the sum over tokens (each times s b)."""
    tokens = x.flatten(0, 1)
    n, experts, k = tokens.shape[0], moe.experts, moe.top_k
    logits = tokens @ weights["router"].T
    scores = logits.softmax(-1) if moe.score == "softmax" else logits.sigmoid()
    ranked = scores if bias is None else scores + bias
    chosen = [set(row.argsort(descending=True)[:k].tolist()) for row in ranked]
    routed = torch.tensor([[e in row for e in range(experts)] for row in chosen])
    weight = torch.where(routed, scores, 0.0)
    if k > 1:
        weight = weight / weight.sum(-1, keepdim=True)
    even = scores / scores.sum(-1, keepdim=True)
    balanced = torch.tensor(
        [[e in set(row.argsort(descending=True)[:k].tolist()) for e in range(experts)] for row in even]
    )
    losses = torch.zeros((), dtype=x.dtype)
    if moe.aux_loss:  # Switch Transformer, eq. 4 to 6: E Σ f P
        groups = [torch.arange(n)]
        if moe.aux_loss_over == "sequence":
            groups = [torch.arange(n).view(x.shape[:2])[:, i] for i in range(x.shape[1])]
        for group in groups:
            f, p = balanced[group].double().mean(0) / k, even[group].mean(0)
            losses = losses + n * moe.aux_loss * experts * (f * p).sum() / len(groups)
    losses = losses + n * moe.z_loss * logits.logsumexp(-1).square().mean()
    if moe.capacity_factor is not None:
        capacity = math.ceil(n * k / experts * moe.capacity_factor)
        kept = [set(column.argsort(descending=True)[:capacity].tolist()) for column in weight.T]
        weight = torch.where(torch.tensor([[t in row for row in kept] for t in range(n)]), weight, 0.0)
    y = torch.zeros_like(tokens)
    for e in range(experts):
        y = y + weight[:, e, None] * swiglu(tokens, weights[f"fc1 {e}"], weights[f"fc2 {e}"])
    if moe.shared_ffn_hidden_size:
        y = y + swiglu(tokens, weights["shared fc1"], weights["shared fc2"])
    return y.view(x.shape), losses


def parameters_of(layer: MoELayer) -> dict[str, torch.nn.Parameter]:
    found = {"router": layer.router.weight}
    for e, fc1, fc2 in expert_weights(layer):
        found |= {f"fc1 {e}": fc1, f"fc2 {e}": fc2}
    if layer.shared_experts is not None:
        found |= {f"shared {name}": getattr(layer.shared_experts, f"linear_{name}").weight for name in ("fc1", "fc2")}
    return found


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_layer_and_gradients(changes: dict[str, Any]) -> None:
    model = model_of(**changes)
    moe = model.moe
    assert moe is not None
    layer = layer_of(model)
    torch.manual_seed(5)
    x, weight = (torch.randn(LENGTH, ROWS, model.hidden_size, dtype=torch.float64) for _ in range(2))
    inner = x.float().requires_grad_()
    output, bias = layer(inner)
    assert bias is None
    (output * weight.float()).sum().backward()

    own = parameters_of(layer)
    copies = {name: p.detach().double().requires_grad_() for name, p in own.items()}
    outer = x.clone().requires_grad_()
    expert_bias = layer.router.expert_bias
    expected, losses = written_out(outer, copies, None if expert_bias is None else expert_bias.double(), moe)
    ((expected * weight).sum() + losses).backward()

    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(inner.grad.double(), outer.grad, rtol=5e-5, atol=5e-5)  # type: ignore[union-attr]
    for name, parameter in own.items():
        wanted = copies[name].grad
        assert wanted is not None
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad.double(), wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bf16_is_near() -> None:
    model = model_of(shared_ffn_hidden_size=8)
    layer, exact = layer_of(model, "bf16"), layer_of(model)
    x = torch.randn(LENGTH, ROWS, model.hidden_size).bfloat16()
    got, wanted = layer(x)[0].float(), exact(x.float())[0]
    # A token near the edge between two experts may go to another one; most do not.
    off = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert off.median() < 0.02


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_token_that_is_not_a_number(score: str) -> None:
    """It goes to as many experts as any other, so that the step ends, and its loss says that it is one to skip."""
    model = model_of(score=score, top_k=3)
    x = torch.randn(LENGTH, ROWS, model.hidden_size)
    x[4, 1] = math.nan
    output, _ = layer_of(model)(x)
    assert output[4, 1].isnan().all()
    assert output.isfinite().all(-1).sum() == LENGTH * ROWS - 1


def test_figures_of_the_router() -> None:
    """What ExpertRouter adds up, and what the metrics make of it, against the same counted by hand."""
    model = model_of(z_loss=0.1, capacity_factor=0.6)
    moe, layer = model.moe, layer_of(model)
    assert moe is not None
    x = torch.randn(LENGTH, ROWS, model.hidden_size)
    with torch.no_grad():
        layer(x)  # evaluation: not counted
    assert layer.router.take_sums() is None
    for _ in range(2):
        layer(x)
    sums = layer.router.take_sums()
    assert sums is not None
    assert layer.router.take_sums() is None
    logits = x.flatten(0, 1) @ layer.router.weight.detach().T
    scores = logits.softmax(-1)
    tokens, capacity = LENGTH * ROWS, math.ceil(LENGTH * ROWS * 2 / 5 * 0.6)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
    taken = chosen.sum(0).clamp(max=capacity)
    figures = routing_of([sums.tolist()], model, microbatches=2)
    assert figures is not None
    even = tokens * 2 / 5
    assert figures.load[0] == pytest.approx((taken / even).tolist())
    assert (figures.expert_load_max, figures.expert_load_min) == pytest.approx(
        (taken.max().item() / even, taken.min().item() / even)
    )
    assert figures.dropped_share == pytest.approx(1 - taken.sum().item() / (tokens * 2))
    assert 0 < figures.dropped_share < 0.6
    assert figures.router_entropy == pytest.approx(-(scores * scores.log()).sum(-1).mean().item(), rel=1e-4)
    assert figures.router_z_loss == pytest.approx(logits.logsumexp(-1).square().mean().item(), rel=1e-4)
    balance = 5 * (chosen.mean(0) / 2 * scores.mean(0)).sum().item()
    assert figures.load_balancing_loss == pytest.approx(balance, rel=1e-4)
