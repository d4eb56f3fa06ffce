"""Build the model of this rank."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from oryx_megatron.arch import parameter_counts
from oryx_megatron.compat.transformer_engine import accumulate_into_main_gradients
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from oryx_megatron.model.config import OryxTransformerConfig, transformer_config
from oryx_megatron.model.initialize import initialize_weights
from oryx_megatron.model.logits import OryxGPTModel
from oryx_megatron.model.spec import block_spec, mtp_block_spec
from oryx_megatron.platform import memory


def build_chunk(
    config: OryxTransformerConfig, *, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
) -> OryxGPTModel:
    """One pipeline stage (or virtual stage) as a kind of megatron-core's GPTModel, with uninitialised weights.

    The mixer applies its own rotary embedding, so GPTModel gets no position embedding and no sequence limit.
    """
    model = config.oryx
    if model is None:
        raise ValueError("build_chunk needs config.oryx, the architecture")
    return OryxGPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, vp_stage=vp_stage),
        vocab_size=model.vocab_size,
        max_sequence_length=0,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="none",
        mtp_block_spec=mtp_block_spec(config) if post_process else None,
        vp_stage=vp_stage,
    )


def build_model(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, *, seed: int, z_loss: float = 0.0
) -> list[OryxGPTModel]:
    """All chunks of this pipeline rank (one unless stages are virtual), with the weights of `seed`.

    `z_loss` is the weight of that penalty in training.

    Raises:
        ConfigError: its share of the weights is more than all of this machine's memory.
    """
    counts = parameter_counts(model)
    experts = sum(part.count for part in counts.parts if part.name == "experts")
    own = (counts.total - experts) // parallel.tensor + experts // parallel.expert
    memory.check(
        f"model {model.name}: its {counts.total:,} parameters",
        own * (4 if precision.dtype == "fp32" else 1 if precision.fp8_params else 2) // parallel.pipeline,
        memory.device_bytes(),
        "use a smaller model, or more ranks of parallel.tensor or parallel.pipeline",
    )
    config = transformer_config(model, parallel, precision, z_loss=z_loss)
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else [None]
    chunks = []
    for stage in stages:
        chunk = build_chunk(
            config,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
            vp_stage=stage,
        )
        initialize_weights(chunk, model, seed)
        if config.te_linears:
            accumulate_into_main_gradients(chunk)
        chunks.append(chunk)
    return chunks


def build_meta(model: ModelConfig) -> OryxGPTModel:
    """The whole model without storage, to count and name its parameters."""
    config = transformer_config(model, ParallelConfig(), PrecisionConfig(dtype="fp32"), use_cpu_initialization=True)
    with torch.device("meta"):
        return build_chunk(config)
