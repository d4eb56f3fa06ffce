"""Multi-token prediction against its equations written out in fp64: losses and gradients at odd sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_model import (
    VARIANTS,
    build,
    config,
    forward,
    layer_plan,
    norm,
    random_plan,
    random_tokens,
    written_out_layer,
    written_out_states,
)
from torch import Tensor

from oryx_megatron import arch, planner, platform
from oryx_megatron.config.schema import ModelConfig, MTPConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.model import SequenceInfo, build_meta
from oryx_megatron.train.step import Totals, sum_loss

pytestmark = pytest.mark.usefixtures("one_rank")
LENGTH, WEIGHT = 37, 0.3
BOUNDS = [0, 1, 3, 6, 23, 37]
"""Documents as short as what a head looks ahead."""
MODELS = {
    "two heads": {"mtp": MTPConfig(layers=2, loss_weight=WEIGHT)},
    "untied": {"mtp": MTPConfig(loss_weight=WEIGHT), "tie_embeddings": False},
    "hybrid": {"mtp": MTPConfig(loss_weight=WEIGHT), "pattern": ("attention", "recurrent")},
    "mixed": {"mtp": MTPConfig(layers=3, loss_weight=WEIGHT), "pattern": ("attention", "both"), "shared_query": True},
    "attention baseline": {"mtp": MTPConfig(loss_weight=WEIGHT), "modes": "attention"},
}


def expected(
    w: dict[str, Tensor], model: ModelConfig, tokens: Tensor, labels: Tensor, mask: Tensor, attends: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Summed loss and counted labels of the model and of its heads, over one text; `attends` bool [s] or by layer."""
    last = attends.reshape(-1, attends.shape[-1])[-1]
    table = w["embedding.word_embeddings.weight"]
    output = table if model.tie_embeddings else w["output_layer.weight"]

    def loss(states: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        logits, own, counted = states @ output.T, labels[:, ahead:], mask[:, ahead:]
        losses = logits.exp().sum(-1).log() - logits.gather(-1, own.unsqueeze(-1)).squeeze(-1)
        return (losses * counted).sum(), counted.sum()

    states = written_out_states(w, model, tokens, attends)
    found = [loss(states, 0)]
    assert model.mtp is not None
    for k in range(1, model.mtp.layers + 1):
        at = f"mtp.layers.{k - 1}."
        given, ahead = norm(states, w[at + "hnorm.weight"]), norm(table[tokens], w[at + "enorm.weight"])
        pairs = torch.cat((ahead[:, k:], given[:, : given.shape[1] - 1]), -1)  # one token less for each head
        x = pairs @ w[at + "eh_proj.weight"].T
        if x.shape[1]:
            x = written_out_layer(w, f"{at}transformer_layer.", model, model.layer_modes[-1], x, last[: x.shape[1]])
        states = norm(x, w[at + "final_layernorm.weight"])
        found.append(loss(states, k))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", ["joined", "isolated", "by layer"])
def test_losses_and_gradients(variant: str, changes: dict, kind: str) -> None:
    """The loss is fp32 inside megatron-core; the reference starts from logits in fp64."""
    model = config(variant, **changes)
    isolated, draw = kind != "joined", layer_plan if kind == "by layer" else random_plan
    chunk, plan = build(model), draw(model, LENGTH)
    attends = torch.from_numpy(plan.is_attention())
    tokens, labels = random_tokens(LENGTH), random_tokens(LENGTH, seed=8)
    mask = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.7).float()
    documents = None
    if isolated:
        tokens, labels, mask = tokens[:1], labels[:1], mask[:1]
        documents = torch.tensor(BOUNDS, dtype=torch.int32)
    bounds = BOUNDS if isolated else [0, LENGTH]
    weights = {
        name.replace("mtp_model_layer", "transformer_layer"): parameter.detach().clone().requires_grad_()
        for name, parameter in chunk.named_parameters()
    }
    sums = [
        expected(weights, model, tokens[:, a:b], labels[:, a:b], mask[:, a:b], attends[..., a:b])
        for a, b in itertools.pairwise(bounds)
    ]
    losses, counts = zip(*(map(sum, zip(*head)) for head in zip(*sums, strict=True)), strict=True)
    total = losses[0] + WEIGHT / model.mtp_layers * sum(losses[1:])
    total.backward()

    info = SequenceInfo.build(plan, device=platform.device(), documents=documents)
    info = info.with_futures(tokens, labels, mask, model.mtp_layers, slice(LENGTH))
    output = chunk(tokens, None, None, labels=labels, packed_seq_params=info)
    found, counted, report = sum_loss(mask, 0.0, output, futures=info.futures, heads_weight=WEIGHT / model.mtp_layers)
    torch.testing.assert_close(found.double(), total, rtol=1e-5, atol=0)
    assert int(counted) == int(counts[0])
    totals = Totals(report["totals"].double())
    assert totals.loss == pytest.approx(float(losses[0].detach()), rel=1e-5)
    assert totals.mean_z_loss == 0
    means = [float(loss.detach() / count) for loss, count in zip(losses[1:], counts[1:], strict=True)]
    assert totals.mtp_losses == pytest.approx(means, rel=1e-5)
    found.backward()
    for name, parameter in chunk.named_parameters():
        want = weights[name.replace("mtp_model_layer", "transformer_layer")].grad
        want = torch.zeros_like(parameter) if want is None else want
        assert parameter.grad is not None, name
        scale = max(float(want.abs().max()), 1e-3)
        torch.testing.assert_close(
            parameter.grad, want, rtol=2e-5, atol=1e-6 * scale, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_outside_of_training_heads_are_not_there(variant: str) -> None:
    """Logits and evaluation losses are bit for bit those of the model without heads, and its weights are, too."""
    tokens = random_tokens(LENGTH)
    plan = random_plan(config(variant), LENGTH)
    with_heads = build(config(variant, mtp=MTPConfig(layers=2))).eval()
    plain = build(config(variant)).eval()
    own = dict(plain.named_parameters())
    for name, parameter in with_heads.named_parameters():
        if not name.startswith("mtp."):
            own[name].data.copy_(parameter)  # `build` moves norms by one stream of draws
    info = SequenceInfo.build(plan, device=platform.device())
    with torch.no_grad():
        assert torch.equal(forward(with_heads, tokens, plan), forward(plain, tokens, plan))
        losses = [chunk(tokens, None, None, labels=tokens, packed_seq_params=info) for chunk in (with_heads, plain)]
    assert torch.equal(*losses)
    assert losses[0].shape == tokens.shape


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_counts_on_paper_are_those_of_a_built_model(changes: dict) -> None:
    """The arithmetic of `arch` and of the planner = a model built without storage."""
    model = config("gdn", **changes)
    total = sum(parameter.numel() for parameter in build_meta(model).parameters())
    assert arch.parameter_counts(model).total == total
    table = model.vocab_size * model.hidden_size
    for stages in (1, 2):
        if model.num_layers % stages == 0:
            layout = Layout(tp=1, pp=stages, vpp=1, cp=1, dp=1, microbatches=2, stage_layers=(2 // stages,) * stages)
            held = sum(planner.parameters_per_gpu(model, layout, stage) for stage in range(stages))
            assert held == pytest.approx(total + (stages > 1) * table, abs=1 + model.num_layers * model.hidden_size)


@pytest.mark.parametrize("recompute", ["mixer", "full"])
def test_recomputing_changes_nothing(recompute: str) -> None:
    model = config("gdn", mtp=MTPConfig(layers=2))
    tokens, plan = random_tokens(24), random_plan(model, 24)
    results = []
    for way in ("none", recompute):
        chunk = build(model, recompute=way).train()
        info = SequenceInfo.build(plan, device=platform.device())
        info = info.with_futures(tokens, tokens, torch.ones(tokens.shape), 2, slice(24))
        chunk(tokens, None, None, labels=tokens, packed_seq_params=info).sum().backward()
        results.append({name: parameter.grad.clone() for name, parameter in chunk.named_parameters()})
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-9)
