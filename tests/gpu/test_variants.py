"""Other architectures and options train on a GPU as the same model in fp32 with reference kernels does."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_training import REFERENCE, WIDE, losses

from oryx_megatron import platform
from oryx_megatron.config.schema import (
    KernelsConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    PrecisionConfig,
    RopeScalingConfig,
)
from oryx_megatron.ops import backends
from oryx_megatron.testing.layouts import session, tiny_run
from oryx_megatron.train.freeze import is_frozen

STEPS = 12
EXPERTS = MoEConfig(experts=4, top_k=2, ffn_hidden_size=256, shared_ffn_hidden_size=256, first_dense=1)
BALANCED = dataclasses.replace(EXPERTS, score="sigmoid", bias_update_rate=1e-3, z_loss=1e-3, capacity_factor=1.5)
YARN = RopeScalingConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {"model__pattern": ("recurrent*3", "attention")},
    "mixed": {"model__pattern": ("both", "recurrent", "attention", "both")},
    "experts": {"model__moe": EXPERTS},
    "experts, sigmoid and capacity": {"model__moe": BALANCED},
    "experts, mixed": {"model__moe": EXPERTS, "model__pattern": ("both*2", "recurrent", "both")},
    "yarn": {"model__rope_scaling": YARN},
    "soft-cap and z-loss": {"model__logit_softcap": 20.0, "train__z_loss": 1e-3},
    "muon": {"optimizer": OptimizerConfig(name="muon", lr=1e-3)},
    "muon, experts": {"model__moe": EXPERTS, "optimizer": OptimizerConfig(name="muon", lr=1e-3)},
    "documents": {"data__documents": "isolated"},
    "multi-token prediction": {"model__mtp": MTPConfig(layers=2)},
    "FP8 weights": {"precision": PrecisionConfig(fp8="tensorwise", fp8_params=True)},
}


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_stay_beside_fp32(name: str, mixer: str) -> None:
    if ("experts" in name or "FP8" in name) and (reason := platform.transformer_engine_missing()):
        pytest.skip(reason)
    changes = WIDE | VARIANTS[name]
    want = losses(tiny_run(mixer, **{key: x for key, x in changes.items() if key != "precision"}), REFERENCE, STEPS)
    run = tiny_run(mixer, **({"precision": PrecisionConfig()} | changes))
    found = losses(run, KernelsConfig(), STEPS)
    assert found == pytest.approx(want, rel=0.02)
    launched = losses(dataclasses.replace(run, kernels=KernelsConfig(graphs="off")), KernelsConfig(graphs="off"), STEPS)
    assert found == pytest.approx(launched, rel=5e-3)


def test_tokens_that_are_not_numbers_give_a_loss_of_nan() -> None:
    """A step to skip, not the end of the run: TransformerEngine's fused router would give them too few experts."""
    if reason := platform.transformer_engine_missing():
        pytest.skip(reason)
    platform.install()
    run = tiny_run("gdn", **(WIDE | {"model__moe": EXPERTS}), precision=PrecisionConfig())
    backends.select(run.kernels, backends.Workload(run.model, "bf16"))
    with session(run) as opened:
        table = next(p for name, p in opened.chunks[0].named_parameters() if "word_embeddings" in name)
        table.data[: len(table) // 2] = math.nan
        loss, _ = opened.step()
    assert math.isnan(loss)


def test_frozen_experts_stay() -> None:
    """train.freeze names single experts, of which a GPU holds one fused weight each."""
    if reason := platform.transformer_engine_missing():
        pytest.skip(reason)
    platform.install()
    changes = WIDE | {"model__moe": EXPERTS, "train__freeze": ("*.experts.[01].*",)}
    run = tiny_run("gdn", **changes, precision=PrecisionConfig())
    backends.select(run.kernels, backends.Workload(run.model, "bf16"))
    with session(run) as opened:
        before = opened.weights()
        opened.steps(3)
        moved = {name for name, rows in opened.weights().items() if not torch.equal(rows, before[name])}
    frozen = {name for name in before if is_frozen(name, run.train.freeze)}
    assert any("experts.0." in name for name in frozen)
    assert not moved & frozen
    assert {name for name in before if "experts.3." in name} <= moved
