"""Other architectures and options train on a GPU as the same model in fp32 with reference kernels does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from test_training import REFERENCE, WIDE, losses

from oryx_megatron import platform
from oryx_megatron.config.schema import KernelsConfig, MoEConfig, OptimizerConfig, PrecisionConfig, RopeScalingConfig
from oryx_megatron.testing.layouts import tiny_run

STEPS = 12
EXPERTS = MoEConfig(experts=4, top_k=2, ffn_hidden_size=256, shared_ffn_hidden_size=256, first_dense=1)
YARN = RopeScalingConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {"model__pattern": ("recurrent*3", "attention")},
    "mixed": {"model__pattern": ("both", "recurrent", "attention", "both")},
    "experts": {"model__moe": EXPERTS},
    "experts, mixed": {"model__moe": EXPERTS, "model__pattern": ("both*2", "recurrent", "both")},
    "yarn": {"model__rope_scaling": YARN},
    "soft-cap and z-loss": {"model__logit_softcap": 20.0, "train__z_loss": 1e-3},
    "muon": {"optimizer": OptimizerConfig(name="muon", lr=1e-3)},
    "documents": {"data__documents": "isolated"},
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
