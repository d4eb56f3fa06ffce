"""megatron-core's hybrid of Mamba-2, attention and MLP layers, as benchmarks/train_throughput.py trains it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from oryx_megatron import platform
from oryx_megatron.testing import run_distributed

pytestmark = [
    pytest.mark.skipif(not platform.installed("triton"), reason="megatron-core's Mamba imports Triton"),
    pytest.mark.skipif(platform.has_gpu(), reason="the benchmark itself runs there"),
]
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def local_stack() -> Any:
    """megatron-core's own stack with its attention and MLP in plain torch; a gated sum stands for Mamba's kernels."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from peers import LocalAttention

    from oryx_megatron.model.parts import RMSNorm

    class Sum(torch.nn.Module):
        def __init__(self, config: Any, d_model: int, **unused: Any) -> None:
            super().__init__()
            self.out_proj = torch.nn.Linear(d_model, d_model, bias=False)
            self.dt_bias, self.A_log = (torch.nn.Parameter(torch.full((d_model,), fill)) for fill in (-4.0, 0.5))

        def forward(self, x: Any, *unused: Any, **ignored: Any) -> tuple[Any, None]:
            return self.out_proj((x * self.dt_bias.exp()).cumsum(0) * (-self.A_log.exp()).exp()), None

    layer = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    layer.self_attention.submodules.core_attention = LocalAttention
    own = mamba_stack_spec.submodules
    own.mamba_layer.submodules.norm, own.mamba_layer.submodules.mixer = RMSNorm, ModuleSpec(module=Sum)
    own.attention_layer.submodules.input_layernorm = RMSNorm
    own.attention_layer.submodules.self_attention = layer.self_attention
    own.mlp_layer.submodules.pre_mlp_layernorm, own.mlp_layer.submodules.mlp = RMSNorm, layer.mlp
    return mamba_stack_spec


def train_hybrid() -> tuple[list[str], list[float], dict[str, float]]:
    """Layers by kind, losses of some steps, and where the parameters of the recurrence started."""
    sys.path.insert(0, BENCHMARKS)
    import train_throughput
    from peers import hybrid_chunks

    from oryx_megatron import parallel
    from oryx_megatron.config.schema import ParallelConfig, PrecisionConfig
    from oryx_megatron.model.parts import RMSNorm
    from oryx_megatron.testing.layouts import tiny_run

    parallel.initialize(ParallelConfig(), seed=1)
    model = tiny_run("gdn").model
    run = train_throughput.run_config(model, 24, 2, PrecisionConfig(dtype="fp32"))
    mixers = ["M", "*"] * (model.num_layers // 2)
    stack = local_stack()
    sys.modules[stack.module.__module__].TENorm = RMSNorm  # type: ignore[attr-defined]  # of its end
    chunks = hybrid_chunks(run, mixers, stack)
    kinds = [type(layer).__name__ for layer in chunks[0].decoder.layers]
    start = {name.rpartition(".")[2]: p.detach().mean().item() for name, p in chunks[0].named_parameters()}
    runner = train_throughput.Runner(run, chunks)
    return kinds, [runner.step(train_throughput.plans_of("", 24)[0]) for _ in range(3)], start


def test_hybrid_trains() -> None:
    ((kinds, losses, start),) = run_distributed(train_hybrid, 1)
    assert kinds[:4] == ["MambaLayer", "MLPLayer", "TransformerLayer", "MLPLayer"]
    assert losses[2] < losses[0]
    assert start["dt_bias"] == pytest.approx(-4.0)
    assert start["A_log"] > 1.0
