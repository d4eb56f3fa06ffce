"""Replayed graphs compute what launched kernels do: losses bit by bit, over plans that change every step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_training import WIDE

from oryx_megatron import platform
from oryx_megatron.config.schema import (
    KernelsConfig,
    ModesConfig,
    MTPConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from oryx_megatron.modes import parse_plan
from oryx_megatron.ops import backends
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import session, tiny_run
from oryx_megatron.train.batches import training_batches
from oryx_megatron.train.engine import why_launched
from oryx_megatron.train.step import Microbatch, forward_backward

STEPS = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "tensorwise": {"precision": PrecisionConfig(fp8="tensorwise")},
    "delayed": {"precision": PrecisionConfig(fp8="delayed")},
    "delayed, attention too": {"precision": PrecisionConfig(fp8="delayed", fp8_attention=True)},
    "blockwise": {"precision": PrecisionConfig(fp8="blockwise")},
    "recompute swiglu": {"parallel": ParallelConfig(recompute="swiglu")},
    "recompute mixer": {"parallel": ParallelConfig(recompute="mixer")},
    "recompute full": {"parallel": ParallelConfig(recompute="full")},
    "isolated": {"data__documents": "isolated"},
    "multi-token prediction": {"model__mtp": MTPConfig(layers=2)},
}


def run_of(mixer: str, setting: dict[str, Any], graphs: str, **changes: Any) -> RunConfig:
    run = tiny_run(mixer, **(WIDE | {"precision": PrecisionConfig()} | setting | changes))
    return dataclasses.replace(run, kernels=KernelsConfig(graphs=graphs))


def curve(run: RunConfig, *, evaluate: bool = False) -> list[tuple[float, float]]:
    """Losses and gradient norms; `evaluate`: with an evaluation of other plans between the steps."""
    platform.install()
    backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
    found = []
    with session(run) as opened:
        for step in range(STEPS):
            found.append(opened.step())
            if evaluate and step % 3 == 2:
                found.append((evaluated(run, opened.chunks, step), 0.0))
        graphs = opened.engine.graphs
        assert (graphs is None) == (why_launched(run) is not None)
        if graphs is not None:
            assert graphs.failed is None
            assert graphs.captured > (run.modes.fixed is None)  # a fixed plan has one shape
    return found


def evaluated(run: RunConfig, chunks: list[Any], step: int) -> float:
    samples = torch.randint(
        1, run.model.vocab_size, (2, 4, run.data.sequence_length), generator=torch.manual_seed(step)
    )
    plan = parse_plan("ratio:0.5", run.data.sequence_length, chunk=run.modes.chunk)
    batches = [Microbatch(x, x.roll(-1, 1), torch.ones(x.shape), plan) for x in samples]
    for chunk in chunks:
        chunk.eval()
    loss = forward_backward(chunks, batches, forward_only=True).mean_loss
    for chunk in chunks:
        chunk.train()
    return loss


def skip_without(setting: dict[str, Any]) -> None:
    if "precision" in setting and (reason := platform.transformer_engine_missing()):
        pytest.skip(reason)


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_of_changing_plans(name, mixer):
    """At a learning rate of nearly 0 every loss is one forward pass: equal bits whatever attention's gradients do."""
    skip_without(SETTINGS[name])
    launched, replayed = (
        curve(run_of(mixer, SETTINGS[name], graphs, optimizer__lr=1e-30), evaluate=True) for graphs in ("off", "auto")
    )
    assert [loss for loss, _ in replayed] == [loss for loss, _ in launched]
    apart = 0.1 if "precision" in SETTINGS[name] else 0.01
    assert [norm for _, norm in replayed] == pytest.approx([norm for _, norm in launched], rel=apart)


@pytest.mark.parametrize("graphs", ["off", "auto"])
@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_swiglu_again_is_equal_bit_by_bit(mixer, graphs):
    kept, again = (
        curve(run_of(mixer, SETTINGS[name], graphs, modes=ModesConfig(chunk=64, fixed="recurrent")))
        for name in ("bf16", "recompute swiglu")
    )
    assert again == kept
    assert kept[0] != kept[-1]


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
@pytest.mark.parametrize("name", ["bf16", "recompute full", "isolated"])
def test_training_without_atomics(name, mixer):
    """The recurrence adds in a fixed order: losses and gradient norms of a whole run are equal bit by bit."""
    runs = (
        run_of(mixer, SETTINGS[name], graphs, modes=ModesConfig(chunk=64, fixed="recurrent"))
        for graphs in ("off", "auto")
    )
    launched, replayed = (curve(run) for run in runs)
    assert replayed == launched
    assert launched[0] != launched[-1]


@pytest.mark.parametrize("name", ["bf16", "tensorwise"])
def test_training_on_mixed_plans(name):
    skip_without(SETTINGS[name])
    launched, replayed = (curve(run_of("gdn", SETTINGS[name], graphs), evaluate=True) for graphs in ("off", "auto"))
    assert [x for x, _ in replayed] == pytest.approx([x for x, _ in launched], rel=5e-3)
    assert launched[-2][0] < 0.97 * launched[0][0]


TWO = {
    "tensor": ParallelConfig(tensor=2),
    "pipeline": ParallelConfig(pipeline=2),
    "virtual stages": ParallelConfig(pipeline=2, virtual_pipeline=2, overlap=True),
    "context": ParallelConfig(context=2),
    "data": ParallelConfig(overlap=True),
    "data, unsharded": ParallelConfig(overlap=True, distributed_optimizer=False),
    "tensor, recompute": ParallelConfig(tensor=2, recompute="full"),
}


def both_curves(name: str, mixer: str) -> list[list[tuple[float, float]]]:
    few = {"train__micro_batch_size": 1, "parallel": TWO[name]}
    return [curve(run_of(mixer, few, graphs, optimizer__lr=lr)) for graphs in ("off", "auto") for lr in (1e-30, 1e-3)]


@pytest.mark.parametrize("name", TWO)
def test_two_gpus(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    for launched, trained, replayed, trained_too in run_distributed(both_curves, 2, name, "gdn"):
        assert [loss for loss, _ in replayed] == [loss for loss, _ in launched]
        assert [norm for _, norm in replayed] == pytest.approx([norm for _, norm in launched], rel=0.01)
        assert [loss for loss, _ in trained_too] == pytest.approx([loss for loss, _ in trained], rel=5e-3)


def test_a_capture_that_fails_costs_speed_alone(caplog):
    """One line says why, and the run launches its kernels."""
    run = run_of("gdn", {}, "auto", optimizer__lr=1e-30)
    launched = curve(dataclasses.replace(run, kernels=KernelsConfig(graphs="off")))
    platform.install()
    backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
    with session(run) as opened:
        found = opened.steps(2)
        graphs = opened.engine.graphs
        forward = graphs.program.forward

        def syncs(placed: Any, chunk: Any) -> Any:
            if torch.cuda.is_current_stream_capturing():
                placed.tokens.sum().item()
            return forward(placed, chunk)

        graphs.program.forward = syncs
        graphs.forget()
        found += opened.steps(STEPS - 2)
        assert graphs.failed
    assert [loss for loss, _ in found] == [loss for loss, _ in launched]
    assert sum("capture failed" in record.message for record in caplog.records) == 1


def test_rows_of_all_microbatches_are_their_own():
    """The plans of the steps above differ in their numbers of attention rows, and some have the same."""
    run = run_of("gdn", {}, "off")
    empty = {
        "tokens": torch.zeros(4, 256),
        "labels": torch.zeros(4, 256),
        "loss_mask": torch.zeros(4, 256),
        "documents": None,
    }
    rows = [
        batch.plan.attention_tokens
        for i in range(STEPS)
        for batch in training_batches([empty] * 2, run.modes, seed=run.seed, iteration=i, data_rank=0, data_size=1)
    ]
    assert 1 < len(set(rows)) < len(rows)
