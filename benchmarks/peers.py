"""megatron-core's own models, for the engine that Oryx trains with: the other side of the benchmarks."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.model.config import transformer_config
from oryx_megatron.train.engine import MegatronEngine
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
    get_model_config(engine.chunks[0]).finalize_model_grads_func = finalize_model_grads
    return engine


def gpt_chunks(run: RunConfig) -> list[torch.nn.Module]:
    """This rank's stages of megatron-core's GPT, with TransformerEngine and every fusion it offers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    model = run.model
    config = transformer_config(
        model,
        run.parallel,
        run.precision,
        fused_mixer=False,
        use_te_activation_func=False,
        bias_activation_fusion=True,
        apply_rope_fusion=True,
    )
    stages = run.parallel.virtual_pipeline
    chunks = []
    for stage in range(stages):
        virtual = stage if stages > 1 else None
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
            vocab_size=model.vocab_size,
            max_sequence_length=run.data.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
            vp_stage=virtual,
        )
        chunks.append(finish(chunk))
    return chunks


def gpt_engine(run: RunConfig) -> MegatronEngine:
    """`peer_engine` of a GPT; modes do not concern it."""
    return peer_engine(run, gpt_chunks(run))


def finish(model: torch.nn.Module) -> torch.nn.Module:
    """What megatron-core's initialisation would do, and the weight gradients where Oryx puts them too."""
    from oryx_megatron.compat.transformer_engine import accumulate_into_main_gradients

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            elif "norm" in name:
                parameter.fill_(1.0)
    accumulate_into_main_gradients(model)
    return model
