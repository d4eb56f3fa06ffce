"""Parameters that do not train: `train.freeze`, patterns over names that no layout changes.

A weight that is fused of several matrices is named by its parts (`…in_proj.weight.query_recurrent`). Where only some
parts of a weight are frozen, the weight stays with the optimizer: the frozen rows' gradients are zeroed before their
norm is taken, and it gets no weight decay. The same holds for some of the experts that a GPU multiplies in one call:
TransformerEngine computes the gradients of all of them, or none. A weight that is frozen as a whole has no gradients
and no optimizer state.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from oryx_megatron.config.schema import ModelConfig, RunConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.tables import layers_differ, weight_rules
from oryx_megatron.model.mixer import OryxMixer
from oryx_megatron.model.mtp import blocks
from oryx_megatron.model.spec import NORM_NAMES

log = logging.getLogger(__name__)

ALL = slice(None)
NEAR = 0.6
"""Similarity from which a name is near to a mistyped pattern; 1 is equal."""


@dataclass(frozen=True)
class Frozen:
    """Frozen rows of weights of which other rows train."""

    rows: list[tuple[torch.nn.Parameter, list[slice]]] = field(default_factory=list)

    def zero_gradients(self) -> None:
        """After gradients are reduced, before anything reads them."""
        for parameter, rows in self.rows:
            for part in rows:
                parameter.main_grad[part].zero_()  # type: ignore[attr-defined]

    def overrides(self) -> dict[ParamKey, dict[str, Any]]:
        """megatron-core's overrides of parameter groups: no weight decay, which would move frozen rows too."""
        if not self.rows:
            return {}
        own = {parameter for parameter, _ in self.rows}
        return {ParamKey(predicate=ParamPredicate(name="partly frozen", fn=own.__contains__)): {"wd_mult": 0.0}}


def is_frozen(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the last pattern that matches a name freezes it; `!PATTERN` leaves what it matches to train."""
    decided = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            decided = not pattern.startswith("!")
    return decided


def freeze(run: RunConfig, chunks: list[Any]) -> Frozen:
    """Freeze parameters of model chunks, before they are wrapped; collective. Logs how many.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left to train, or nothing is frozen.
    """
    patterns = run.train.freeze
    if not patterns:
        return Frozen()
    found: list[Named] = []
    for chunk in chunks:
        found += named_parts(unwrap_model(chunk), tied=run.model.tie_embeddings)
    sizes = _sizes(found)
    check(patterns, sizes)
    frozen = sum(size for name, size in sizes.items() if is_frozen(name, patterns))
    whole = sum(sizes.values())
    kinds = sorted({_general(name) for name in sizes if not is_frozen(name, patterns)})
    log.info("train.freeze: %s of %s parameters are frozen; trained: %s", f"{frozen:,}", f"{whole:,}", ", ".join(kinds))
    get_model_config(chunks[0]).freezes = True
    wholly, partly = divide(found, patterns, [group for chunk in chunks for group in _grouped(unwrap_model(chunk))])
    for parameter in wholly:
        parameter.requires_grad_(False)
    if run.parallel.recompute in ("mixer", "full"):  # through torch's checkpoint
        for chunk in chunks:
            if (embedding := getattr(unwrap_model(chunk), "embedding", None)) is not None:
                embedding.register_forward_hook(_track)
    return Frozen(partly)


def _track(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Let what is recomputed have an input with a gradient, under a frozen embedding too.

    torch's checkpoint computes none, for any parameter inside, where no input has one.
    """
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    return _Tracked.apply(output, output.new_zeros((), requires_grad=True))


class _Tracked(torch.autograd.Function):
    """x as it is; its gradient is computed and dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


Named = tuple[torch.nn.Parameter, dict[str, slice]]
"""A parameter with the rows of its parts by their name."""


def divide(
    found: list[Named], patterns: tuple[str, ...], groups: list[list[torch.nn.Parameter]]
) -> tuple[list[torch.nn.Parameter], list[tuple[torch.nn.Parameter, list[slice]]]]:
    """Parameters that get no gradients at all, and those whose gradients are zeroed afterwards, in which rows.

    Args:
        found: All parameters of this rank.
        patterns: train.freeze.
        groups: Parameters of which all get gradients, or none.
    """
    rows = [
        (parameter, [part for name, part in parts.items() if is_frozen(name, patterns)]) for parameter, parts in found
    ]
    wholly = {id(parameter) for (parameter, own), (_, parts) in zip(rows, found) if len(own) == len(parts)}
    for group in groups:
        if not wholly.issuperset(map(id, group)):
            wholly -= set(map(id, group))
    return (
        [parameter for parameter, _ in rows if id(parameter) in wholly],
        [(parameter, own) for parameter, own in rows if own and id(parameter) not in wholly],
    )


def _grouped(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Weights of each of TransformerEngine's grouped linears."""
    named = [dict(module.named_parameters(recurse=False)) for module in model.modules()]
    groups = [[weight for name, weight in own.items() if re.fullmatch(r"weight\d+", name)] for own in named]
    return [group for group in groups if group]


def check(patterns: tuple[str, ...], names: Collection[str]) -> None:
    """Raise ConfigError for a pattern that matches no name, or when nothing is left to train or is frozen."""
    for i, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            raise ConfigError(f"train.freeze[{i}]: {pattern!r} matches no parameter; {_advice(pattern, names)}")
    frozen = [is_frozen(name, patterns) for name in names]
    if patterns and not any(frozen):
        raise ConfigError("train.freeze: freezes no parameter; `!PATTERN` trains what a pattern before it freezes")
    if all(frozen):
        raise ConfigError("train.freeze: freezes every parameter; leave some out, e.g. by a last pattern `!*a_log`")


def same(model: ModelConfig, one: tuple[str, ...], two: tuple[str, ...]) -> bool:
    """Whether two lists of patterns freeze the same of a model, however they are written."""
    return one == two or all(is_frozen(name, one) == is_frozen(name, two) for name in names(model))


def _advice(pattern: str, names: Collection[str]) -> str:
    """What to write in place of a pattern that matches nothing."""
    sign, text = ("!", pattern[1:]) if pattern.startswith("!") else ("", pattern)
    inner = re.sub(r"^\^|\$$", "", text).replace(r"\.", ".").replace(".*", "*")  # a regular expression's
    for part in (text, inner):
        whole = re.sub(r"\*+", "*", f"*{part}*")
        if part.strip("*") and any(fnmatchcase(name, whole) for name in names):
            return f"a pattern covers whole names, with * and ? alone: {sign + whole!r}"
    general = sorted({_general(name) for name in names})
    core = text.replace("*", "").strip(".^$")
    scores = {name: max(SequenceMatcher(None, core, part).ratio() for part in _parts(name)) for name in general}
    near = [name for name in sorted(general, key=lambda name: -scores[name]) if scores[name] >= NEAR]
    return f"names are like {', '.join((near or general)[:4])}, …"


def _parts(name: str) -> list[str]:
    """A name, and whatever neighbouring words of it make."""
    words = [word for word in name.split(".") if word != "*"]
    return [".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]


def names(model: ModelConfig) -> list[str]:
    """Those of a whole model that is not built: for --dry-run."""
    found = []
    for name in (name for rule in weight_rules(model) for name in rule.checkpoint):
        if name.endswith("expert_bias"):  # no parameter: routers set it
            continue
        own = re.sub(r"(decay_proj\.weight)\..*", r"\1", name)
        layers = [own]
        if not layers_differ(model) and own.startswith("decoder.layers."):
            layers = [own.replace("layers.", f"layers.{i}.", 1) for i in range(model.num_layers)]
        for name_of_layer in layers:
            head, experts, tail = name_of_layer.partition(".experts.experts.")
            count = model.moe.experts if experts and model.moe is not None else 0
            found += [f"{head}.experts.{i}.{tail}" for i in range(count)] if experts else [name_of_layer]
    return list(dict.fromkeys(found))


def named_parts(model: Any, *, tied: bool) -> list[Named]:
    """Parameters with the names of their parts and the rows of each; layers are numbered over all pipeline stages."""
    names: dict[int, str] = {}
    parts: dict[int, dict[str, int]] = {}
    for _, prefix, layer in blocks(model):
        named = layer.named_parameters()
        names |= {id(parameter): prefix + NORM_NAMES.get(name, name) for name, parameter in named}
        mixer: OryxMixer = layer.self_attention
        for weight, rows_of in mixer.in_proj_weights():
            names[id(weight)] = f"{prefix}self_attention.in_proj.weight"
            parts[id(weight)] = rows_of
        if (convolution := getattr(mixer, "conv", None)) is not None and mixer.conv_parts:
            parts[id(convolution.weight)] = mixer.conv_parts
    found = []
    for name, parameter in model.named_parameters():
        own = "embedding.word_embeddings.weight" if tied and name == "output_layer.weight" else name
        own = _of_experts(names.get(id(parameter), own), model)
        rows, start = {}, 0
        for part, count in parts.get(id(parameter), {}).items():
            rows[f"{own}.{part}"] = slice(start, start + count)
            start += count
        found.append((parameter, rows or {own: ALL}))
    return found


def _sizes(found: list[Named]) -> dict[str, int]:
    """Elements of every named part of the whole model; collective."""
    own: dict[str, int] = {}
    for parameter, parts in found:
        shards = 1
        if getattr(parameter, "tensor_model_parallel", False):
            shards = (
                parallel_state.get_expert_tensor_parallel_world_size()
                if not getattr(parameter, "allreduce", True)
                else parallel_state.get_tensor_model_parallel_world_size()
            )
        own |= {name: _count(parameter, rows) * shards for name, rows in parts.items()}
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return {name: size for rank in ranks for name, size in rank.items()}


def _of_experts(name: str, model: Any) -> str:
    """A parameter's name with the number of its expert in the whole model, however experts are held on this rank."""
    one = re.sub(r"\.experts\.(linear_fc[12]\.weight)(\d+)$", r".experts.local_experts.\2.\1", name)  # grouped
    found = re.fullmatch(r"(.*\.experts\.)local_experts\.(\d+)\.(.*)", one)
    if found is None:
        return name
    ranks, rank = (
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    first = rank * (get_model_config(model).num_moe_experts // ranks)
    return f"{found[1]}{first + int(found[2])}.{found[3]}"


def _count(parameter: Tensor, rows: slice) -> int:
    return len(range(*rows.indices(parameter.shape[0]))) * (parameter.numel() // parameter.shape[0])


def _general(name: str) -> str:
    """A name without the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
