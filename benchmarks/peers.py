"""megatron-core's own models, for the engine that Oryx trains with: the other side of the benchmarks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from oryx_megatron import compat, platform
from oryx_megatron.compat.transformer_engine import accumulate_into_main_gradients
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.model.config import transformer_config
from oryx_megatron.model.initialize import Slicer, normal_draw
from oryx_megatron.model.parts import RMSNorm
from oryx_megatron.train.engine import MegatronEngine
from oryx_megatron.train.optimizer import connect
from oryx_megatron.train.step import Microbatch, sum_loss


class GptProgram:
    """How megatron-core's own models run a microbatch (see oryx_megatron.train.step.Program)."""

    def shape(self, batch: Microbatch) -> Hashable:
        return batch.tokens.shape

    def parts(self, batch: Microbatch) -> frozenset[str]:
        return frozenset()

    def place(self, batch: Microbatch, chunk: torch.nn.Module) -> list[Tensor]:
        return [platform.to_device(x) for x in (batch.tokens, batch.labels, batch.loss_mask)]

    def refill(self, placed: list[Tensor], batch: Microbatch) -> None:
        for target, source in zip(placed, (batch.tokens, batch.labels, batch.loss_mask)):
            target.copy_(source.pin_memory(), non_blocking=True)

    def forward(self, placed: list[Tensor], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        tokens, labels, mask = placed
        ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        if ranks > 1:  # megatron-core's order: halves of the sequence from both ends, so that causal work is even
            tokens, labels, mask = (
                torch.cat((x.chunk(2 * ranks, 1)[rank], x.chunk(2 * ranks, 1)[-rank - 1]), 1) for x in placed
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return chunk(tokens, positions, None, labels=labels), partial(sum_loss, mask, 0.0)


def peer_engine(run: RunConfig, model: list[Any]) -> MegatronEngine:
    """The engine of Oryx runs around a model of megatron-core's, with the update that megatron-core gives it."""
    engine = MegatronEngine(run, model=model, program=GptProgram())
    engine.fused_update = None
    connect(run, engine.chunks, engine.optimizer)
    return engine


def _config(run: RunConfig, **changes: Any) -> Any:
    """Of megatron-core's own layers, with every fusion it offers on a GPU."""
    gpu = platform.has_gpu()
    fusions = {"fused_mixer": False, "use_te_activation_func": False}
    fusions |= {"bias_activation_fusion": gpu, "apply_rope_fusion": gpu}
    return transformer_config(run.model, run.parallel, run.precision, **fusions, **changes)


def gpt_chunks(run: RunConfig) -> list[torch.nn.Module]:
    """This rank's stages of megatron-core's GPT, with TransformerEngine and every fusion it offers.

    Without a GPU the layers are megatron-core's own: no peer to measure, but all of the path that is not a kernel.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    model, gpu, config = run.model, platform.has_gpu(), _config(run)
    stages = run.parallel.virtual_pipeline
    chunks = []
    for stage in range(stages):
        virtual = stage if stages > 1 else None
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_te_layers() if gpu else _local_layers(config, virtual),
            vocab_size=model.vocab_size,
            max_sequence_length=run.data.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
            vp_stage=virtual,
        )
        chunk.rotary_pos_emb.forward = _remembering(chunk.rotary_pos_emb)
        _fill(chunk, run)
        if gpu:
            accumulate_into_main_gradients(chunk)
        chunks.append(chunk)
    return chunks


def _remembering(rotary: Any) -> Any:
    """Its forward with a cache of its own.

    megatron-core's belongs to the class and keeps the module for good; under overlap its hook holds the wrapper of the
    model, so every GPT of a process would stay in memory with gradients and optimizer.
    """
    return lru_cache(maxsize=32)(partial(type(rotary).forward.__wrapped__, rotary))


def _te_layers() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec()


def _local_layers(config: Any, vp_stage: int | None) -> Any:
    """Layers without TransformerEngine, with the norm and the attention that know sequence and context parallelism."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = LocalAttention
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)


class LocalAttention(torch.nn.Module):
    """Causal attention of whole heads in torch, for ranks that hold halves of the sequence from both of its ends."""

    def __init__(self, config: Any, layer_number: int, **unused: Any) -> None:
        super().__init__()
        self.group = parallel_state.get_context_parallel_group()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **ignored: Any) -> Tensor:
        """[s/c, b, heads, width] of each → [s/c, b, heads · width]; c context-parallel ranks."""
        ranks, rank, half = self.group.size(), self.group.rank(), query.shape[0] // 2
        if ranks > 1:
            places = [place for other in range(ranks) for place in (other, 2 * ranks - 1 - other)]
            order = torch.tensor(places).argsort()
            key, value = (
                torch.cat(all_gather(x.contiguous(), self.group)).unflatten(0, (2 * ranks, -1))[order].flatten(0, 1)
                for x in (key, value)
            )
            rows = torch.cat([torch.arange(half) + place * half for place in (rank, 2 * ranks - 1 - rank)])
        else:
            rows = torch.arange(query.shape[0])
        mask = torch.arange(key.shape[0]) <= rows[:, None]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def _fill(chunk: Any, run: RunConfig) -> None:
    """Draw each weight from its name, as those of Oryx: equal under every layout, tied embeddings on both ends too."""
    slicer = Slicer(parallel_state.get_tensor_model_parallel_group(), run.seed)
    with torch.no_grad():
        for layer in chunk.decoder.layers:
            for name, parameter in layer.named_parameters():
                parts = None
                if name.endswith("linear_fc1.weight"):
                    parts = dict.fromkeys(("gate", "up"), parameter.shape[0] // 2)
                _draw(slicer, f"layers.{layer.layer_number}.{name}", parameter, parts)
        for name, parameter in chunk.named_parameters():
            if ".layers." not in name:
                _draw(slicer, "embedding" if parameter.dim() > 1 else name, parameter, None)


def _draw(slicer: Slicer, name: str, parameter: Tensor, parts: dict[str, int] | None) -> None:
    if parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        slicer.fill(name, parameter, normal_draw(0.02), int(name.endswith(("linear_proj.weight", "fc2.weight"))), parts)


def gpt_engine(run: RunConfig) -> MegatronEngine:
    """`peer_engine` of a GPT; modes do not concern it."""
    return peer_engine(run, gpt_chunks(run))


def hybrid_chunks(run: RunConfig, mixers: Sequence[str], stack: Any = None) -> list[torch.nn.Module]:
    """megatron-core's hybrid on one rank: for each of `mixers`, M (Mamba-2) or * (attention), that mixer and an MLP.

    Args:
        stack: Spec of its layers; None: megatron-core's, with TransformerEngine and mamba_ssm.
    """
    model, gpu, config = run.model, platform.has_gpu(), _config(run, num_layers=2 * run.model.num_layers)
    chunk = compat.megatron.hybrid_model(
        "".join(f"{mixer}-" for mixer in mixers),
        stack,
        config=config,
        vocab_size=model.vocab_size,
        max_sequence_length=run.data.sequence_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope" if "*" in mixers else "none",
    )
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(1, 16).log_()
            elif "conv1d" in name:
                parameter.uniform_(-0.5, 0.5)
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            elif "norm" in name:
                parameter.fill_(1.0)  # dt_bias and D stay as their module gave them
    if gpu:
        accumulate_into_main_gradients(chunk)
    return [chunk]
