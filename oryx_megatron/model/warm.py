"""Compile the mixer's kernels for a run before its first step.

Kernels are written for Triton, tilelang and CuTe, which compile on first use: minutes, on every rank at once and inside
the first step, where a slow rank looks like a hang. None of them is compiled for a plan or a number of documents, so
one small step under each kind of plan finds all there are.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from oryx_megatron import compat, parallel, platform
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.model.mixer import FusedSteps, OryxMixer, Parts
from oryx_megatron.modes import parse_plan
from oryx_megatron.ops import TokenLayout, fused, scans

PLANS = {"both": ("recurrent", "ratio:0.5", "attention"), "attention": ("attention",), "recurrent": ("recurrent",)}
"""The plans that meet every kernel of a layer, those with most to compile first."""


def compile_kernels(run: RunConfig, chunks: list[Any]) -> float:
    """Run a fused mixer of each kind of layer of `chunks`, and SwiGLU, forward and backward, under each kind of plan.

    No parameter gets a gradient, beyond what kernels add to its fp32 buffer, which every step zeroes first; and no
    other rank takes part. Chunks without a fused mixer have nothing to compile.

    Returns:
        Seconds it took.
    """
    begun = time.perf_counter()
    if platform.has_gpu() and run.model.mixer == "gdn":
        # Kernels of tilelang compute nothing inside and are compiled together at its end: all is called again below.
        with compat.tilelang.side_by_side():
            for mixer in _kinds(chunks):
                if (model := mixer.model).has_recurrence:  # its backward pass compiles for longer than all else
                    shape = run.train.micro_batch_size, run.data.sequence_length, mixer.heads, mixer.groups
                    scans.rehearse(*shape, (model.qk_head_dim, model.v_head_dim), mixer.config.params_dtype)
            _call_each(run, chunks)
    _call_each(run, chunks)
    return time.perf_counter() - begun


def _call_each(run: RunConfig, chunks: list[Any]) -> None:
    mixers = _kinds(chunks)
    model, length, batch = run.model, run.data.sequence_length, run.train.micro_batch_size
    documents = None
    if run.data.documents == "isolated":
        documents = torch.tensor([0, length // 2, length], dtype=torch.int32)
    for mixer in mixers:
        for spec in PLANS[mixer.model.modes]:
            plan = parse_plan(spec, length, chunk=run.modes.chunk)
            layouts = [TokenLayout.of(plan, device=platform.device())]
            if documents is not None:
                layouts.append(TokenLayout.of(plan, device=platform.device(), documents=documents))
            for layout in layouts:
                _step(mixer, layout, batch)
    if mixers:
        tensor, moe = run.parallel.tensor, model.moe
        widths = {model.ffn_hidden_size // tensor}
        if moe is not None:
            widths |= {moe.ffn_hidden_size, moe.shared_ffn_hidden_size // tensor} - {0}
        for width in sorted(widths):
            _backward(fused.SwiGLU()(x := _random(length, batch, 2 * width, like=mixers[0])), [x])
        platform.synchronize()


def compile_in_turn(run: RunConfig, chunks: list[Any]) -> float:
    """`compile_kernels` on one rank of those that share a cache, then on the others, which find everything there.

    Collective. With kernels.cache_dir all nodes share a cache and rank 0 goes first, else the first rank of every node.
    """
    begun = time.perf_counter()
    first = parallel.is_main_rank() if run.kernels.cache_dir is not None else platform.local_rank() == 0
    for turn in (first, not first):
        if turn:
            compile_kernels(run, chunks)
        torch.distributed.barrier()
    return time.perf_counter() - begun


def _kinds(chunks: list[Any]) -> list[OryxMixer]:
    """The first fused mixer of each kind of layer."""
    mixers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, OryxMixer) and m.config.fused_mixer]
    return list({mixer.model.modes: mixer for mixer in reversed(mixers)}.values())


def _step(mixer: OryxMixer, layout: TokenLayout, batch: int) -> None:
    """What a mixer does between its projections, without the exchange of context parallelism."""
    model, size, steps = mixer.model, mixer.cp_group.size(), FusedSteps(mixer, layout)
    queries, outputs = mixer.heads * model.qk_head_dim, mixer.heads * size * model.v_head_dim
    kept = mixer.in_proj_rows.get("output_gate", 0) if size == 1 else 0  # else it stays with its rows
    logits = sum(mixer.decay_parts.values()) // size
    parts = Parts(
        _random(layout.length, batch, mixer.groups * (model.qk_head_dim + model.v_head_dim) + kept, like=mixer),
        _random(layout.attention, batch, queries, like=mixer) if layout.attention else None,
        _random(layout.recurrent, batch, queries, like=mixer) if layout.recurrent else None,
        _random(layout.length, batch, logits, like=mixer) if layout.recurrent else None,
    )
    o_attention, o_recurrent, gate = mixer.mix_heads(steps, parts)
    given = [x for x in parts if x is not None]
    if size == 1:
        _backward(steps.norm_rows(o_attention, o_recurrent, gate, layout), given)
        return
    _backward(fused.in_rows(o_attention, o_recurrent, layout), given)
    shard = layout.shard(size)
    rows = _random(shard.length, batch, outputs, like=mixer)
    gate = _random(shard.length, batch, outputs, like=mixer) if model.output_gate else None
    o = rows.unflatten(-1, (-1, model.v_head_dim)).transpose(0, 1)
    _backward(steps.norm_rows(o, None, gate, shard), [x for x in (rows, gate) if x is not None])


def _random(*shape: int, like: OryxMixer) -> Tensor:
    dtype = like.config.params_dtype  # not that of its first parameter: decays stay in fp32
    return torch.randn(*shape, dtype=dtype, device=platform.device(), requires_grad=True)


def _backward(output: Tensor, inputs: list[Tensor]) -> None:
    # Gradients of the inputs alone: those of parameters would start the data-parallel reduction.
    compat.torch.run_backward(output, torch.ones_like(output), inputs)
