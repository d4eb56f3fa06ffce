"""The fused update with TransformerEngine's kernels written out in torch: megatron-core's steps, masked labels too."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.utils import get_model_config

from oryx_megatron.config.schema import PrecisionConfig, RunConfig
from oryx_megatron.testing.layouts import Session, session, tiny_run
from oryx_megatron.train.batches import training_batches
from oryx_megatron.train.engine import take_step
from oryx_megatron.train.update import FusedUpdate

STEPS = 4


def l2norm(lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
    return torch.stack([x.float().square().sum() for x in lists[0]]).sum().sqrt(), None


def adam(lists, lr, beta1, beta2, epsilon, step, decoupled, bias_correction, weight_decay) -> None:
    assert decoupled == bias_correction == 1
    for gradient, weight, first, second, *master in zip(*lists, strict=True):
        own = master[0] if master else weight
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**step)).sqrt() + epsilon
        own.mul_(1 - lr * weight_decay).sub_(lr * (first / (1 - beta1**step)) / root)
        if master:
            weight.copy_(own)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("transformer_engine.pytorch.optimizers")
    module.multi_tensor_applier = lambda call, flag, lists, *rest: call(lists, *rest)  # type: ignore[attr-defined]
    module.multi_tensor_l2norm, module.multi_tensor_adam = l2norm, adam  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def fuse(opened: Session) -> None:
    """What the engine does on a GPU; torch's AdamW is given what TransformerEngine's has."""
    for part in getattr(opened.optimizer, "chained_optimizers", [opened.optimizer]):
        inner = part.optimizer
        inner.adam_w_mode = True

        def initialize(parameter: Any, _: bool, inner: Any = inner) -> None:
            inner.state[parameter].update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})

        inner.initialize_state = initialize
        for group in inner.param_groups:
            group["bias_correction"] = True
    engine = opened.engine
    engine.fused_update = FusedUpdate(opened.optimizer)
    engine.fused_update.connect(get_model_config(opened.chunks[0]))


def steps(opened: Session, masked: bool) -> list[tuple[float, float]]:
    found = []
    for iteration in range(STEPS):
        batches = training_batches(
            opened.stream.next_batches(), opened.run.modes, seed=1, iteration=iteration, data_rank=0, data_size=1
        )
        for batch in batches if masked else ():
            batch.loss_mask[:, ::3] = 0
        found.append(take_step(opened.engine, batches))
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
def test_equals_the_steps_of_megatron_core(clip: float, masked: bool) -> None:
    run: RunConfig = tiny_run(
        precision=PrecisionConfig(dtype="bf16"),
        optimizer__clip_grad=clip,
        optimizer__weight_decay=0.1,
        optimizer__lr=1e-3,
    )
    with session(run) as opened:
        wanted = steps(opened, masked)
        theirs = [p.detach().clone() for p in opened.chunks[0].parameters()]
    with session(run) as opened:
        fuse(opened)
        found = steps(opened, masked)
        ours = [p.detach().clone() for p in opened.chunks[0].parameters()]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=1e-6)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in wanted], rel=1e-5)
    for own, other in zip(ours, theirs, strict=True):
        assert (own.float() - other.float()).norm() <= 1e-4 * other.float().norm()


def test_gradients_are_not_touched_where_all_labels_count_and_nothing_is_clipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pass over 4 bytes a parameter less in most steps of a run."""
    passes: list[float] = []
    multiply = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda xs, factor: (passes.append(factor), multiply(xs, factor)))
    run = tiny_run(precision=PrecisionConfig(dtype="bf16"), optimizer__clip_grad=100.0)
    with session(run) as opened:
        fuse(opened)
        steps(opened, masked=False)
        assert not passes
        steps(opened, masked=True)
        assert passes
        assert all(factor == pytest.approx(32 / 21) for factor in passes)
