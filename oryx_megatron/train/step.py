"""One optimizer step and one evaluation pass through megatron-core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.model.sequence import SequenceInfo
from oryx_megatron.modes import ModePlan


@dataclass(frozen=True)
class Microbatch:
    """One forward pass of one data-parallel rank; equal on all its model-parallel ranks."""

    tokens: Tensor
    """int64 [b, s]"""
    labels: Tensor
    """int64 [b, s], the token after each."""
    loss_mask: Tensor
    """float32 [b, s], 0 where a label does not count."""
    plan: ModePlan
    """Mode of each of the s tokens."""
    documents: Tensor | None = None
    """int32 cumulative document starts, or None when documents are joined."""
    text_bytes: float = 0.0
    """UTF-8 bytes that the counted labels stand for; known in evaluation only."""


def forward_microbatch(batches: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    """megatron-core's forward step: next microbatch through one model chunk, and the function that makes its loss."""
    batch = next(batches)
    device = platform.device()
    sort = get_model_config(chunk).fused_mixer
    info = SequenceInfo.build(batch.plan, device=device, documents=batch.documents, sort=sort)
    local = _context_slice(batch.tokens.shape[1])
    tokens, labels, mask = (
        info.arrange(x.to(device, non_blocking=True))[:, local].contiguous()
        for x in (batch.tokens, batch.labels, batch.loss_mask)
    )
    output = chunk(
        tokens,
        None,  # position_ids: the mixer makes its own
        None,  # attention_mask: causality and documents travel in `info`
        labels=labels,
        packed_seq_params=info,
    )
    # Every context-parallel rank reports its tokens; the bytes of the whole microbatch are counted once.
    text_bytes = batch.text_bytes if parallel_state.get_context_parallel_rank() == 0 else 0.0
    return output, partial(_sum_loss, mask, text_bytes)


def _sum_loss(mask: Tensor, text_bytes: float, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss, number of counted tokens, and a report; megatron-core divides at the end of the step."""
    total = (losses.float() * mask).sum()
    tokens = mask.sum()
    report = torch.stack((total.detach(), tokens, tokens.new_tensor(text_bytes)))
    return total, tokens.to(torch.int), {"totals": report}


def _context_slice(length: int) -> slice:
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return slice(rank * length // size, (rank + 1) * length // size)


@dataclass(frozen=True)
class Totals:
    """Sums over a global batch, the same on every rank."""

    loss: float
    """Nats."""
    tokens: float
    """Counted labels."""
    text_bytes: float
    """UTF-8 bytes of those labels; 0 in training."""
    local: Tensor | None = field(default=None, repr=False, compare=False)
    """[microbatches, 3] the same of every microbatch of this rank, on the last pipeline stage."""

    @property
    def mean_loss(self) -> float:
        """Nats per token."""
        return self.loss / max(self.tokens, 1.0)


def forward_backward(chunks: list[Any], batches: list[Microbatch], *, forward_only: bool) -> Totals:
    """Run the microbatches of one step; leaves gradients in place unless `forward_only`.

    Args:
        chunks: Model chunks of this rank.
        batches: The microbatches of this data-parallel rank, all of one shape.
        forward_only: Skip the backward pass.
    """
    micro_batch_size, length = batches[0].tokens.shape
    # Each model chunk (virtual pipeline stage) draws the same microbatches from an iterator of its own.
    iterators = [iter(batches) for _ in chunks]
    with torch.set_grad_enabled(not forward_only):
        reports = get_forward_backward_func()(
            forward_step_func=forward_microbatch,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    return _reduce([report["totals"] for report in reports])


def _reduce(reports: list[Tensor]) -> Totals:
    """Sum over microbatches and data- and context-parallel ranks; the last pipeline stage tells the others."""
    total = torch.zeros(3, dtype=torch.float64, device=platform.device())
    local = None
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        local = torch.stack(reports)
        total += local.double().sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            total,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    loss, tokens, text_bytes = total.tolist()
    return Totals(loss, tokens, text_bytes, local)
