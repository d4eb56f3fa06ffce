"""megatron-core's own models, for the engine that Oryx trains with: the other side of the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from oryx_megatron import arch, compat, parallel, platform
from oryx_megatron.compat.transformer_engine import accumulate_into_main_gradients
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.model.config import transformer_config
from oryx_megatron.model.experts import expert_weights
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
    return _chunks(run, _config(run), (lambda *_: _te_layers()) if platform.has_gpu() else _local_layers)


def gdn_chunks(run: RunConfig, *, fused: bool = True) -> list[torch.nn.Module]:
    """This rank's stages of megatron-core's own hybrid by layer: its GatedDeltaNet where `run.model` is recurrent.

    Heads, widths, the gate and the norms of attention, experts and their layers are those of `run.model`, a hybrid of
    GDN. Its layers are what megatron-core gives for `experimental_attention_variant`, as Qwen3-Next is trained there.

    Args:
        run: What Oryx would train.
        fused: With megatron-core's fused permutation of tokens and fused router; else experts as Oryx's are set.

    Raises:
        ConfigError: no such hybrid, or not of its size.
    """
    model, gpu = run.model, platform.has_gpu()
    if model.mixer != "gdn" or not model.ignores_plans:
        raise ConfigError(f"{model.name}: mcore-gdn takes its shape from a hybrid of gdn, as 1.4b-gdn-hybrid")
    fusions = {"moe_permute_fusion": True, "moe_router_fusion": True} if gpu and fused and model.moe else {}
    config = _config(
        run,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[int(mode == "recurrent") for mode in model.layer_modes],
        linear_conv_kernel_dim=model.conv_width,
        linear_key_head_dim=model.qk_head_dim,
        linear_value_head_dim=model.v_head_dim,
        linear_num_key_heads=model.num_heads,
        linear_num_value_heads=model.num_heads,
        attention_output_gate=model.output_gate,
        qk_layernorm=model.qk_norm,
        deterministic_mode=not gpu,
        **fusions,
    )
    chunks = _chunks(run, config, _te_hybrid_layers if gpu else _local_layers)
    _check_size(run, chunks)
    return chunks


def _chunks(run: RunConfig, config: Any, layers: Callable[[Any, int | None], Any]) -> list[torch.nn.Module]:
    """`layers`: spec of a stage's layers, from the config and the virtual stage."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    model, stages = run.model, run.parallel.virtual_pipeline
    chunks = []
    for stage in range(stages):
        virtual = stage if stages > 1 else None
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=layers(config, virtual),
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
        if platform.has_gpu():
            accumulate_into_main_gradients(chunk)
        chunks.append(chunk)
    return chunks


WITHIN = 0.02
"""Of Oryx's parameters that a hybrid of megatron-core may differ by."""


def _check_size(run: RunConfig, chunks: list[torch.nn.Module]) -> None:
    """Print how many parameters the model has beside Oryx's; ConfigError where it is another size."""
    split = run.parallel
    if split.pipeline > 1:
        return
    count = 0
    for name, parameter in chunks[0].named_parameters():
        ranks = split.tensor if getattr(parameter, "tensor_model_parallel", False) else 1
        count += parameter.numel() * (split.expert if ".experts." in name else ranks)
    own = arch.parameter_counts(run.model).total
    text = f"mcore-gdn: {count:,} parameters, {count / own - 1:+.2%} of {run.model.name}'s {own:,}"
    if abs(count / own - 1) > WITHIN:
        raise ConfigError(f"{text}: no comparison beyond {WITHIN:.0%}")
    if parallel.is_main_rank():
        print(text, flush=True)


def _remembering(rotary: Any) -> Any:
    """Its forward with a cache of its own.

    megatron-core's belongs to the class and keeps the module for good; under overlap its hook holds the wrapper of the
    model, so every GPT of a process would stay in memory with gradients and optimizer.
    """
    return lru_cache(maxsize=32)(partial(type(rotary).forward.__wrapped__, rotary))


def _te_layers() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec()


def _te_hybrid_layers(config: Any, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

    return specs.get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage)


def _local_layers(config: Any, vp_stage: int | None) -> Any:
    """Layers without TransformerEngine, with the norm and the attention that know sequence and context parallelism."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first, count = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage)
    recurrent = getattr(config, "linear_attention_freq", None) or [0] * config.num_layers
    experts = [config.num_moe_experts is not None and config.oryx.moe.in_layer(i) for i in range(config.num_layers)]
    kinds = list(zip(recurrent, experts, strict=True))
    layers = {kind: _local_layer(config, *kind) for kind in set(kinds)}
    return TransformerBlockSubmodules([layers[kind] for kind in kinds[first : first + count]], layer_norm=RMSNorm)


def _local_layer(config: Any, recurrent: int, experts: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        normalization="RMSNorm",
        qk_layernorm=config.qk_layernorm,
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if recurrent:
        layer.submodules.self_attention = _local_delta_net()
        return layer
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = LocalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def _local_delta_net() -> Any:
    """megatron-core's GatedDeltaNet without FLA: deterministic, it takes torch's convolution and recurrence."""
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    for module in {sys.modules[kind.__module__] for kind in GatedDeltaNet.__mro__}:
        if hasattr(module, "HAVE_FLA"):
            module.HAVE_FLA, module.l2norm = True, _unit  # type: ignore[attr-defined]
    submodules = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear)
    return ModuleSpec(module=GatedDeltaNet, submodules=submodules)


def _unit(x: Tensor) -> Tensor:
    return x * (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)


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
                if ".experts." not in name:
                    _draw(slicer, f"layers.{layer.layer_number}.{name}", parameter, _parts(layer, name, parameter))
            if isinstance(layer.mlp, MoELayer):
                for number, *weights in expert_weights(layer.mlp):
                    for name, parameter in zip(("linear_fc1.weight", "linear_fc2.weight"), weights):
                        full = f"layers.{layer.layer_number}.experts.{number}.{name}"
                        _draw(Slicer(None, run.seed), full, parameter, _parts(layer, name, parameter))
                        parameter.allreduce = False  # type: ignore[attr-defined]  # as those of Oryx
        for name, parameter in chunk.named_parameters():
            if ".layers." not in name:
                _draw(slicer, "embedding" if parameter.dim() > 1 else name, parameter, None)


def _parts(layer: Any, name: str, parameter: Tensor) -> dict[str, int] | None:
    """Rows of this rank by part, of weights that hold several."""
    if name.endswith("linear_fc1.weight"):
        return dict.fromkeys(("gate", "up"), parameter.shape[0] // 2)
    if name.endswith(("in_proj.weight", "conv1d.weight")):
        mixer = layer.self_attention
        keys, values, heads = (n // mixer.tp_size for n in (mixer.qk_dim, mixer.v_dim, mixer.num_value_heads))
        convolved = {"query": keys, "key": keys, "value": values}
        gates = {"gate": values, "beta": heads, "alpha": heads}
        return convolved if "conv1d" in name else convolved | gates
    return None


def _draw(slicer: Slicer, name: str, parameter: Tensor, parts: dict[str, int] | None) -> None:
    if parameter.dim() == 1:
        parameter.fill_(2.0 if name.endswith("A_log") else 1.0)  # within megatron-core's range, A of 1 to 16
        return
    axis = int(name.endswith(("linear_proj.weight", "out_proj.weight", "fc2.weight")))
    std = 0.3 if name.endswith("conv1d.weight") else 0.02
    slicer.fill(name, parameter, normal_draw(std), None if name.endswith("router.weight") else axis, parts)


def gpt_engine(run: RunConfig) -> MegatronEngine:
    """`peer_engine` of a GPT; modes do not concern it."""
    return peer_engine(run, gpt_chunks(run))


def gdn_engine(run: RunConfig, *, fused: bool = True) -> MegatronEngine:
    """`peer_engine` of `gdn_chunks`; mode plans do not concern it."""
    return peer_engine(run, gdn_chunks(run, fused=fused))


ENGINES: dict[str, Callable[[RunConfig], MegatronEngine]] = {
    "gpt": gpt_engine,
    "mcore-gdn": gdn_engine,
    "mcore-gdn-plain": partial(gdn_engine, fused=False),
}
"""megatron-core's models by their name in the tables."""


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
