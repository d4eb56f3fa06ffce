"""All projections of a mixer in one function (bf16): against fp64, and against TransformerEngine's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import WIDE
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.config.schema import KernelsConfig, PrecisionConfig, RunConfig
from oryx_megatron.model import SequenceInfo
from oryx_megatron.model.config import OryxTransformerConfig
from oryx_megatron.model.projections import Read, project
from oryx_megatron.modes import parse_plan
from oryx_megatron.ops import backends
from oryx_megatron.testing.layouts import session, tiny_run

LENGTH, BATCH = 37, 3
WIDTHS = {"even": (72, (88, 24, 40, 6)), "odd": (71, (23, 11, 9, 3))}
ROWS = ((0, LENGTH), (0, 13), (13, LENGTH), (0, LENGTH))


@pytest.mark.parametrize("into", [True, False], ids=["into main_grad", "returned"])
@pytest.mark.parametrize("name", WIDTHS)
def test_products_and_gradients_are_those_in_fp64(name: str, into: bool) -> None:
    """Gradients of weights are added to fp32 buffers twice, exact to fp32; the input's is bf16, rounded at each sum."""
    if into and (reason := platform.transformer_engine_missing()):
        pytest.skip(reason)
    width, widths = WIDTHS[name]
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    x, weights = draw(LENGTH, BATCH, width), [draw(own, width) for own in widths]
    grads = [draw(stop - start, BATCH, own) for (start, stop), own in zip(ROWS, widths)]
    exact = [tensor.double().requires_grad_() for tensor in (x, *weights)]
    outputs = [F.linear(exact[0][start:stop], weight) for (start, stop), weight in zip(ROWS, exact[1:])]
    want = torch.autograd.grad(outputs, exact, [grad.double() for grad in grads])
    for tensor in (x, *weights):
        tensor.requires_grad_()
    for weight in weights:
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for _ in range(2):
        x.grad = None
        found = project(x, [Read(w, *rows) for w, rows in zip(weights, ROWS)], into_main_grad=into)
        torch.autograd.backward(found, grads)
    assert all(apart(a, b) < 4e-3 for a, b in zip(found, outputs))
    assert apart(x.grad, want[0]) < 8e-3
    for weight, of_weight in zip(weights, want[1:]):
        total: Any = weight
        assert total.grad_added_to_main_grad is into
        if into:
            assert apart(total.main_grad, 1 + 2 * of_weight) < 1e-5
        else:
            assert apart(weight.grad, 2 * of_weight) < 8e-3


def apart(found: Tensor | None, want: Tensor) -> float:
    assert found is not None
    return float((found.double() - want).norm() / want.norm())


def wide(mixer: str, **precision: Any) -> RunConfig:
    return tiny_run(mixer, **WIDE, precision=PrecisionConfig(**precision))


def gradients(chunk: Any, run: RunConfig, plan: str) -> dict[str, Tensor]:
    """In fp32, of two microbatches, as megatron-core's wrapper holds them."""
    length = run.data.sequence_length
    info = SequenceInfo.build(parse_plan(plan, length, chunk=64), device=platform.device(), sort=True)
    chunk.zero_grad_buffer()
    for seed in range(2):
        text = torch.randint(1, run.model.vocab_size, (2, length + 1), generator=torch.manual_seed(seed)).cuda()
        inputs, labels = info.arrange(text[:, :-1]), info.arrange_labels(text[:, 1:])
        chunk(inputs, None, None, labels=labels, packed_seq_params=info).float().mean().backward()
    return {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
@pytest.mark.parametrize("plan", ["ratio:0.5", "attention", "recurrent", "runs:a0-37,r37-end"])
def test_one_function_gives_the_gradients_of_modules(plan: str, mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := platform.transformer_engine_missing():
        pytest.skip(reason)
    run = wide(mixer)
    platform.install()
    backends.select(KernelsConfig(), backends.Workload(run.model, "bf16"))
    with session(run) as opened:
        chunk = opened.chunks[0]
        found = gradients(chunk, run, plan)
        with monkeypatch.context() as patched:
            patched.setattr(OryxTransformerConfig, "quantized", True)  # the modules are there, and take bf16
            want = gradients(chunk, run, plan)
    # What is a thousandth of the whole, `d` of mamba2, is a sum that nearly cancels: in bf16 its rounding is a fifth.
    least = 1e-3 * torch.stack([gradient.norm() for gradient in want.values()]).norm()
    for name, gradient in want.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm().clamp(min=least), name


@pytest.mark.parametrize(("first", "second"), [("none", "tensorwise"), ("tensorwise", "none")])
def test_checkpoints_of_bf16_and_fp8_load_into_each_other(first: str, second: str, tmp_path: Path) -> None:
    """In FP8 the norm lies inside in_proj; weights, masters and their moments have one name."""
    if reason := platform.transformer_engine_missing():
        pytest.skip(reason)
    platform.install()
    run = wide("gdn", fp8=first)
    backends.select(KernelsConfig(), backends.Workload(run.model, "bf16"))
    with session(run) as opened:
        opened.steps(3)
        manager = opened.checkpoints(tmp_path)
        assert manager.save(3, opened.manifest) or manager.wait()
        before, want = opened.weights(), opened.steps(2)
    with session(wide("gdn", fp8=second), iteration=3) as opened:
        assert opened.checkpoints(tmp_path).load() is not None
        after, found = opened.weights(), opened.steps(2)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in want], rel=0.02)
