"""Initial weights, equal under every layout.

Each named tensor of the whole model is drawn from its own generator, seeded by (run seed, name), and every rank keeps
its slice. So tp=1 and tp=8 start from the same model, which megatron-core's own initialisation (one random stream per
rank) does not give. On one kind of device the draw is reproducible; CPU and GPU generators differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from oryx_megatron import compat
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.model.experts import expert_weights
from oryx_megatron.model.mixer import OryxMixer
from oryx_megatron.model.mtp import heads

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@torch.no_grad()
def initialize_weights(chunk: GPTModel, model: ModelConfig, seed: int) -> None:
    """Fill every parameter of a model chunk (a pipeline or virtual stage) in place.

    Matrices: normal with `init_std`, divided by √(2 layers) where they write to the residual stream (out_proj, fc2).
    Routers and experts are matrices too, each expert drawn by its number among all; so is what a head of multi-token
    prediction projects with.
    With muP (arXiv 2203.03466, table 8; megatron-core 0.19) those inside blocks are divided by √m too, m the width over
    the base width, routers by m, and the factor 1/m of the logits is what the final norm starts from (train/mup.py).
    Convolution taps: uniform in ±1/√width, torch's default. A uniform in `decay_init`, softplus(dt_bias) log-uniform in
    `dt_init`, as in the Mamba-2 and Gated DeltaNet code bases. Norm weights and d: one.

    Raises:
        KeyError: a parameter without a rule, which would have stayed uninitialised.
    """
    tensor = Slicer(parallel_state.get_tensor_model_parallel_group(), seed)
    experts = Slicer(None, seed)
    table, std = normal_draw(model.init_std), model.init_std / math.sqrt(model.width_multiplier)
    normal, residual = normal_draw(std), normal_draw(std / math.sqrt(2 * model.num_layers))
    router = normal_draw(model.init_std / model.width_multiplier)
    done: set[int] = set()

    def fill(
        name: str,
        parameter: Tensor,
        draw: Draw,
        axis: int | None = 0,
        parts: dict[str, int] | None = None,
        slicer: Slicer = tensor,
    ) -> None:
        slicer.fill(name, parameter, draw, axis, parts)
        done.add(id(parameter))

    def fill_mlp(prefix: str, fc1: Tensor, fc2: Tensor, slicer: Slicer = tensor) -> None:
        half = fc1.shape[0] // 2
        fill(prefix + "fc1", fc1, normal, parts={"gate": half, "up": half}, slicer=slicer)
        fill(prefix + "fc2", fc2, residual, axis=1, slicer=slicer)

    def fill_layer(prefix: str, layer: Any) -> None:
        mixer: OryxMixer = layer.self_attention
        own = mixer.model  # with the modes of this layer
        for weight, parts in mixer.in_proj_weights():  # separate queries are drawn like rows of in_proj
            fill(prefix + "in_proj", weight, normal, parts=parts)
        fill(prefix + "out_proj", mixer.out_proj.weight, residual, axis=1)
        if model.conv_width:
            bound = 1 / math.sqrt(model.conv_width)
            fill(prefix + "conv", mixer.conv.weight, _uniform(-bound, bound), parts=mixer.conv_parts)
        if own.has_recurrence:
            fill(prefix + "decay_proj", mixer.decay_proj.weight, normal, parts=mixer.decay_parts)
            fill(prefix + "a_log", mixer.a_log, decay_draw(model))
            fill(prefix + "dt_bias", mixer.dt_bias, bias_draw(model))
            if model.mixer == "mamba2":
                fill(prefix + "d", mixer.d, _ones)
        if not isinstance(layer.mlp, MoELayer):
            fill_mlp(prefix, layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight)
            return
        fill(prefix + "router", layer.mlp.router.weight, router, axis=None)
        if layer.mlp.shared_experts is not None:
            shared = layer.mlp.shared_experts
            fill_mlp(prefix + "shared_experts.", shared.linear_fc1.weight, shared.linear_fc2.weight)
        for number, fc1, fc2 in expert_weights(layer.mlp):
            fill_mlp(f"{prefix}experts.{number}.", fc1, fc2, experts)
            # Reduced over the ranks that hold this expert, and updated by an optimizer of its own, under every layout:
            # megatron-core marks them so where parallel.expert is above 1 only, and checkpoints would differ.
            fc1.allreduce = fc2.allreduce = False  # type: ignore[attr-defined]

    if hasattr(chunk, "embedding"):
        fill("embedding", chunk.embedding.word_embeddings.weight, table)
    if getattr(chunk, "output_layer", None) is not None and chunk.output_layer.weight is not None:
        fill("embedding" if model.tie_embeddings else "output_layer", chunk.output_layer.weight, table)
    for layer in chunk.decoder.layers:
        fill_layer(f"layers.{layer.layer_number}.", layer)
    for number, head in enumerate(heads(chunk)):
        fill(f"mtp.{number}.eh_proj", head.eh_proj.weight, normal)
        fill_layer(f"mtp.{number}.", head.layer)
    for name, parameter in chunk.named_parameters():
        if name.endswith("final_layernorm.weight"):
            fill(name, parameter, lambda *a: _ones(*a) / model.width_multiplier, axis=None)
        elif "norm" in name and parameter.dim() == 1:
            fill(name, parameter, _ones, axis=None)
        elif id(parameter) not in done:
            raise KeyError(f"no initialisation rule for parameter {name}")


class Slicer:
    """Draws whole tensors and keeps this rank's slice among those of a group; without one, all of it."""

    def __init__(self, group: torch.distributed.ProcessGroup | None, seed: int) -> None:
        self.size, self.rank, self.seed = (group.size(), group.rank(), seed) if group is not None else (1, 0, seed)

    def fill(self, name: str, parameter: Tensor, draw: Draw, axis: int | None, parts: dict[str, int] | None) -> None:
        """Draw the whole tensor `name`, or each of its parts along axis 0, and copy this rank's share."""
        if axis is not None:
            # As megatron-core's own initialisation would, which is off: without these marks the gradient norm would
            # count the shards of one tensor-parallel rank only.
            marks = {"tensor_model_parallel": True, "partition_dim": axis, "partition_stride": 1}
            for mark, value in marks.items():
                setattr(parameter, mark, value)
        if parameter.is_meta:
            return
        shares = []
        for part, rows in (parts or {"": parameter.shape[0]}).items():
            shape = [rows, *parameter.shape[1:]]
            if axis is not None:
                shape[axis] *= self.size
            whole = draw(tuple(shape), generator_of(f"{self.seed}:{name}:{part}", parameter.device))
            shares.append(whole if axis is None else whole.chunk(self.size, dim=axis)[self.rank])
        values = torch.cat(shares)
        parameter.copy_(values)  # in one piece, as weights kept in FP8 need it
        if hasattr(parameter, "get_high_precision_init_val"):  # a weight kept in FP8
            compat.transformer_engine.begin_at(parameter, values)


def generator_of(text: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a text."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal_draw(std: float) -> Draw:
    """Draw from a normal distribution of mean 0 and this standard deviation."""
    return lambda shape, generator: torch.empty(shape, device=generator.device).normal_(0, std, generator=generator)


def decay_draw(model: ModelConfig) -> Draw:
    """Draw a_log: A = exp(a_log) is uniform in `decay_init`."""
    return lambda *a: _uniform(*model.decay_init)(*a).log()


def bias_draw(model: ModelConfig) -> Draw:
    """Draw dt_bias: softplus(dt_bias) is log-uniform in `dt_init`."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        dt = _uniform(*map(math.log, model.dt_init))(shape, generator).exp()
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus

    return draw


def _uniform(low: float, high: float) -> Draw:
    return lambda shape, generator: torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator)


def _ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape, device=generator.device)
