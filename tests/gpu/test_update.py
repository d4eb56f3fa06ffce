"""The fused update against megatron-core's own steps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graphs import evaluated
from test_training import WIDE
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.config.schema import EmaConfig, KernelsConfig, ModesConfig, PrecisionConfig, RunConfig
from oryx_megatron.ops import backends
from oryx_megatron.testing.layouts import Session, session, tiny_run, train_and_resume
from oryx_megatron.train.optimizer import connect


@pytest.fixture(autouse=True)
def needs_transformer_engine():
    if reason := platform.transformer_engine_missing():
        pytest.skip(reason)
    platform.install()


def run_of(mixer: str = "gdn", **changes: Any) -> RunConfig:
    """Recurrent tokens alone: without attention's atomic additions two runs are equal bit by bit."""
    modes = ModesConfig(chunk=64, fixed="recurrent")
    run = tiny_run(mixer, **(WIDE | {"precision": PrecisionConfig(), "modes": modes} | changes))
    backends.select(run.kernels, backends.Workload(run.model, "bf16"))
    return run


def state_of(opened: Session) -> list[Tensor]:
    """Weights, masters and moments."""
    found = [p.detach().clone() for p in opened.chunks[0].parameters()]
    for part in opened.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            found += [state[name].clone() for name in ("exp_avg", "exp_avg_sq")]
        found += [p.detach().clone() for group in part.optimizer.param_groups for p in group["params"]]
    return found


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
@pytest.mark.parametrize("clip", [0.0, 0.1, 100.0])
def test_equals_the_steps_of_megatron_core(mixer, clip):
    run = run_of(mixer, optimizer__clip_grad=clip, optimizer__lr=1e-3, optimizer__weight_decay=0.1)
    with session(run) as opened:
        assert opened.engine.fused_update is not None
        found, ours = opened.steps(10), state_of(opened)
    with session(run) as opened:
        opened.engine.fused_update = None
        connect(run, opened.chunks, opened.optimizer)
        wanted, theirs = opened.steps(10), state_of(opened)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], rel=1e-4)
    assert [x for _, x in found] == pytest.approx([x for _, x in wanted], rel=1e-3)
    assert found[-1][0] < 0.98 * found[0][0]
    for own, other in zip(ours, theirs, strict=True):
        assert (own.float() - other.float()).norm() <= 2e-3 * other.float().norm()


def test_a_bad_step_leaves_everything_as_it_was():
    run = dataclasses.replace(run_of(), kernels=KernelsConfig(graphs="off"))
    with session(run) as opened:
        opened.steps(2)
        before = state_of(opened)
        program = opened.engine.program
        forward = program.forward

        def spoiled(placed: Any, chunk: Any) -> Any:
            placed.loss_mask.fill_(float("nan"))
            return forward(placed, chunk)

        program.forward = spoiled
        loss, _ = opened.step()
        assert loss != loss
        for own, other in zip(state_of(opened), before, strict=True):
            assert torch.equal(own, other)
        steps = {group["step"] for part in opened.optimizer.chained_optimizers for group in part.optimizer.param_groups}
        assert steps == {2}
        program.forward = forward
        assert opened.step()[0] > 0
        assert any(not torch.equal(own, other) for own, other in zip(state_of(opened), before, strict=True))


@pytest.mark.parametrize("fp8", ["none", "tensorwise"])
def test_an_average_of_the_weights_beside_it(fp8, tmp_path: Path):
    """train.ema: an fp64 loop over the masters; neither it nor its evaluation between replays changes a loss."""
    run = run_of(precision=PrecisionConfig(fp8=fp8), train__ema=EmaConfig(decay=0.75, start=2))
    with session(dataclasses.replace(run, train=dataclasses.replace(run.train, ema=None))) as opened:
        plain = opened.steps(6)
    with session(run) as opened:
        assert opened.engine.fused_update is not None
        found, loop = [], []
        for number in range(1, 7):
            found.append(opened.step())
            masters = [part.master.double() for part in opened.engine.average.parts]
            loop = masters if number <= 2 else [0.75 * a + 0.25 * b for a, b in zip(loop, masters, strict=True)]
            weights = [p.detach().clone() for p in opened.chunks[0].parameters()]
            with opened.engine.averaged() as there:
                assert there == (number >= 2)
                assert math.isfinite(evaluated(run, opened.chunks, number))
            assert all(map(torch.equal, weights, opened.chunks[0].parameters()))
        assert found == plain
        for part, wanted in zip(opened.engine.average.parts, loop, strict=True):
            torch.testing.assert_close(part.average.double(), wanted, rtol=1e-6, atol=1e-9)
    going, resumed = train_and_resume(run, tmp_path, before=3, after=3)
    assert resumed == going[3:]


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_resume_is_exact(mixer, tmp_path: Path):
    going, resumed = train_and_resume(run_of(mixer), tmp_path, before=3, after=5)
    assert resumed == going[3:]


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_scales_of_delayed_fp8_come_back(mixer, tmp_path: Path):
    run = run_of(mixer, precision=PrecisionConfig(fp8="delayed"))
    going, resumed = train_and_resume(run, tmp_path, before=3, after=5)
    assert resumed == going[3:]
