"""mxfp8 and nvfp4: what a run config may ask for, what megatron-core is asked for, and where they are refused."""

from __future__ import annotations

import dataclasses

import pytest

from oryx_megatron import platform
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import MoEConfig, ParallelConfig, PrecisionConfig
from oryx_megatron.config.validate import validate
from oryx_megatron.errors import ConfigError
from oryx_megatron.model.config import transformer_config
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train.engine import why_launched

RECIPES = {"mxfp8": PrecisionConfig(fp8="mxfp8"), "nvfp4": PrecisionConfig(fp4="nvfp4")}
recipes = pytest.mark.parametrize("recipe", RECIPES)


def run_with(precision: PrecisionConfig, **changes):
    sizes = {"model__v_head_dim": 32, "model__qk_head_dim": 32, "model__hidden_size": 64}
    return tiny_run(precision=precision, **(sizes | changes))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a Blackwell GPU and TransformerEngine 2.7."""
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(platform, "transformer_engine_missing", lambda: None)
    monkeypatch.setattr(platform, "capability", lambda: (10, 0))
    monkeypatch.setattr(platform, "version", lambda name: (2, 7, 0))
    return monkeypatch


@recipes
def test_fields_of_megatron_core(recipe: str, gpu: pytest.MonkeyPatch) -> None:
    precision = dataclasses.replace(RECIPES[recipe], bf16_last_layers=1)
    config = transformer_config(load_model("tiny-gdn"), ParallelConfig(), precision)
    assert (config.fp8, config.fp4) == (("e4m3", None) if recipe == "mxfp8" else (None, "e2m1"))
    assert (config.fp8_recipe if recipe == "mxfp8" else config.fp4_recipe) == recipe
    assert (config.first_last_layers_bf16, config.num_layers_at_end_in_bf16) == (True, 1)
    assert (config.num_layers_at_start_in_bf16, config.row_multiple) == (0, 32)


def test_other_recipes_are_as_before(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(platform, "capability", lambda: (9, 0))
    for fp8, fmt in (("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3")):
        config = transformer_config(load_model("tiny-gdn"), ParallelConfig(), PrecisionConfig(fp8=fp8))  # type: ignore[arg-type]
        assert (config.fp8, config.fp8_recipe, config.fp4, config.row_multiple) == (fmt, fp8, None, 16)
    config = transformer_config(load_model("tiny-gdn"), ParallelConfig(), PrecisionConfig())
    assert (config.fp8, config.fp4, config.row_multiple) == (None, None, 1)


@recipes
def test_refused_on_hopper_and_by_old_packages(recipe: str, gpu: pytest.MonkeyPatch) -> None:
    field = "fp8" if recipe == "mxfp8" else "fp4"

    def refused() -> str:
        with pytest.raises(ConfigError) as caught:
            transformer_config(load_model("tiny-gdn"), ParallelConfig(), RECIPES[recipe])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    gpu.setattr(platform, "capability", lambda: (9, 0))
    assert refused().startswith(f"precision.{field}: {recipe} needs a GPU of compute capability 10.0 (Blackwell), this")
    gpu.setattr(platform, "version", lambda name: (2, 0, 1))
    assert refused().startswith(f"precision.{field}: {recipe} needs TransformerEngine 2.")
    gpu.setattr(platform, "transformer_engine_missing", lambda: "it is not installed")
    assert refused() == f"precision.{field}: {recipe} needs TransformerEngine: it is not installed"


@recipes
def test_graphs_are_off(recipe: str, gpu: pytest.MonkeyPatch) -> None:
    assert why_launched(run_with(RECIPES[recipe])) == f"not with precision {recipe}"


@pytest.mark.parametrize(
    ("precision", "changes", "error"),
    [
        ({"fp8": "mxfp8", "fp4": "nvfp4"}, {}, "precision.fp4: nvfp4 and precision.fp8 mxfp8 exclude each other"),
        ({"fp4": "nvfp4", "dtype": "fp32"}, {}, "precision.fp4: nvfp4 needs precision.dtype bf16, not fp32"),
        ({"fp4": "nvfp4", "fp8_params": True}, {}, "precision.fp8_params: has no effect without precision.fp8"),
        ({"fp8": "mxfp8", "fp8_params": True}, {}, "precision.fp8_params: not with precision.fp8 mxfp8"),
        ({"fp8": "mxfp8", "fp8_attention": True}, {}, "precision.fp8_attention: not with precision.fp8 mxfp8"),
        ({"fp4": "nvfp4", "bf16_first_layers": 4}, {}, "leave none of the 4 layers in FP4"),
        ({"fp8": "mxfp8"}, {"model__hidden_size": 80}, "model.hidden_size = 80 is not a multiple of 32, which mxfp8"),
        ({"fp4": "nvfp4"}, {"model__ffn_hidden_size": 48}, "48 / tensor 1 = 48 is not a multiple of 32, which nvfp4"),
        (
            {"fp4": "nvfp4"},
            {"model__moe": MoEConfig(experts=4, ffn_hidden_size=48)},
            "precision.fp4: model.moe.ffn_hidden_size = 48 is not a multiple of 32",
        ),
        (
            {"fp8": "tensorwise"},
            {"model__moe": MoEConfig(experts=4, ffn_hidden_size=32, shared_ffn_hidden_size=24)},
            "precision.fp8: model.moe.shared_ffn_hidden_size 24 / tensor 1 = 24 is not a multiple of 16",
        ),
        ({"fp8": "mxfp8"}, {"data__sequence_length": 48}, "precision.fp8: 48 tokens per rank and microbatch"),
    ],
)
def test_refused_configs(precision: dict, changes: dict, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(run_with(PrecisionConfig(**precision), **changes), 1)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


@recipes
def test_recipes_of_blackwell_are_accepted(recipe: str) -> None:
    assert validate(run_with(RECIPES[recipe]), 1).dp == 1
