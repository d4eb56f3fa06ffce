"""How the two sides name weights, as one table that is read in both directions (config fields: fields.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from oryx_megatron.config.mixer_parts import conv_parts, decay_proj_parts, in_proj_parts
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.errors import ConversionError


@dataclass(frozen=True)
class Rule:
    """Tensors that hold the same rows: those of `hf` end to end are those of `checkpoint` end to end.

    `{i}` stands for the number of the layer; a checkpoint stacks the layers of such a tensor along a new first axis.
    """

    hf: tuple[str, ...]
    checkpoint: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Rows of each of several `checkpoint` tensors."""

    @property
    def layered(self) -> bool:
        return "{i}" in self.hf[0]

    def of_layer(self, i: int) -> Rule:
        """The same for one layer alone, which a checkpoint holds apart."""
        own = f"{_STACK}{i}."
        return Rule(
            tuple(name.format(i=i) for name in self.hf),
            tuple(name.replace(_STACK, own) for name in self.checkpoint),
            self.rows,
        )


_IN_PROJ = {
    "key": "k_proj",
    "value": "v_proj",
    "query": "q_proj",
    "query_attention": "q_attention_proj",
    "query_recurrent": "q_recurrent_proj",
    "output_gate": "gate_proj",
}

_LAYER, _STACK = "model.layers.{i}.", "decoder.layers."
_MIXER, _ATTENTION = _LAYER + "mixer.", _STACK + "self_attention."

_WHOLE: tuple[tuple[str, str, Callable[[ModelConfig], bool]], ...] = (
    ("model.embed_tokens.weight", "embedding.word_embeddings.weight", lambda m: True),
    ("model.norm.weight", "decoder.final_layernorm.weight", lambda m: True),
    ("lm_head.weight", "output_layer.weight", lambda m: not m.tie_embeddings),
    (_LAYER + "input_layernorm.weight", _STACK + "input_layernorm.weight", lambda m: True),
    (_LAYER + "pre_mlp_layernorm.weight", _STACK + "pre_mlp_layernorm.weight", lambda m: True),
    (_MIXER + "out_proj.weight", _ATTENTION + "out_proj.weight", lambda m: True),
    (_MIXER + "out_norm.weight", _ATTENTION + "out_norm.weight", lambda m: True),
    (_MIXER + "query_norm.weight", _ATTENTION + "query_norm.weight", lambda m: m.has_attention and m.qk_norm),
    (_MIXER + "key_norm.weight", _ATTENTION + "key_norm.weight", lambda m: m.has_attention and m.qk_norm),
    (_MIXER + "a_log", _ATTENTION + "a_log", lambda m: m.has_recurrence),
    (_MIXER + "dt_bias", _ATTENTION + "dt_bias", lambda m: m.has_recurrence),
    (_MIXER + "d_skip", _ATTENTION + "d", lambda m: m.has_recurrence and m.mixer == "mamba2"),
)
"""Tensors that are the same on both sides: Hugging Face name, checkpoint name, whether a model has it."""

FP32 = ("a_log", "dt_bias", "d_skip", "expert_bias")
"""Last part of the names of tensors that stay fp32 in every export."""
CHECKPOINT_FP32 = tuple(name.split(".")[-1] for hf, name, _ in _WHOLE if hf.split(".")[-1] in FP32)
"""The same in checkpoints."""

EXTRA_STATE = "_extra_state"
"""Objects that megatron-core's linear layers put into checkpoints for FP8: scaling state, no weights."""

_LINEARS = ("self_attention.in_proj", "self_attention.out_proj")


def weight_rules(model: ModelConfig) -> tuple[Rule, ...]:
    """All weights of this model. Where layers differ, checkpoints hold each one's tensors by its number."""
    if not layers_differ(model):
        return (*_rules(model, experts=model.moe is not None), *_head_rules(model))
    rules = [rule for rule in _rules(model, experts=False) if not rule.layered]
    for i, modes in enumerate(model.layer_modes):
        own, experts = model.with_modes(modes) if model.pattern else model, _has_experts(model, i)
        rules += [rule.of_layer(i) for rule in _rules(own, experts=experts) if rule.layered]
    return (*rules, *_head_rules(model))


def _head_rules(model: ModelConfig) -> list[Rule]:
    """Weights of the heads of multi-token prediction, which no checkpoint stacks."""
    own = model.with_modes(model.mtp_modes) if model.pattern else model
    layer = [rule for rule in _rules(own, experts=False) if rule.layered] if model.mtp_layers else []
    rules = []
    for k in range(model.mtp_layers):
        hf, checkpoint = f"mtp.{k}.", f"mtp.layers.{k}."
        names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "final_layernorm"}
        rules += [Rule((f"{hf}{a}.weight",), (f"{checkpoint}{b}.weight",)) for a, b in names.items()]
        rules += [
            Rule(
                tuple(name.replace(_LAYER, f"{hf}layer.") for name in rule.hf),
                tuple(name.replace(_STACK, f"{checkpoint}transformer_layer.") for name in rule.checkpoint),
                rule.rows,
            )
            for rule in layer
        ]
    return rules


def layers_differ(model: ModelConfig) -> bool:
    """Whether a checkpoint of this model holds the tensors of each layer by its number, instead of stacked."""
    return bool(model.pattern) or model.expert_layers not in (0, model.num_layers)


def _has_experts(model: ModelConfig, layer: int) -> bool:
    return model.moe is not None and model.moe.in_layer(layer)


def _swiglu(hf: str, checkpoint: str) -> list[Rule]:
    return [
        Rule((f"{hf}gate_proj.weight", f"{hf}up_proj.weight"), (f"{checkpoint}linear_fc1.weight",)),
        Rule((f"{hf}down_proj.weight",), (f"{checkpoint}linear_fc2.weight",)),
    ]


def _mlp_rules(model: ModelConfig, *, experts: bool) -> list[Rule]:
    hf, checkpoint, moe = _LAYER + "mlp.", _STACK + "mlp.", model.moe
    if not experts or moe is None:
        return _swiglu(hf, checkpoint)
    rules = [
        Rule((f"{hf}router.weight",), (f"{checkpoint}router.weight",)),
        Rule((f"{hf}experts.gate_up_proj",), (f"{checkpoint}experts.experts.linear_fc1.weight",)),
        Rule((f"{hf}experts.down_proj",), (f"{checkpoint}experts.experts.linear_fc2.weight",)),
    ]
    if moe.bias_update_rate:
        rules.append(Rule((f"{hf}router.expert_bias",), (f"{checkpoint}router.expert_bias",)))
    if moe.shared_ffn_hidden_size:
        rules += _swiglu(f"{hf}shared_experts.", f"{checkpoint}shared_experts.")
    return rules


def _rules(model: ModelConfig, *, experts: bool) -> list[Rule]:
    rules = [Rule((hf,), (checkpoint,)) for hf, checkpoint, present in _WHOLE if present(model)]
    rules += [
        Rule((f"{_MIXER}{_IN_PROJ[part]}.weight",), (f"{_ATTENTION}in_proj.weight.{part}",))
        for part in in_proj_parts(model)
    ]
    rules += _mlp_rules(model, experts=experts)
    for name, parts in (("conv", conv_parts(model)), ("decay_proj", decay_proj_parts(model))):
        if parts:
            names = tuple(f"{_ATTENTION}{name}.weight.{part}" for part in parts)
            rules.append(Rule((f"{_MIXER}{name}.weight",), names, tuple(parts.values())))
    return rules


def extra_states(model: ModelConfig) -> list[str]:
    """Names of the (empty) extra states that megatron-core expects in a checkpoint of this model."""
    names = []
    for i, modes in enumerate(model.layer_modes):
        linears = [*_LINEARS, *(["self_attention.decay_proj"] if modes != "attention" else [])]
        experts = _has_experts(model, i)
        kinds = ["mlp."] if not experts else []
        if experts and model.moe is not None and model.moe.shared_ffn_hidden_size:
            kinds.append("mlp.shared_experts.")
        linears += [f"{kind}linear_{fc}" for kind in kinds for fc in ("fc1", "fc2")]
        apart = layers_differ(model)
        stack = f"{_STACK}{i}." if apart else _STACK
        names += [
            f"{stack}{linear}.{EXTRA_STATE}/shard_{'0_1' if apart else f'{i}_{model.num_layers}'}" for linear in linears
        ]
        count = model.moe.experts if experts and model.moe is not None else 0
        places = [f"{e}_{count}" if apart else f"{i}.{e}_{model.num_layers}.{count}" for e in range(count)]
        names += [
            f"{stack}mlp.experts.experts.linear_{fc}.{EXTRA_STATE}/shard_{place}"
            for fc in ("fc1", "fc2")
            for place in places
        ]
    recurs = ["self_attention.decay_proj"] if model.mtp_modes != "attention" else []
    for k in range(model.mtp_layers):
        inside = [f"transformer_layer.{linear}" for linear in (*_LINEARS, *recurs, "mlp.linear_fc1", "mlp.linear_fc2")]
        names += [f"mtp.layers.{k}.{linear}.{EXTRA_STATE}/shard_0_1" for linear in ("eh_proj", *inside)]
    return names if model.tie_embeddings else [*names, f"output_layer.{EXTRA_STATE}/shard_0_1"]


def check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ConversionError, which begins with `what`, when tensors are missing, left over or of another shape."""
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("holds tensors that nothing maps:", sorted(found.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConversionError(f"{what} {problem} {', '.join(names[:3])}{more}")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ConversionError(f"{what} {name} has shape {list(found[name])}, the config asks for {list(shape)}")
