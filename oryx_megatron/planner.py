"""Which layouts fit a model on a number of GPUs, what memory and communication each takes, and how fast it should be.

Arithmetic only, from the model's shapes and the kernels that a GPU runs (model/mixer.py with TransformerEngine's
linears). Constants of speed are in planner_costs.py; how far they are from what was measured stands in
docs/parallelism.md.

Letters: d hidden size, f SwiGLU width, H query heads, G key/value heads, N key width, P value width, V vocabulary,
t tensor-, c context-, p pipeline-, n data-parallel size, a share of attention tokens. Experts (E of width f, of which a
token takes k) are not cut by t but shared out over e ranks of t c n; of them only what the host needs was fitted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

from oryx_megatron.arch import Share, flops_per_token, kinds, mtp_flops_per_token, parameter_counts, share_of_heads
from oryx_megatron.config.schema import (
    BatchStage,
    BlendEntry,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ModesConfig,
    ParallelConfig,
    Recompute,
    RunConfig,
    TrainConfig,
)
from oryx_megatron.config.validate import Layout, divisors, layout_for, uneven_first_stage
from oryx_megatron.errors import ConfigError
from oryx_megatron.planner_costs import COPY_TERABYTES, COSTS, MEMORY_GIB, PEAK, Costs

GIB = 2**30

OFFLOAD_BYTES = 16
"""Of host memory per parameter that a GPU owns, with `optimizer.cpu_offload`: weight, gradient and moments in fp32."""
USABLE = 0.95
"""Of a GPU's memory: the allocator needs some room."""
CONTEXT_GIB = 2.0
"""Memory that CUDA, NCCL and kernels take outside of torch's allocator."""
GRAPHS_GIB = 2.5
"""What the pool of captured graphs holds beyond a launched microbatch: measured 1 to 4 GiB, 1.4 B on one GPU."""


@dataclass(frozen=True)
class Cluster:
    """GPUs, all alike."""

    gpus: int
    memory_gib: float = 141.0
    """Of one GPU."""
    gpus_per_node: int = 8
    node_gbps: float = 260.0
    """GB/s that NCCL sends from one GPU to others of its node: benchmarks/links.py on two H200 (450 on paper)."""
    network_gbps: float = 50.0
    """GB/s that NCCL sends from one GPU to other nodes; not measured here (400 Gbit/s on paper)."""
    tflops: float = 989.0
    """Peak of one GPU in bf16, TFLOP/s."""
    copy_tbps: float = COPY_TERABYTES["h200"]
    """TB/s that one GPU copies."""

    @classmethod
    def of(cls, card: str, gpus: int) -> Cluster:
        """GPUs of a kind that was measured (`planner_costs.MEMORY_GIB`)."""
        return cls(gpus, MEMORY_GIB[card], copy_tbps=COPY_TERABYTES[card])


@dataclass(frozen=True)
class Work:
    """What a step trains on, and how."""

    sequence: int
    batch: int
    """Sequences per step over all GPUs."""
    attention_share: Share = 0.5
    """Of the tokens, on average; or layer by layer."""
    ramp: tuple[int, ...] = ()
    """Other batch sizes that a layout must take as well (train.batch_schedule)."""
    ema: bool = False
    """Whether an average of the weights is kept (train.ema)."""
    muon: bool = False
    """Whether Muon updates the matrices (optimizer.name); their state has one number where AdamW's has two."""
    cpu_offload: bool = False
    """Whether the optimizer's state is on the host (optimizer.cpu_offload)."""
    graphs: bool = True
    """Whether microbatches are replayed as CUDA graphs where they can be (kernels.graphs)."""
    fp8: str = "none"
    """precision.fp8"""


@dataclass(frozen=True)
class Estimate:
    """One layout: memory of its fullest GPU, and a step's time."""

    layout: Layout
    micro_batch: int
    recompute: Recompute
    memory: dict[str, float]
    """Bytes by item."""
    traffic: dict[str, float]
    """Bytes that one GPU sends per step, by kind of parallelism."""
    seconds: dict[str, float]
    """Of a step, by cause; they add up."""
    bubble: float
    """Idle share of the pipeline."""
    tokens: int
    """Per step."""
    host: float
    """Bytes of host memory for each GPU of the fullest stage, where the optimizer's state is kept there."""

    @property
    def gib(self) -> float:
        """Memory in all."""
        return sum(self.memory.values()) / GIB

    @property
    def step_seconds(self) -> float:
        """Time of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.tokens / self.step_seconds

    @property
    def first_stage(self) -> int | None:
        """Layers of the first stage where it differs from the others."""
        layers = self.layout.stage_layers
        return layers[0] if layers[0] != layers[-1] else None

    def name(self) -> str:
        """In words."""
        layout = self.layout
        virtual = f"·{layout.vpp}" if layout.vpp > 1 else ""
        expert = f" ep {layout.ep}" if layout.ep > 1 else ""
        return f"tp {layout.tp} pp {layout.pp}{virtual} cp {layout.cp} dp {layout.dp}{expert}"


def activation_bytes(model: ModelConfig, layout: Layout, share: Share, stage: int | None = None) -> dict[str, float]:
    """Bytes that one token of a rank's sequence shard leaves in one layer for the backward pass, by item (bf16).

    `share` is of attention tokens; a mode that no token is in costs nothing. Where layers differ: the mean of all, or
    of those of a pipeline stage.
    """
    numbers = range(model.num_layers) if stage is None else layout.layers(stage)
    found = kinds(model, numbers, share)
    total = sum(kind.layers for kind in found)
    mean = _mlp_bytes(model, layout, _expert_layers(model, numbers) / total)
    for kind in found:
        for name, size in _activation_bytes(kind.model, layout, kind.share).items():
            mean[name] = mean.get(name, 0.0) + size * (kind.layers / total)
    return mean


def _activation_bytes(model: ModelConfig, layout: Layout, share: float) -> dict[str, float]:
    """The same of one layer that has the model's modes."""
    d, tp = model.hidden_size, layout.tp
    heads, keys = model.num_heads, model.kv_heads * model.qk_head_dim
    values, queries, outputs = model.kv_heads * model.v_head_dim, heads * model.qk_head_dim, heads * model.v_head_dim
    attends, recurs = share > 0, share < 1
    gate = outputs if model.output_gate else 0
    logits = (1 if model.mixer == "mamba2" else 2) * heads * recurs
    items = {
        # Residual stream and normed input, before the mixer and before the MLP; sharded by sequence parallelism.
        "block inputs": 8.0 * d / tp + (2.0 * d if tp > 1 else 0.0),
        "projections": 2.0 * (keys + values + gate + queries + logits) / tp,
        "keys and values": 2.0 * (keys * (attends + recurs) + values) / tp,
        "attention": (share * (2.0 * queries + 2.0 * outputs + 4.0 * heads)) / tp,
        "recurrence": recurs * (2.0 * queries + 2.0 * outputs + _recurrence_bytes(model)) / tp,
        "mixer output": 2.0 * outputs / tp,
    }
    if layout.cp > 1:  # keys and values before it, because they lie beside the gate; and outputs after it
        items["context exchange"] = 2.0 * (keys + values + outputs) / tp
    return items


def _expert_layers(model: ModelConfig, layers: Iterable[int]) -> int:
    """How many of these layers, by number from 0, have experts."""
    return 0 if model.moe is None else sum(map(model.moe.in_layer, layers))


def _mlp_bytes(model: ModelConfig, layout: Layout, experts: float) -> dict[str, float]:
    """`activation_bytes` behind the mixer, where a share `experts` of the layers has experts."""
    width = (1 - experts) * 2.0 * model.ffn_hidden_size / layout.tp
    items = {"mlp": 2 * width, "swiglu": width}  # both halves of its input, and its output
    if experts and (moe := model.moe) is not None:
        # A sorted copy of the input, one that arrives at the expert and its output; both halves and SwiGLU between.
        one = 2.0 * (3 * model.hidden_size + 3 * moe.ffn_hidden_size)
        router = 4.0 * 3 * moe.experts  # logits, weights and losses in fp32
        items["experts"] = experts * (moe.top_k * one + router + 6.0 * moe.shared_ffn_hidden_size) / layout.tp
    return items


def _recurrence_bytes(model: ModelConfig) -> float:
    """What the scan keeps besides queries, keys, values and outputs: gates in fp32, and GDN's 64 × 64 matrices."""
    return model.num_heads * (2.0 * 64 + 8.0 if model.mixer == "gdn" else 8.0)


IN_MIXER = ("keys and values", "attention", "recurrence", "context exchange")
"""Items that `mixer` recomputes beside SwiGLU's output; `full` keeps the block's input alone."""


def _keeps_swiglu(work: Work, recompute: Recompute) -> bool:
    """Whether SwiGLU's output stays for the backward pass; in FP8 as two narrow copies, whatever `recompute` says."""
    return recompute == "none" or work.fp8 != "none"


def _replays(model: ModelConfig, work: Work) -> bool:
    """Whether microbatches are replayed as graphs, as engine.why_launched says."""
    return work.graphs and model.moe is None and work.fp8 != "mxfp8"


def _kept(
    model: ModelConfig, layout: Layout, work: Work, recompute: Recompute, stage: int
) -> tuple[dict[str, float], float]:
    """Bytes kept per token and layer of a stage, by item, and those of the one layer that is recomputed at a time.

    One layer's output of SwiGLU is counted with the gradients beside it.
    """
    items = activation_bytes(model, layout, work.attention_share, stage)
    if not _keeps_swiglu(work, recompute):
        del items["swiglu"]
    kept = items
    if recompute == "full":
        kept = {"block inputs": 2.0 * model.hidden_size / layout.tp}
    elif recompute == "mixer":
        kept = {name: size for name, size in items.items() if name not in IN_MIXER}
    return kept, sum(items.values()) - sum(kept.values())


def expert_parameters(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Parameters of the experts of one GPU of a pipeline stage."""
    if model.moe is None:
        return 0.0
    one = 3.0 * model.hidden_size * model.moe.ffn_hidden_size
    return _expert_layers(model, layout.layers(stage)) * one * model.moe.experts / layout.ep


def parameters_per_gpu(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Parameters of one tensor-parallel rank of a pipeline stage, without its experts."""
    if model.moe is not None:  # blocks without experts, and what every rank has of the layers with some
        moe, layers = model.moe, layout.layers(stage)
        dense = dataclasses.replace(model, moe=None)
        count, d = _expert_layers(model, layers), model.hidden_size
        less = 3 * d * (model.ffn_hidden_size - moe.shared_ffn_hidden_size) / layout.tp - moe.experts * d
        return parameters_per_gpu(dense, layout, stage) - count * less
    plain = dataclasses.replace(model, mtp=None)
    blocks = sum(
        parameter_counts(kind.model).non_embedding * kind.layers / model.num_layers
        for kind in kinds(plain, layout.layers(stage))
    )
    if stage == layout.pp - 1 and model.mtp_layers:  # the last stage has the heads
        blocks += parameter_counts(model).of("mtp")
    return (blocks + _tables(model, layout, stage) * model.vocab_size * model.hidden_size) / layout.tp


def _tables(model: ModelConfig, layout: Layout, stage: int) -> int:
    """Embedding and output matrices of a pipeline stage."""
    first, last = stage == 0, stage == layout.pp - 1
    tables = first + last - (1 if first and last and model.tie_embeddings else 0)
    if last and model.mtp_layers:  # an embedding for the heads
        tables += not first and not model.tie_embeddings
    return tables


def _muon_bytes(model: ModelConfig, layout: Layout, stage: int, parameters: float, experts: float) -> float:
    """Optimizer state of the fullest GPU: 8 bytes a parameter, 12 in tables.

    A table, and an expert's first matrix, is at least the share of the GPU that owns it: none is cut.
    """
    table = model.vocab_size * model.hidden_size / layout.tp
    tables = _tables(model, layout, stage)
    dense = max(_owned(8 * parameters + 4 * tables * table, 0.0, layout), 12 * table if tables else 0.0)
    if model.moe is None or not experts:
        return dense
    return dense + max(_owned(0.0, 8 * experts, layout), 16.0 * model.hidden_size * model.moe.ffn_hidden_size)


def _owned(parameters: float, experts: float, layout: Layout) -> float:
    """Of a GPU's parameters and experts, those whose optimizer state it keeps."""
    ranks = layout.dp * layout.cp
    return parameters / ranks + experts * layout.ep / (layout.tp * ranks)


def in_flight(layout: Layout, stage: int) -> float:
    """Microbatches whose activations a stage holds at its fullest, in units of the whole stage."""
    if layout.vpp == 1:
        return min(layout.microbatches, layout.pp - stage)
    ahead = (layout.pp - stage - 1) * 2 + (layout.vpp - 1) * layout.pp + 1
    return min(layout.microbatches * layout.vpp, ahead) / layout.vpp


def memory_bytes(
    model: ModelConfig, layout: Layout, work: Work, micro_batch: int, recompute: Recompute, stage: int
) -> dict[str, float]:
    """Memory of a GPU of this pipeline stage by item: bf16 weights, fp32 gradients, sharded AdamW unless offloaded,
    or Muon; with FP8 beside them the weights of products and their transposes in FP8.
    """
    parameters, experts = parameters_per_gpu(model, layout, stage), expert_parameters(model, layout, stage)
    tokens = work.sequence // layout.cp * micro_batch
    kept, once = _kept(model, layout, work, recompute, stage)
    held = tokens * layout.stage_layers[stage] * in_flight(layout, stage)
    items = {
        "parameters": 2 * (parameters + experts),
        "gradients": 4 * (parameters + experts),
        "optimizer": 0.0 if work.cpu_offload else 12 * _owned(parameters, experts, layout),
    }
    if work.muon:
        items["optimizer"] = _muon_bytes(model, layout, stage, parameters, experts)
    if work.fp8 != "none":
        items["fp8 weights"] = 2 * (parameters + experts)
    if work.ema:
        items["average of weights"] = 4 * _owned(parameters, experts, layout)
    items |= {f"activations: {name}": size * held for name, size in kept.items()}
    if stage == layout.pp - 1:
        items["logits"] = 4.0 * model.vocab_size / layout.tp * tokens * (1 + model.mtp_layers)
        if model.mtp_layers:  # a layer each, and what their projections read
            one = dataclasses.replace(model.with_modes(model.mtp_modes), moe=None, mtp=None)
            each = activation_bytes(one, layout, share_of_heads(model, work.attention_share))
            if not _keeps_swiglu(work, recompute):
                del each["swiglu"]
            size = sum(each.values()) + 12.0 * model.hidden_size
            size = 4.0 * model.hidden_size / layout.tp if recompute == "full" else size
            items["activations: mtp heads"] = model.mtp_layers * size * tokens
    # Gradients of the widest step of a block, and the layer being recomputed.
    widest = 8.0 * model.ffn_hidden_size / layout.tp + 4.0 * model.hidden_size
    items["workspace"] = (widest + once) * tokens + CONTEXT_GIB * GIB
    if _replays(model, work) and recompute != "full":
        items["graphs"] = GRAPHS_GIB * GIB / layout.tp
    return items


def _collectives(recompute: Recompute) -> int:
    """Gathers and scatters of sequence parallelism a layer.

    4 forward, 4 backward, 1 to gather the MLP's input again (that of the mixer is kept).
    """
    return 9 + (4 if recompute == "full" else 0)


def _exchanges(recompute: Recompute) -> int:
    """How often a layer goes to heads and back under context parallelism."""
    return 2 if recompute in ("none", "swiglu") else 3


def _recurrent_layers(model: ModelConfig, attention_share: Share) -> int:
    """Layers whose recurrence runs under plans of this share."""
    return sum(k.layers for k in kinds(model, share=attention_share) if k.model.has_recurrence and k.share < 1)


def traffic_bytes(
    model: ModelConfig, layout: Layout, work: Work, micro_batch: int, recompute: Recompute
) -> dict[str, float]:
    """Bytes that one GPU sends per step, by kind."""
    tp, cp, tokens = layout.tp, layout.cp, work.sequence // layout.cp * micro_batch
    layers, passes = max(layout.stage_layers), layout.microbatches
    stream = 2.0 * model.hidden_size * tokens
    collectives = _collectives(recompute)
    recurs = _recurrent_layers(model, work.attention_share) / model.num_layers
    gates = (1 if model.mixer == "mamba2" else 2) * model.num_heads * recurs
    widths = model.kv_heads * (model.qk_head_dim + model.v_head_dim) + gates
    widths += model.num_heads * (model.qk_head_dim + model.v_head_dim)  # one query a token, and the outputs
    exchanges = _exchanges(recompute)
    ranks = layout.dp * cp
    parameters = max(parameters_per_gpu(model, layout, stage) for stage in range(layout.pp))
    experts = max(expert_parameters(model, layout, stage) for stage in range(layout.pp))
    copies = layout.tp * ranks / layout.ep
    tokens_sent = 0.0  # to experts and back, forward and backward
    if model.moe is not None:
        with_experts = max(_expert_layers(model, layout.layers(stage)) for stage in range(layout.pp))
        again = 3 if recompute == "full" else 2
        tokens_sent = 2 * again * stream / tp * model.moe.top_k * (layout.ep - 1) / layout.ep * with_experts * passes
    return {
        "tensor": collectives * stream * (tp - 1) / tp * layers * passes,
        "pipeline": 2 * stream / tp * passes * layout.vpp if layout.pp > 1 else 0.0,
        "context": exchanges * 2.0 * widths / tp * tokens * (cp - 1) / cp * layers * passes,
        "expert": tokens_sent,
        "data": 6.0 * (parameters * (ranks - 1) / ranks + experts * (copies - 1) / copies),
    }


def estimate(
    model: ModelConfig,
    cluster: Cluster,
    work: Work,
    layout: Layout,
    micro_batch: int,
    recompute: Recompute,
    *,
    costs: Costs = COSTS,
) -> Estimate:
    """Memory, traffic and time of one layout, by these constants of speed."""
    stages = [
        memory_bytes(model, layout, work, micro_batch, recompute, stage)
        for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1})  # an uneven first stage may be the smaller one
    ]
    traffic = traffic_bytes(model, layout, work, micro_batch, recompute)
    node, network = cluster.node_gbps * 1e9, cluster.network_gbps * 1e9

    def link(ranks: int) -> float:
        return node if ranks <= cluster.gpus_per_node else network

    # Of a microbatch on the slowest stage: what the GPU computes and sends, and what the host launches meanwhile.
    passes = max(layout.stage_layers)
    compute = _compute_seconds(model, cluster, work, layout, micro_batch, recompute, costs)
    steps = layout.microbatches
    tensor, context = traffic["tensor"] / link(layout.tp), traffic["context"] / link(layout.tp * layout.cp)
    collectives = _collectives(recompute) * passes if layout.tp > 1 else 0
    exchanges = 2 * _exchanges(recompute) * passes if layout.cp > 1 else 0
    tensor += costs.collective * collectives * steps
    context += costs.exchange * exchanges * steps
    expert = traffic["expert"] / link(layout.tp * layout.cp if layout.ep <= layout.tp * layout.cp else layout.ep)
    gpu = compute + (tensor + context + expert) / steps
    host = 0.0
    if not _replays(model, work):
        again = 1 + costs.launch_again * {"none": 0.0, "swiglu": 0.0, "mixer": 0.3, "full": 1.0}[recompute]
        host = passes * _launch_seconds(model, costs) * again
        host += _launch_expert_seconds(model, layout, costs) * (again if recompute == "full" else 1.0)
        host *= 1.0 if work.fp8 == "none" else costs.launch_fp8
        host += costs.launched_collective * collectives + costs.launched_exchange * exchanges
    pipeline = traffic["pipeline"] / link(layout.world_size)
    bubble = (layout.pp - 1) / (steps * layout.vpp)
    data = traffic["data"] / link(layout.tp * layout.cp * layout.dp)
    # Overlap hides reduction and gathering behind the last microbatch's backward and the next one's forward pass.
    exposed = max(0.0, data - 0.8 * max(gpu, host))
    owned = max(
        _owned(parameters_per_gpu(model, layout, stage), expert_parameters(model, layout, stage), layout)
        for stage in range(layout.pp)
    )
    update = costs.update_bytes * owned / cluster.copy_tbps / 1e12
    if work.cpu_offload:
        update = costs.offload_seconds * owned
    return Estimate(
        layout=layout,
        micro_batch=micro_batch,
        recompute=recompute,
        memory=max(stages, key=lambda items: sum(items.values())),
        traffic=traffic,
        seconds={
            "compute": compute * steps,
            "tensor": tensor,
            "context": context,
            "expert": expert,
            "host": max(0.0, host - gpu) * steps,
            "pipeline": pipeline,
            "bubble": bubble * max(gpu, host) * steps,
            "data, not hidden": exposed,
            "optimizer": update + costs.step_seconds,
        },
        bubble=bubble / (1 + bubble),
        tokens=work.sequence * work.batch,
        host=OFFLOAD_BYTES * owned if work.cpu_offload else 0.0,
    )


def _compute_seconds(
    model: ModelConfig,
    cluster: Cluster,
    work: Work,
    layout: Layout,
    micro_batch: int,
    recompute: Recompute,
    costs: Costs,
) -> float:
    """Of a microbatch, forward and backward, on the slowest pipeline stage; nothing is sent or waited for."""
    share, tokens = work.attention_share, work.sequence * micro_batch / layout.cp
    flops = flops_per_token(model, work.sequence, share)
    scan = {"recurrence update", "recurrence read"}
    linear = sum(value for name, value in flops.items() if name not in scan | {"attention", "conv", "output_layer"})
    product = costs.linear_share * PEAK
    forward = linear / product * costs.fp8[work.fp8] + flops.get("attention", 0.0) / (costs.attention_share * PEAK)
    backward = 2 * forward
    if recurrent := _recurrent_layers(model, share):
        area = model.qk_head_dim * model.v_head_dim / 128**2
        scans = costs.recurrence_seconds[model.mixer] * model.num_heads * area * recurrent
        forward, backward = forward + 0.25 * scans, backward + 0.75 * scans
    # Norms, activations and copies: what is kept is written and read again.
    kept, copied = activation_bytes(model, dataclasses.replace(layout, tp=1), share), cluster.copy_tbps * 1e12
    swiglu = kept.pop("swiglu")
    moved = costs.passes * sum(kept.values()) * model.num_layers / copied
    forward, backward = forward + moved / 3, backward + 2 * moved / 3
    again = {"none": 0.0, "swiglu": 0.0, "mixer": 0.12, "full": 1.0}[recompute] * forward
    if recompute == "none" and work.fp8 == "none":  # the fitted passes compute it again: two halves read, one written
        again -= 3 * swiglu * model.num_layers / copied
    blocks = (forward + backward + again) / model.num_layers
    head = 3 * (flops["output_layer"] + mtp_flops_per_token(model, work.sequence, share)) / product
    slowest = max(blocks * max(layout.stage_layers), blocks * layout.stage_layers[-1] + head)
    return tokens * slowest / layout.tp / (cluster.tflops * 1e12 / PEAK)


def _launch_seconds(model: ModelConfig, costs: Costs) -> float:
    """Of the host for a layer and microbatch, the mean over layers."""
    names = [(kind.layers, model.mixer if kind.model.has_recurrence else "attention") for kind in kinds(model)]
    return sum(layers * costs.launch_seconds[name] for layers, name in names) / model.num_layers


def _launch_expert_seconds(model: ModelConfig, layout: Layout, costs: Costs) -> float:
    """Of the host for the experts of a stage's layers and a microbatch."""
    if model.moe is None:
        return 0.0
    layers = max(_expert_layers(model, layout.layers(stage)) for stage in range(layout.pp))
    return layers * (costs.launch_experts + costs.launch_expert * model.moe.experts / layout.ep)


def layout_of(model: ModelConfig, work: Work, parallel: ParallelConfig, micro_batch: int, gpus: int) -> Layout:
    """The layout that a run of this model would get; ConfigError where a run would be refused."""
    fixed = model.single_mode
    p_attention = 0.25 if fixed is None else float(fixed == "attention")
    run = RunConfig(
        model=model,
        data=DataConfig(sequence_length=work.sequence, tokenizer="any", blend=(BlendEntry(path="any"),)),
        train=TrainConfig(
            iterations=len(work.ramp) + 1,
            global_batch_size=work.batch,
            micro_batch_size=micro_batch,
            batch_schedule=tuple(BatchStage(start=i, global_batch_size=n) for i, n in enumerate(work.ramp, 1)),
        ),
        output_dir="any",
        modes=ModesConfig(
            chunk=math.gcd(work.sequence, 256),
            p_attention=p_attention,
            p_recurrent=0.25 if fixed is None else 1 - p_attention,
        ),
        evaluation=EvaluationConfig(plans=(fixed or "attention",)),
        parallel=parallel,
    )
    return layout_for(run, gpus)


def layouts(model: ModelConfig, cluster: Cluster, work: Work) -> Iterator[tuple[Layout, int]]:
    """Every layout and micro batch that a run on this cluster accepts; tensor parallelism stays within a node."""
    for tp, pp, cp in itertools.product(divisors(cluster.gpus), repeat=3):
        if tp > cluster.gpus_per_node or cluster.gpus % (tp * pp * cp) or pp > model.num_layers:
            continue
        first = uneven_first_stage(model.num_layers, pp)
        experts = (1,) if model.moe is None else _expert_sizes(model.moe.experts, cluster.gpus // pp)
        for vpp, micro_batch, expert in itertools.product((1, 2, 4, 5, 8, 10), (1, 2, 4, 8, 16, 32), experts):
            parallel = ParallelConfig(
                tensor=tp,
                pipeline=pp,
                context=cp,
                expert=expert,
                virtual_pipeline=vpp,
                first_stage_layers=first,
                overlap=True,
            )
            try:
                yield layout_of(model, work, parallel, micro_batch, cluster.gpus), micro_batch
            except ConfigError:
                continue


def _expert_sizes(experts: int, ranks: int) -> tuple[int, ...]:
    """Expert-parallel sizes to try on the ranks of a pipeline stage."""
    return tuple(size for size in divisors(experts) if ranks % size == 0)


def plan(model: ModelConfig, cluster: Cluster, work: Work) -> list[Estimate]:
    """Layouts that fit in memory, fastest first; of each layout and micro batch the least recompute that fits.

    ConfigError when none fits, with the one that comes nearest.
    """
    fitting: list[Estimate] = []
    nearest: Estimate | None = None
    for layout, micro_batch in layouts(model, cluster, work):
        for recompute in get_args(Recompute):
            found = estimate(model, cluster, work, layout, micro_batch, recompute)
            if found.gib <= USABLE * cluster.memory_gib:
                fitting.append(found)
                break
            if nearest is None or found.gib < nearest.gib:
                nearest = found
    if fitting:
        return sorted(fitting, key=lambda found: (found.step_seconds, -found.micro_batch))
    if nearest is None:
        batch = " or ".join(map(str, [work.batch, *work.ramp]))
        raise ConfigError(
            f"no layout of {cluster.gpus} GPUs divides {model.num_heads} heads ({model.kv_heads} of keys), "
            f"{model.num_layers} layers, {work.sequence} tokens and a batch of {batch}; change the batch first"
        )
    hint = ""
    if not (work.cpu_offload or work.muon):  # Muon's state is not offloaded
        offloading = dataclasses.replace(work, cpu_offload=True)
        leaner = estimate(model, cluster, offloading, nearest.layout, nearest.micro_batch, nearest.recompute)
        hint = f", with optimizer.cpu_offload (--cpu-offload) {leaner.gib:.0f} GiB"
    raise ConfigError(
        f"model {model.name} does not fit on {cluster.gpus} GPUs of {cluster.memory_gib:g} GiB, of which "
        f"{USABLE * cluster.memory_gib:.0f} are usable: the leanest layout, {nearest.name()} with full recompute, "
        f"needs {nearest.gib:.0f} GiB{hint}"
    )
