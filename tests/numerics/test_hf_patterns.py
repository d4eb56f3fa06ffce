"""The Hugging Face model with layers that differ: hybrids by layer, and Oryx layers beside layers of one mode."""

from __future__ import annotations

import json

import pytest
import torch
from hf_reference import in_pieces, random_ids, random_modes, reference_logits, tiny_config, tiny_model

from oryx_megatron.hf.modeling_oryx import OryxCache, OryxForCausalLM

HYBRID = ["recurrent", "attention"]
MIXED = ["recurrent", "both", "attention"]
MODELS = {
    "hybrid gdn": ("gdn", HYBRID, {}),
    "hybrid mamba2": ("mamba2", HYBRID, {}),
    "mixed gdn": ("gdn", MIXED, {"shared_query": True, "rotary": "both"}),
    "mixed mamba2": ("mamba2", MIXED, {}),
}
models = pytest.mark.parametrize("name", MODELS)


def model_of(name: str, dtype: torch.dtype = torch.float64) -> OryxForCausalLM:
    mixer, layers, changes = MODELS[name]
    return tiny_model(mixer, dtype=dtype, layer_modes=layers, num_hidden_layers=len(layers), **changes)


@models
def test_equals_the_written_out_model(name: str) -> None:
    model, ids, attends = model_of(name), random_ids(19), random_modes(19)
    with torch.no_grad():
        logits = model(ids[None], mode_plan=attends).logits[0]
        other = model(ids[None], mode_plan=~attends).logits[0]
    torch.testing.assert_close(logits, reference_logits(model, ids, attends.tolist()), atol=1e-9, rtol=0)
    assert torch.equal(logits, other) == name.startswith("hybrid")  # which ignores the plan


@models
@pytest.mark.parametrize("room", [None, 40])
def test_states_are_kept_where_they_are_read(name: str, room: int | None) -> None:
    """Token by token and in pieces = one pass; keys in layers that attend, a recurrent state in those that recur."""
    model = model_of(name, torch.float32)
    ids, modes = random_ids(3, 23), random_modes(23)
    with torch.no_grad():
        whole = model(ids, mode_plan=modes).logits
    for sizes in ([1] * 23, [5, 1, 9, 1, 7]):
        logits, cache = in_pieces(model, ids, modes, sizes, room)
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)
    for kind, layer in zip(model.config.layer_modes, cache.layers, strict=True):
        assert (layer.keys is None) == (kind == "recurrent")
        assert (layer.recurrent is None) == (kind == "attention")


@models
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_generate(name: str, options: dict) -> None:
    model, ids = model_of(name), random_ids(2, 7)
    text = model.generate(ids, max_new_tokens=9, do_sample=False, mode_plan="prompt:every:2,new:recurrent", **options)
    assert text.shape == (2, 16)
    if options.get("num_beams"):
        return
    with torch.no_grad():
        plan = torch.tensor([i < 7 and i // 4 % 2 == 1 for i in range(15)])
        best = model(text[:, :-1], mode_plan=plan).logits.argmax(-1)
    assert torch.equal(best[:, 6:], text[:, 7:])


@models
def test_training_reaches_every_parameter(name: str) -> None:
    model, ids = model_of(name, torch.float32).train(), random_ids(2, 14)
    for plan in ("attention", "recurrent", "every:2"):
        model.zero_grad()
        model(ids, labels=ids, mode_plan=plan).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_layers_that_attend_need_their_keys() -> None:
    model, ids = model_of("hybrid gdn"), random_ids(1, 6)
    cache = OryxCache(model.config, keep_kv=False)
    model(ids, past_key_values=cache, mode_plan="recurrent")
    with pytest.raises(ValueError, match="keep_kv=False"):
        model(ids[:, :1], past_key_values=cache, mode_plan="recurrent")
    with pytest.raises(ValueError, match="keep_kv=False with attention"):
        model.generate(ids, max_new_tokens=4, mode_plan="recurrent", keep_kv=False)


@models
def test_saved_and_loaded(name: str, tmp_path) -> None:
    model, ids = model_of(name, torch.float32), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_modes"] == MODELS[name][1]
    again = OryxForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_modes": ["both"]}, "layer_modes has 1 entries for num_hidden_layers 2"),
        ({"layer_modes": ["both", "linear"]}, "layer_modes holds 'linear', not one of both, attention, recurrent"),
        (
            {"layer_modes": HYBRID, "modes": "attention"},
            "modes is `attention`, but layer_modes has those of each layer",
        ),
        ({"layer_modes": HYBRID, "shared_query": True}, "shared_query needs modes `both`, not `attention, recurrent`"),
    ],
)
def test_bad_configs(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config("gdn", **changes)
