"""One optimizer step and one evaluation pass through megatron-core's pipeline schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.model.experts import SUMS, routers
from oryx_megatron.model.sequence import Future, SequenceInfo
from oryx_megatron.modes import Mode, ModePlan, Plan
from oryx_megatron.ops import TokenLayout


@dataclass(frozen=True)
class Microbatch:
    """One forward pass of one data-parallel rank; equal on all its model-parallel ranks."""

    tokens: Tensor
    """int64 [b, s]"""
    labels: Tensor
    """int64 [b, s], the token after each."""
    loss_mask: Tensor
    """float32 [b, s], 0 where a label does not count."""
    plan: Plan
    """Mode of each of the s tokens, by layer where layers differ."""
    documents: Tensor | None = None
    """int32 cumulative document starts, or None when documents are joined."""
    text_bytes: float = 0.0
    """UTF-8 bytes that the counted labels stand for; known in evaluation only."""
    groups: Tensor | None = None
    """int64 [b, s]: the group of each label, whose losses are summed apart too; in evaluation only."""
    group_count: int = 0


ForwardStep = Callable[[Iterator[Microbatch], torch.nn.Module], tuple[Tensor, Any]]
"""megatron-core's forward step: the next microbatch through one model chunk; its output, and what makes the loss."""


class Program(Protocol):
    """How one kind of model runs a microbatch; what an engine launches, or captures once and replays."""

    def shape(self, batch: Microbatch) -> Hashable:
        """All that host code branches on: microbatches of one shape launch the same kernels on other data."""

    def parts(self, batch: Microbatch) -> frozenset[str]:
        """Parts of the model that this rank computes for `batch`, where that depends on the batch."""

    def place(self, batch: Microbatch, chunk: torch.nn.Module) -> Any:
        """What a chunk reads of `batch`, on the device."""

    def refill(self, placed: Any, batch: Microbatch) -> None:
        """Overwrite what `place` made of another microbatch of the same shape."""

    def forward(self, placed: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """megatron-core's forward step: output of one model chunk, and the function that makes its loss."""


@dataclass
class Placed:
    """A microbatch on the device."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    info: SequenceInfo
    text_bytes: float
    groups: Tensor | None = None
    group_count: int = 0


class OryxProgram:
    """See Program.

    Args:
        model: The architecture. A hybrid in which no layer reads the plan runs all microbatches in one order.
    """

    def __init__(self, model: ModelConfig | None) -> None:
        self.one_order = model is not None and model.ignores_plans
        self.heads = 0 if model is None else model.mtp_layers
        self.heads_weight = 0.0 if model is None or model.mtp is None else model.mtp.loss_weight / model.mtp.layers
        """Of the loss of one head of multi-token prediction, as megatron-core shares it out."""

    def _plan(self, batch: Microbatch) -> Plan:
        return ModePlan.uniform(Mode.ATTENTION, batch.plan.length) if self.one_order else batch.plan

    def shape(self, batch: Microbatch) -> Hashable:
        """See Program."""
        plan = self._plan(batch)
        orders = list(dict.fromkeys(plan.orders))
        shapes = tuple(TokenLayout.shape_of(order, batch.documents) for order in orders)
        layers = (
            (orders.index(order), own.attention_tokens) for order, own in zip(plan.orders, plan.of_layers, strict=True)
        )
        return batch.tokens.shape, shapes, tuple(layers)

    def parts(self, batch: Microbatch) -> frozenset[str]:
        """See Program: the queries of the modes of this rank's rows, and the recurrence; by layer where they differ."""
        plan = self._plan(batch)
        if isinstance(plan, ModePlan):
            return _parts(plan)
        return frozenset(f"{part} of layer {i}" for i, own in enumerate(plan.of_layers) for part in _parts(own))

    def place(self, batch: Microbatch, chunk: torch.nn.Module) -> Placed:
        """See Program."""
        sort = get_model_config(chunk).fused_mixer
        info = SequenceInfo.build(self._plan(batch), device=platform.device(), documents=batch.documents, sort=sort)
        # Every context-parallel rank reports its tokens; the bytes of the whole microbatch are counted once.
        text_bytes = batch.text_bytes if parallel_state.get_context_parallel_rank() == 0 else 0.0
        ranks = parallel_state.get_context_parallel_world_size()
        for layout in info.layouts if ranks > 1 else ():
            layout.shard(ranks)  # its tables come from the host too
        tokens, labels, mask = (platform.to_device(x) for x in _texts(batch))
        groups = None if batch.groups is None else platform.to_device(batch.groups)
        return Placed(tokens, labels, mask, info, text_bytes, groups, batch.group_count)

    def refill(self, placed: Placed, batch: Microbatch) -> None:
        """See Program."""
        plan, layouts = self._plan(batch), placed.info.layouts
        assert layouts, "only microbatches of fused mixers are of equal shape"
        sources, targets = [*_texts(batch)], [placed.tokens, placed.labels, placed.loss_mask]
        for layout, order in zip(layouts, dict.fromkeys(plan.orders), strict=True):
            sources += TokenLayout.tables_of(order, batch.documents)
            targets += (layout.tokens, layout.rows, layout.starts)
        for target, source in zip(targets, sources):
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

    def forward(self, placed: Placed, chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """See Program."""
        info, local = placed.info, _context_slice(placed.tokens.shape[1])
        if self.heads and chunk.training and unwrap_model(chunk).mtp_process:
            info = info.with_futures(placed.tokens, placed.labels, placed.loss_mask, self.heads, local)
        tokens = info.arrange(placed.tokens)[:, local].contiguous()
        labels, mask = (info.arrange_labels(x)[:, local].contiguous() for x in (placed.labels, placed.loss_mask))
        output = chunk(
            tokens,
            None,  # position_ids: the mixer makes its own
            None,  # attention_mask: causality and documents travel in `info`
            labels=labels,
            packed_seq_params=info,
        )
        if placed.groups is None:
            return output, partial(
                sum_loss, mask, placed.text_bytes, futures=info.futures, heads_weight=self.heads_weight
            )
        groups = info.arrange_labels(placed.groups)[:, local]
        return output, partial(_sum_groups, mask, placed.text_bytes, groups, placed.group_count)


def _parts(plan: ModePlan) -> frozenset[str]:
    """What a layer computes for a plan on this rank."""
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    rows, attention = plan.length // ranks, plan.attention_tokens
    own = min(max(attention - rank * rows, 0), rows)
    found = {"attention query": own > 0, "recurrent query": own < rows, "recurrence": attention < plan.length}
    return frozenset(part for part, computed in found.items() if computed)


def _texts(batch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens, batch.labels, batch.loss_mask


def launch(program: Program, batches: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    """megatron-core's forward step: the next microbatch through one model chunk, kernel by kernel."""
    return program.forward(program.place(next(batches), chunk), chunk)


def sum_loss(
    mask: Tensor, text_bytes: float, losses: Tensor, *, futures: Sequence[Future] = (), heads_weight: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss, number of counted tokens, and a report; megatron-core divides at the end of the step.

    `losses` [b, s], or [2, b, s] where the second is a penalty that is trained on and reported on its own; with heads
    of multi-token prediction [2 + heads, b, s]. Their sums too are divided by the number of the model's own tokens, as
    in megatron-core 0.16; 0.19 weighs each rank's by its share of counted tokens, and depends on the layout.
    """
    tokens = mask.sum()
    if losses.dim() > mask.dim():
        loss, penalty = (losses[:2].float() * mask).sum((1, 2))
        total = loss + penalty
    else:
        total = loss = (losses.float() * mask).sum()
        penalty = tokens.new_zeros(())
    report = torch.stack((loss.detach(), tokens, tokens.new_full((), text_bytes), penalty.detach()))
    if futures:
        ahead = losses[2:].sum((1, 2))
        total = total + heads_weight * ahead.sum()
        counted = torch.stack([future.mask.sum() for future in futures])
        report = torch.cat((report, ahead.detach(), counted))
    return total, tokens.to(torch.int), {"totals": report}


def _sum_groups(
    mask: Tensor, text_bytes: float, groups: Tensor, count: int, losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`sum_loss`, with the loss and the number of labels of every group in the report too."""
    total, tokens, report = sum_loss(mask, text_bytes, losses)
    own = losses[0] if losses.dim() > mask.dim() else losses
    apart = torch.zeros(2, count, dtype=torch.float64, device=mask.device)
    apart.index_add_(1, groups.reshape(-1), torch.stack((own.float() * mask, mask)).double().reshape(2, -1))
    return total, tokens, {"totals": torch.cat((report["totals"].double(), apart.reshape(-1)))}


def _context_slice(length: int) -> slice:
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return slice(rank * length // size, (rank + 1) * length // size)


REPORTED = 4
"""Sums of a microbatch: `Totals.sums`, without groups."""


@dataclass(frozen=True)
class Totals:
    """Sums over a global batch, the same on every rank. Reading a number waits for the device."""

    sums: Tensor
    """[4] fp64 on the device: loss in nats, counted labels, UTF-8 bytes of those labels (0 in training), z-loss.

    With groups [4 + 2 groups]: then the loss of each group, and the counted labels of each. In training the heads of
    multi-token prediction are the groups.
    """
    local: Tensor | None = field(default=None, repr=False, compare=False)
    """[microbatches, 4] the same of every microbatch of this rank, on the last pipeline stage."""
    routing: Tensor | None = field(default=None, repr=False, compare=False)
    """[layers with experts, E + 5] fp64 sums of their routers in training (model/experts.py); None without experts."""

    @cached_property
    def _numbers(self) -> list[float]:
        return self.sums.tolist()

    def read(self, *others: Tensor) -> list[list[float]]:
        """Wait once for these sums and for other tensors of any shape: the numbers of each of those are returned."""
        rows = () if self.routing is None else self.routing.unbind()
        parts = [part.double().reshape(-1) for part in (self.sums, *others, *rows)]
        numbers = iter(torch.cat(parts).tolist())  # one transfer
        own, *found = (list(itertools.islice(numbers, len(part))) for part in parts)
        # Where the properties would keep them: a frozen dataclass allows no assignment.
        self.__dict__["_numbers"], self.__dict__["routed"] = own, found[len(others) :]
        return found[: len(others)]

    @cached_property
    def routed(self) -> list[list[float]]:
        """`routing` as numbers; none without experts."""
        return [] if self.routing is None else self.routing.tolist()

    @property
    def loss(self) -> float:
        """Nats."""
        return self._numbers[0]

    @property
    def tokens(self) -> float:
        """Counted labels."""
        return self._numbers[1]

    @property
    def text_bytes(self) -> float:
        """UTF-8 bytes of those labels; 0 in training."""
        return self._numbers[2]

    @property
    def mean_z_loss(self) -> float:
        """Weighted, per token; 0 where it is off and in evaluation."""
        return self._numbers[3] / max(self.tokens, 1.0)

    @property
    def mtp_losses(self) -> list[float]:
        """Nats per token of each head of multi-token prediction, in training."""
        return [loss / max(tokens, 1.0) for loss, tokens in self.groups]

    @property
    def groups(self) -> list[tuple[float, float]]:
        """Loss in nats and counted labels of each group of labels."""
        losses, counts = np.array(self._numbers[REPORTED:]).reshape(2, -1)
        return list(zip(losses.tolist(), counts.tolist(), strict=True))

    @property
    def mean(self) -> Tensor:
        """`mean_loss`, [] on the device."""
        return self.sums[0] / self.sums[1].clamp(min=1)

    def bad(self, norm: Tensor, limit: float | None = None) -> Tensor:
        """Whether `Guard.reason` will have a reason, as a bool [] on the device: nobody waits for the numbers."""
        bad = ~(self.mean.isfinite() & norm.isfinite())
        return bad if limit is None else bad | (self.mean > limit)

    @property
    def mean_loss(self) -> float:
        """Nats per token."""
        return self.loss / max(self.tokens, 1.0)


def forward_backward(
    chunks: list[Any],
    batches: list[Microbatch],
    *,
    forward_only: bool,
    forward_step: ForwardStep | None = None,
) -> Totals:
    """Run the microbatches of one step; leaves gradients in place unless `forward_only`.

    Args:
        chunks: Model chunks of this rank.
        batches: The microbatches of this data-parallel rank, all of one shape.
        forward_only: Skip the backward pass.
        forward_step: megatron-core's forward step; None launches an Oryx model's.
    """
    model: ModelConfig | None = getattr(get_model_config(chunks[0]), "oryx", None)
    forward_step = forward_step or partial(launch, OryxProgram(model))
    micro_batch_size, length = batches[0].tokens.shape
    # Each model chunk (virtual pipeline stage) draws the same microbatches from an iterator of its own.
    iterators = [iter(batches) for _ in chunks]
    with torch.set_grad_enabled(not forward_only):
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    routing = None if forward_only else _routing(model, chunks)
    groups = batches[0].group_count if forward_only or model is None else model.mtp_layers
    return reduce_totals([report["totals"] for report in reports], routing, groups=groups)


def _routing(model: ModelConfig | None, chunks: list[Any]) -> Tensor | None:
    """Sums of the routers of all layers over all ranks; None without experts."""
    if model is None or model.moe is None:
        return None
    places = {layer + 1: i for i, layer in enumerate(filter(model.moe.in_layer, range(model.num_layers)))}
    width = model.moe.experts + len(SUMS)
    table = torch.zeros(len(places), width, dtype=torch.float64, device=platform.device())
    for router in routers(chunks):
        if (sums := router.take_sums()) is not None:
            table[places[router.layer_number]] += sums
    torch.distributed.all_reduce(table)
    return table


def reduce_totals(reports: list[Tensor], routing: Tensor | None = None, *, groups: int = 0) -> Totals:
    """Sum over microbatches and data- and context-parallel ranks; the last pipeline stage tells the others."""
    total = torch.zeros(REPORTED + 2 * groups, dtype=torch.float64, device=platform.device())
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
    return Totals(total, local, routing)
