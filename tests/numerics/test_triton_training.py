"""Training with the fused mixer's kernels in Triton's interpreter: losses and gradient norms of separate steps.

    TRITON_INTERPRET=1 python -m pytest tests/numerics/test_triton_training.py

Under megatron-core's data parallelism, whose fp32 buffers the kernels add their weights' gradients to.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from oryx_megatron import ops, platform
from oryx_megatron.model import build
from oryx_megatron.model.config import transformer_config
from oryx_megatron.model.warm import compile_kernels
from oryx_megatron.ops import fused
from oryx_megatron.testing import fused_steps
from oryx_megatron.testing.layouts import session, tiny_run

pytestmark = [
    pytest.mark.skipif(
        not platform.installed("triton") or os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs Triton and TRITON_INTERPRET=1",
    ),
    pytest.mark.skipif(platform.has_gpu(), reason="tests/gpu runs the compiled kernels"),
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("mixer", "documents"), [("gdn", "isolated"), ("mamba2", "joined")])
def test_losses_and_gradient_norms(mixer: str, documents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one step of two microbatches: the interpreter takes a millisecond for a kernel's line."""
    run = tiny_run(
        mixer,
        model__num_layers=1,
        model__num_heads=2,
        model__num_kv_heads=1,
        model__qk_head_dim=16,
        model__v_head_dim=16,
        data__sequence_length=12,
        modes__chunk=3,
        modes__fixed="ratio:0.5",
        data__documents=documents,
        train__global_batch_size=2,
        train__micro_batch_size=1,
        optimizer__lr=1e-3,
    )
    with session(run) as opened:
        wanted = opened.step()
    for name in ("ssd_scan", "delta_scan"):  # of other packages, and of a kernel that takes minutes here
        monkeypatch.setattr(ops, name, getattr(fused_steps, name.replace("_scan", "_by_steps")))
    monkeypatch.setattr(build, "transformer_config", functools.partial(transformer_config, **fused_steps.FUSED))
    added, whole = [], fused._weight_gradient

    def noted(weight, *shares, **more):
        added.append(weight)
        return whole(weight, *shares, **more)

    monkeypatch.setattr(fused, "_weight_gradient", noted)
    with session(run) as opened:
        compile_kernels(run, opened.chunks)  # leaves no trace
        found = opened.step()
        names = {id(weight): name for name, weight in opened.chunks[0].named_parameters()}
    assert found == pytest.approx(wanted, rel=1e-6)
    told = {names[id(weight)].rpartition("self_attention.")[2] for weight in added}  # themselves, so with their buffers
    assert told == {"conv.weight", "key_norm.weight", "query_norm.weight", "out_norm.weight", "a_log", "dt_bias"}
    assert all(isinstance(weight, torch.nn.Parameter) and weight.grad_added_to_main_grad for weight in added)
