"""megatron-core's own hybrid of GDN and attention, as the benchmarks train it beside ours, with experts and without."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from oryx_megatron import platform
from oryx_megatron.testing import run_distributed

pytestmark = pytest.mark.skipif(platform.has_gpu(), reason="the benchmarks themselves run there")
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
HYBRID = """
preset: tiny-gdn-moe
pattern: [recurrent*3, attention]
hidden_size: 64
ffn_hidden_size: 96
qk_head_dim: 16
v_head_dim: 16
vocab_size: 128
moe: {experts: 4, ffn_hidden_size: 48, shared_ffn_hidden_size: 48, score: sigmoid, bias_update_rate: 0.001, aux_loss: 0}
"""
"""Four heads; a dense layer, then experts. Without the loss that 0.16 weighs by the tokens of a rank (compat)."""


def stand_ins() -> type:
    """megatron-core's provider of TransformerEngine's parts, each replaced by one that computes the same on a CPU."""
    import torch
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from peers import LocalAttention

    from oryx_megatron.model.parts import RMSNorm
    from oryx_megatron.ops import rms_norm

    class NormLinear(ColumnParallelLinear):
        def __init__(self, width: int, *args: Any, config: Any, **more: Any) -> None:
            super().__init__(width, *args, config=config, **more)
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(width))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

        def forward(self, x: Any, *args: Any, **more: Any) -> Any:
            return super().forward(rms_norm(x, self.layer_norm_weight, self.config.layernorm_epsilon), *args, **more)

    class Provider(LocalSpecProvider):
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return NormLinear

        def layer_norm(self, *args: Any, **more: Any) -> type:
            return RMSNorm

        def core_attention(self) -> type:
            return LocalAttention

    return Provider


def train(folder: str) -> dict[str, list[float]]:
    """Losses of three steps under layouts of two ranks, and of the layers that megatron-core itself puts together."""
    import layouts
    import peers
    from layout_cases import Case
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.models.gpt import gpt_layer_specs

    from oryx_megatron import parallel
    from oryx_megatron.testing.layouts import session

    def losses(layout: str, changes: dict[str, Any] | None = None) -> list[float]:
        case = Case("mcore-gdn", layout, 2, 32, 4, 2, "ratio:0.5", False, chunk=8, hybrid=f"{folder}/hybrid.yaml")
        run = layouts.run_config(case)
        model = dataclasses.replace(run.model, **changes or {})
        run = dataclasses.replace(run, model=model, optimizer=dataclasses.replace(run.optimizer, lr=1e-2))
        with session(run, build=peers.ENGINES[case.model]) as opened:
            return [loss for loss, _ in opened.steps(3)]

    found = {layout: losses(layout) for layout in ("data=2", "data=2,expert=2", "tensor=2", "pipeline=2")}
    found["dense"] = losses("data=2", {"moe": None})
    provider, own, peers._local_layers = stand_ins(), peers._local_layers, peers._te_hybrid_layers
    specs.TESpecProvider = gpt_layer_specs.TESpecProvider = provider  # type: ignore[attr-defined]
    peers._local_delta_net()
    try:
        found["as megatron-core builds it"] = losses("data=2")
        found["dense, as megatron-core builds it"] = losses("data=2", {"moe": None})
    finally:
        peers._local_layers = own
    parallel.release()
    return found


def test_layouts_and_layers_agree(tmp_path: Path) -> None:
    (tmp_path / "hybrid.yaml").write_text(HYBRID)
    for found in run_distributed(train, 2, str(tmp_path)):
        dense = [found.pop("dense"), found.pop("dense, as megatron-core builds it")]
        base = found["data=2"]
        assert base[2] < base[0]
        assert {name: losses for name, losses in found.items() if losses != pytest.approx(base, rel=2e-5)} == {}
        assert dense[0] == pytest.approx(dense[1], rel=1e-6)
        assert dense[0] != pytest.approx(base, rel=1e-4)


def refusals() -> list[str]:
    import peers
    import train_throughput

    from oryx_megatron import parallel
    from oryx_megatron.config import load_model
    from oryx_megatron.config.schema import ParallelConfig, PrecisionConfig
    from oryx_megatron.errors import ConfigError

    parallel.initialize(ParallelConfig(), seed=1)
    said = []
    hybrid = load_model("tiny-gdn-hybrid")
    for model in (load_model("tiny-gdn"), dataclasses.replace(hybrid, num_kv_heads=1), hybrid):
        run = train_throughput.run_config(model, 32, 2, PrecisionConfig(dtype="fp32"))
        try:
            peers.gdn_chunks(run)
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    return said


def test_another_shape_is_refused() -> None:
    ((oryx, grouped, same),) = run_distributed(refusals, 1)
    assert oryx == "tiny-gdn: mcore-gdn takes its shape from a hybrid of gdn, as 1.4b-gdn-hybrid"
    assert grouped.startswith("mcore-gdn: 5,588,568 parameters, +5.71% of tiny-gdn-hybrid's 5,286,552")
    assert grouped.endswith(": no comparison beyond 2%")
    assert same == ""


def test_the_stacks_of_the_benchmark() -> None:
    """What docs/performance.md compares: of one size, and with every kind of layer of the preset."""
    from oryx_megatron.arch import parameter_counts
    from oryx_megatron.config import load_model

    oryx, hybrid = (load_model(f"{BENCHMARKS}/{name}.yaml") for name in ("moe-stack", "moe-stack-hybrid"))
    preset = load_model("7b-a1b-gdn-moe")
    assert oryx == dataclasses.replace(preset, name="moe-stack", num_layers=4)
    assert hybrid.layer_modes == ("recurrent",) * 3 + ("attention",)
    assert (oryx.expert_layers, oryx.takes_plans, hybrid.ignores_plans) == (3, True, True)
    assert parameter_counts(hybrid).total == pytest.approx(parameter_counts(oryx).total, rel=0.02)


def test_the_table_of_one_gpu() -> None:
    """A column for each peer, against its best setting of the same shape and precision."""
    from train_throughput import Result, model_flops, show

    cases = [("gdn/drawn", True, 90.0), ("gpt", True, 60.0), ("mcore-gdn", False, 45.0), ("mcore-gdn", True, 50.0)]
    results = [
        Result(case, 2048, 4, "bf16", graphs, 1, 1.0, 1.0, rate, 1.0, 0.1, 0.1, 1.0, 1.0)
        for case, graphs, rate in cases
    ]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in show(results).splitlines())
    against = [row[head.index("vs GPT") : head.index("vs mcore-gdn") + 1] for row in rows]
    assert against == [["1.500", "1.800"], ["1.000", "1.200"], ["0.750", "0.900"], ["0.833", "1.000"]]
    assert {len(row) for row in rows} == {len(head)}
    assert model_flops("mcore-gdn", 2048, [1.0]) == model_flops("gdn-hybrid/attention", 2048, [1.0])
