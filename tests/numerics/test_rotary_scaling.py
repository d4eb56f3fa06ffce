"""Scaled rotary frequencies against transformers' and megatron-core's, and what both sides do with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hf_reference import tiny_model
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from oryx_megatron.config.schema import ModelConfig, RopeScalingConfig
from oryx_megatron.hf.rotary_oryx import Rope
from oryx_megatron.ops import rope_of, rotary

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048},
    "yarn, short": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all set": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0,
        "beta_slow": 2.0, "attention_factor": 1.25, "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "llama3, short": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 20, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}  # fmt: skip
WIDTHS = (8, 64, 128)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, theta: float, width: int) -> None:
    parameters = SCALINGS[name] | {"rope_theta": theta}
    config = LlamaConfig(head_dim=width, rope_parameters=dict(parameters))
    want, temperature = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    rope = Rope.of(parameters)
    got = rope.frequencies(width, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    assert rope.temperature == pytest.approx(temperature, rel=1e-12)
    plain = Rope(theta).frequencies(width, torch.device("cpu"), torch.float32)
    assert not torch.allclose(got, plain, rtol=1e-2)


def test_angles_are_those_of_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its YaRN, on positions beyond the extended length: cosines and sines with the temperature in them."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    theirs = YarnRotaryEmbedding(
        32, rotary_base=5e4, scaling_factor=8.0, original_max_position_embeddings=64, use_cpu_initialization=True,
        mscale=1.0, mscale_all_dim=0.5,
    )  # fmt: skip
    angles, temperature = theirs.get_emb(700)
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5e4}
    cos, sin = Rope.of(scaling | {"mscale": 1.0, "mscale_all_dim": 0.5}).tables(torch.arange(700), 32, torch.float32)
    for ours, want in ((cos, angles.cos()), (sin, angles.sin())):
        torch.testing.assert_close(ours, (want * temperature)[:, 0, 0, :16], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SCALINGS)
def test_scores_are_scaled_by_the_square_of_the_temperature(name: str) -> None:
    """q · k of one position: the length of both grows; a recurrence keeps it."""
    rope = Rope.of(SCALINGS[name])
    q, k = (torch.randn(1, 1, 1, 64, dtype=torch.float64) for _ in range(2))
    at = torch.tensor([1000])
    scores = (rotary(q, at, rope) * rotary(k, at, rope)).sum()
    torch.testing.assert_close(scores, (q * k).sum() * rope.temperature**2)
    kept = (rotary(q, at, rope, attention=False) * rotary(k, at, rope, attention=False)).sum()
    torch.testing.assert_close(kept, (q * k).sum())
    assert torch.autograd.gradcheck(lambda x: rotary(x, at, rope), (q.requires_grad_(),))


def test_a_model_config_becomes_the_same() -> None:
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 1}
    model = ModelConfig(name="m", mixer="gdn", rope_theta=7e4, **sizes)
    assert rope_of(model) == Rope(7e4)
    for parameters in SCALINGS.values():
        scaled = dataclasses.replace(model, rope_scaling=RopeScalingConfig(**parameters))
        assert rope_of(scaled) == Rope.of(parameters | {"rope_theta": 7e4})


@pytest.mark.parametrize("name", ["yarn, short", "llama3, short"])
def test_an_export_decodes_as_it_reads(name: str) -> None:
    """Token by token with a cache, beyond the original length, as in one pass."""
    model = tiny_model("gdn", rotary="both", rope_parameters=SCALINGS[name] | {"rope_theta": 100.0})
    assert model.config.rope == Rope.of(SCALINGS[name] | {"rope_theta": 100.0})
    ids = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids, mode_plan="every:2").logits
        plain = tiny_model("gdn", rotary="both", rope_parameters={"rope_theta": 100.0})(ids, mode_plan="every:2").logits
        cache, parts = None, []
        for t in range(40):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True, mode_plan=whole_plan(t))
            cache = out.get("past_key_values", out.get("cache"))
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)
    assert (whole - plain).abs().max() > 1e-3


def whole_plan(t: int) -> str:
    """Mode of token t under `every:2` with chunks of 4."""
    return "attention" if (t // 4) % 2 else "recurrent"


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_a_llama(name: str) -> None:
    """Cosines and sines of transformers' own module, far beyond the original length; angles are rounded in fp32."""
    parameters = SCALINGS[name] | {"rope_theta": 5e5}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=dict(parameters))
    )
    for positions, atol in ((torch.arange(48), 2e-5), (torch.arange(0, 32768, 37), 1e-2)):
        ours = Rope.of(parameters).tables(positions, 64, torch.float32)
        for got, want in zip(ours, theirs(torch.zeros(1), positions[None]), strict=True):
            torch.testing.assert_close(got, want[0, :, :32], rtol=0, atol=atol)
