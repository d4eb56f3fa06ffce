"""A Transformer in Llama's layout as the start of an Oryx model. This is our own extension, not the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oryx_megatron.config import from_dict
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.errors import ConversionError
from oryx_megatron.hf.fields import rope_fields, to_hf_config
from oryx_megatron.hf.folders import Weights, checked_model, hf_shapes, is_tied, named, read_json
from oryx_megatron.hf.tables import FP32, check_names
from oryx_megatron.hf.tensors import SafetensorsReader, Shape
from oryx_megatron.model.initialize import bias_draw, decay_draw, generator_of, normal_draw

LLAMA = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.layers.{i}.input_layernorm.weight": "model.layers.{i}.input_layernorm.weight",
    "model.layers.{i}.pre_mlp_layernorm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "model.layers.{i}.mixer.k_proj.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "model.layers.{i}.mixer.v_proj.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "model.layers.{i}.mixer.q_attention_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "model.layers.{i}.mixer.q_recurrent_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "model.layers.{i}.mixer.out_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "model.layers.{i}.mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "model.layers.{i}.mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
}
"""Oryx name → the Llama tensor it is copied from."""


def open_llama(source: str | Path, *, mixer: Literal["gdn", "mamba2"], seed: int) -> Weights:
    """A Transformer in Llama's layout as an Oryx model. Raises ConversionError as `import_llama` does."""
    source = Path(source)
    theirs = read_json(source / "config.json")
    model = checked_model(source, lambda: _llama_model(source, theirs, mixer))
    config = to_hf_config(model)
    reader = SafetensorsReader(source)
    shapes = hf_shapes(config)
    copied = {named(ours, i): named(llama, i) for i in range(model.num_layers) for ours, llama in LLAMA.items()}
    copied = {ours: llama for ours, llama in copied.items() if ours in shapes}
    found = {name: shape for name, shape in reader.shapes().items() if not is_tied(name, config)}
    check_names({llama: shapes[ours] for ours, llama in copied.items()}, found, f"{source}:")
    dtype = reader.dtype("model.embed_tokens.weight")

    def produce(name: str) -> Tensor:
        if name in copied:
            return reader.read(copied[name])
        return _new_tensor(name, shapes[name], model, seed).to(dtype_of(name))

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name.split(".")[-1] in FP32 else dtype

    return Weights(source, model, shapes, dtype_of, produce)


def _llama_model(source: Path, theirs: dict[str, Any], mixer: Literal["gdn", "mamba2"]) -> ModelConfig:
    if theirs.get("model_type") != "llama":
        raise ConversionError(f"{source}: model type {theirs.get('model_type')!r}; known: oryx, llama")
    for field, value, wanted in (
        ("hidden_act", theirs.get("hidden_act", "silu"), "silu"),
        ("attention_bias", theirs.get("attention_bias", False), False),
        ("mlp_bias", theirs.get("mlp_bias", False), False),
    ):
        if value != wanted:
            raise ConversionError(f"{source}: {field} is {value!r}; only {wanted!r} can become an Oryx model")
    try:
        heads = theirs["num_attention_heads"]
        width = theirs.get("head_dim") or theirs["hidden_size"] // heads
        fields = {
            "name": f"{source.resolve().name}-{mixer}",
            "mixer": mixer,
            "num_layers": theirs["num_hidden_layers"],
            "hidden_size": theirs["hidden_size"],
            "ffn_hidden_size": theirs["intermediate_size"],
            "num_heads": heads,
            "num_kv_heads": theirs.get("num_key_value_heads") or heads,
            "qk_head_dim": width,
            "v_head_dim": width,
            "vocab_size": theirs["vocab_size"],
            "conv_width": 4 if mixer == "mamba2" else 0,
            "output_gate": False,
            "qk_norm": False,
            **rope_fields(_rope_parameters(theirs)),
            "tie_embeddings": theirs.get("tie_word_embeddings") or False,
            "norm_epsilon": theirs.get("rms_norm_eps", 1e-6),
            "init_std": theirs.get("initializer_range", 0.02),
        }
        return from_dict(ModelConfig, fields, source="config.json")
    except KeyError as error:
        raise ConversionError(f"{source / 'config.json'} lacks {error}") from None


def _rope_parameters(theirs: dict[str, Any]) -> dict[str, Any]:
    """With what transformers fills in from other fields of a Llama's config."""
    rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    if theirs.get("rope_theta") is not None:
        rope.setdefault("rope_theta", theirs["rope_theta"])
    longest = theirs.get("max_position_embeddings", 2048)
    if rope.get("rope_type", rope.get("type")) in ("yarn", "llama3"):
        if rope.get("original_max_position_embeddings") is None:
            rope["original_max_position_embeddings"] = longest
        if rope.get("factor") is None:
            rope["factor"] = longest / rope["original_max_position_embeddings"]
    return rope


def _new_tensor(name: str, shape: Shape, model: ModelConfig, seed: int) -> Tensor:
    """First value of a tensor that Llama lacks."""
    draws = {"a_log": decay_draw(model), "dt_bias": bias_draw(model), "decay_proj": normal_draw(model.init_std)}
    kind = name.removesuffix(".weight").split(".")[-1]
    if kind in ("out_norm", "d_skip"):
        return torch.ones(shape)
    if kind == "conv":
        taps = torch.zeros(shape)
        taps[:, -1] = 1.0
        return taps
    if kind in draws:
        return draws[kind](shape, generator_of(f"{seed}:{name}"))
    raise ConversionError(f"no first value is known for {name}")
