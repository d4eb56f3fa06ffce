"""What only a GPU runs, as far as it can be held to account without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from oryx_megatron import parallel, platform
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.model.build import build_chunk
from oryx_megatron.model.config import transformer_config
from oryx_megatron.model.warm import _random
from oryx_megatron.modes import parse_plan
from oryx_megatron.ops import TokenLayout, fused

FUSED = {"fused_mixer": True, "use_te_activation_func": True, "bias_activation_fusion": False}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.destroy()


def chunk(model: ModelConfig, dtype: str = "fp32", **overrides) -> torch.nn.Module:
    return build_chunk(transformer_config(model, ParallelConfig(), PrecisionConfig(dtype=dtype), **overrides))


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_fused_blocks_save_under_the_names_of_the_others(mixer: str) -> None:
    model = load_model(f"tiny-{mixer}")
    plain, fast = (chunk(model, **extra).sharded_state_dict(metadata={}) for extra in ({}, FUSED))
    assert {part.key for part in fast.values()} >= {"embedding.word_embeddings.weight"}
    parts = [{s.key for entry in state.values() for s in _tensors(entry)} for state in (plain, fast)]
    assert parts[0] == parts[1]


def _tensors(entry):
    built = entry.build() if hasattr(entry, "build") else entry
    found = built.values() if isinstance(built, dict) else built if isinstance(built, list) else [built]
    return [tensor for tensor in found if not tensor.key.endswith("_extra_state")]


def test_warming_up_takes_the_runs_precision() -> None:
    """The first parameters of a mixer, its decays, are fp32 in a bf16 model."""
    mixer = chunk(load_model("tiny-gdn"), "bf16", **FUSED).decoder.layers[0].self_attention
    assert next(mixer.parameters()).dtype == torch.float32
    assert _random(2, 3, like=mixer).dtype == torch.bfloat16


def test_single_columns_of_block_tables_have_stride_one() -> None:
    """One block of attention rows, two of keys: flash-attn-4 refuses the strides that a transposed table brings."""
    layout = TokenLayout.of(parse_plan("last:64", 256, chunk=64), device=torch.device("cpu"))
    for table in (layout.keys_of_queries, layout.queries_of_keys, layout.by_token):
        assert all(part.stride(-1) == 1 for part in table)


def test_fp8_attention_only_where_transformer_engine_has_it(monkeypatch) -> None:
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(platform, "transformer_engine_missing", lambda: None)
    monkeypatch.setattr(platform, "capability", lambda: (9, 0))
    monkeypatch.setattr(fused, "in_use", lambda: True)
    precision = PrecisionConfig(fp8="tensorwise", fp8_attention=True)
    with pytest.raises(ConfigError, match=r"precision.fp8_attention: .* tensorwise on this GPU; choose delayed"):
        transformer_config(load_model("tiny-gdn"), ParallelConfig(), precision)
