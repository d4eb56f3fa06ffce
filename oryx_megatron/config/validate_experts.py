"""Checks of mixture of experts: inside a model, within a layout, and together with the rest of a run."""

from __future__ import annotations

from oryx_megatron.config.schema import ModelConfig, MoEConfig, ParallelConfig, RunConfig
from oryx_megatron.errors import ConfigError


def check_experts(model: ModelConfig) -> None:
    """Checks across the fields of model.moe; ConfigError names the field."""
    moe = model.moe
    if moe is None:
        return
    if moe.top_k > moe.experts:
        raise ConfigError(f"model.moe.top_k: {moe.top_k} is more than model.moe.experts {moe.experts}")
    if not model.expert_layers:
        raise ConfigError(
            f"model.moe.first_dense: {moe.first_dense} leaves none of the {model.num_layers} layers with experts; "
            "lower it, or set model.moe: null"
        )
    if moe.bias_update_rate and moe.score != "sigmoid":
        raise ConfigError(
            f"model.moe.bias_update_rate: {moe.bias_update_rate} needs model.moe.score sigmoid; use that, or aux_loss"
        )


def check_expert_layout(moe: MoEConfig | None, parallel: ParallelConfig, data: int) -> None:
    """Whether `parallel` can hold the experts with this data-parallel size; ConfigError with the factors at fault."""
    expert = parallel.expert
    if moe is None:
        if expert > 1:
            raise ConfigError(f"parallel.expert: {expert}, but the model has no experts (model.moe: null); use 1")
        return
    if moe.experts % expert:
        raise ConfigError(f"model.moe.experts {moe.experts} is not divisible by expert {expert} (parallel.expert)")
    if moe.shared_ffn_hidden_size % parallel.tensor:
        raise ConfigError(
            f"model.moe.shared_ffn_hidden_size {moe.shared_ffn_hidden_size} is not divisible by tensor "
            f"{parallel.tensor}"
        )
    ranks = parallel.tensor * parallel.context * data
    if ranks % expert:
        raise ConfigError(
            f"parallel.expert {expert} does not divide tensor {parallel.tensor} × context {parallel.context} × data "
            f"{data} = {ranks}"
        )


def check_expert_stages(moe: MoEConfig | None, layers: list[list[int]]) -> None:
    """Whether every pipeline rank holds experts, whose optimizer state each of them saves and loads.

    Args:
        moe: The experts.
        layers: Numbers from 0 of the layers of every pipeline rank.
    """
    for rank, own in enumerate(layers):
        if moe is not None and not any(map(moe.in_layer, own)):
            raise ConfigError(
                f"parallel.pipeline: stage {rank} would have no layer with experts (model.moe.first_dense "
                f"{moe.first_dense}, frequency {moe.frequency}); use fewer stages or lower model.moe.first_dense"
            )


def check_expert_run(run: RunConfig) -> None:
    """What experts do not work with; one ConfigError line each."""
    if run.model.moe is None:
        return
    if run.engine != "megatron":
        raise ConfigError(f"model.moe: not with engine {run.engine}; set engine: megatron")
    if run.parallel.tensor > 1 and not run.parallel.sequence:
        raise ConfigError(
            f"parallel.sequence: false with experts and tensor {run.parallel.tensor} would route every token on every "
            "tensor-parallel rank; set it to true"
        )
    if run.optimizer.cpu_offload:
        raise ConfigError("optimizer.cpu_offload: not with experts (model.moe); set it to false")


def expert_widths(moe: MoEConfig | None, tensor: int) -> dict[str, int]:
    """Widths of the products of experts on a rank, by what the config calls them."""
    if moe is None:
        return {}
    shared = moe.shared_ffn_hidden_size
    return {
        "model.moe.ffn_hidden_size": moe.ffn_hidden_size,
        f"model.moe.shared_ffn_hidden_size {shared} / tensor {tensor}": shared // tensor,
    }
