"""Loss and bits per byte of validation sets under several mode plans, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from oryx_megatron import platform
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.loader import Blend
from oryx_megatron.data.tokenizer import Tokenizer
from oryx_megatron.hf.plans_oryx import routed_share
from oryx_megatron.modes import Plan, plan_for
from oryx_megatron.train.batches import TOKEN_MODES, TextPlan, evaluation_batches, open_stream, position_bounds
from oryx_megatron.train.step import REPORTED, Totals, forward_backward


@dataclass(frozen=True)
class Evaluation:
    """Result of one validation set under one plan."""

    dataset: str
    plan: str
    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Bits per UTF-8 byte of text: comparable between tokenizers."""
    tokens: int
    attention_share: float
    """Share of the tokens in attention mode, mean over layers."""
    modes: dict[str, float] = field(default_factory=dict)
    """Loss of the labels after tokens in each mode: `attention`, `recurrent`; `mixed` where layers differ."""
    positions: dict[str, float] = field(default_factory=dict)
    """Loss by position (in the document where isolated): the bound below which a group's positions are, its loss."""
    ema_loss: float | None = None
    """Nats per token of the averaged weights (train.ema); None: there is no average."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """Fields and perplexity; without a loss that there is not."""
        found = asdict(self) | {"perplexity": self.perplexity}
        return {name: value for name, value in found.items() if value is not None}


def evaluate(
    run: RunConfig,
    layout: Layout,
    chunks: list[Any],
    datasets: dict[str, Blend],
    tokenizer: Tokenizer,
    *,
    data_rank: int,
    plans: tuple[str, ...] | None = None,
    progress: Callable[[], None] = lambda: None,
    text_plans: Mapping[str, TextPlan] | None = None,
    averaged: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(False),
) -> list[Evaluation]:
    """Evaluate every dataset under every plan on the same `evaluation.batches` global batches (null: on all).

    Args:
        run: The run's config.
        layout: How ranks are used.
        chunks: Model chunks of this rank; put into eval mode and back.
        datasets: Validation sets by name.
        tokenizer: For the bytes behind each token.
        data_rank: Data-parallel rank of this process.
        plans: Plan specs; default those of the run's evaluation.plans that need no router.
        progress: Called after every global batch.
        text_plans: Of the specs whose plan depends on the text, e.g. `router:R`.
        averaged: Engine.averaged; the losses of that average come beside those of the weights.
    """
    token_bytes = tokenizer.token_bytes()
    if plans is None:  # a router is trained when the run has ended
        plans = tuple(spec for spec in run.evaluation.plans if routed_share(spec) is None)
    length, size, layers = run.data.sequence_length, run.modes.chunk, run.model.reads_plans

    def losses() -> Iterator[Evaluation]:
        for name, dataset in datasets.items():
            for spec in plans:
                plan = (text_plans or {}).get(spec) or plan_for(layers, spec, length, chunk=size)
                totals, share = _run(run, layout, chunks, dataset, tokenizer, token_bytes, plan, data_rank, progress)
                bits = totals.loss / math.log(2) / totals.text_bytes if totals.text_bytes else math.nan
                apart = _apart(totals, position_bounds(length))
                yield Evaluation(name, spec, totals.mean_loss, bits, int(totals.tokens), share, *apart)

    training = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        results = list(losses())
        with averaged() as there:
            beside = [result.loss for result in losses()] if there else [None] * len(results)
    finally:
        for chunk, mode in zip(chunks, training):
            chunk.train(mode)
    return [replace(result, ema_loss=loss) for result, loss in zip(results, beside, strict=True)]


def _run(
    run: RunConfig,
    layout: Layout,
    chunks: list[Any],
    dataset: Blend,
    tokenizer: Tokenizer,
    token_bytes: np.ndarray,
    plan: Plan | TextPlan,
    data_rank: int,
    progress: Callable[[], None],
) -> tuple[Totals, float]:
    """Sums of the loss over all ranks, and the share of attention tokens."""
    stream = open_stream(
        run, layout, dataset, data_rank=data_rank, eod=tokenizer.eod_id, vocab_size=tokenizer.vocab_size
    )
    sums = []
    attention, tokens = 0.0, 0
    try:
        held = len(dataset) // run.train.global_batch_size
        for _ in range(held if run.evaluation.batches is None else min(run.evaluation.batches, held)):
            batches = evaluation_batches(stream.next_batches(), plan, token_bytes)
            sums.append(forward_backward(chunks, batches, forward_only=True).sums)
            attention += sum(batch.plan.attention_share * batch.plan.length for batch in batches)
            tokens += sum(batch.plan.length for batch in batches)
            progress()
    finally:
        stream.close()
    groups = len(TOKEN_MODES) * len(position_bounds(run.data.sequence_length))
    empty = torch.zeros(REPORTED + 2 * groups, dtype=torch.float64)
    totals = Totals(torch.stack(sums).sum(0) if sums else empty)
    if not callable(plan):
        return totals, plan.attention_share
    return totals, _share_over_ranks(attention, tokens)


def _share_over_ranks(attention: float, tokens: int) -> float:
    """Share of attention tokens, where every rank has counted its own texts."""
    counts = torch.tensor([attention, tokens], dtype=torch.float64, device=platform.device())
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return float(counts[0] / counts[1].clamp_min(1))


def _apart(totals: Totals, bounds: list[int]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean loss by mode and by position, of `evaluation_batches`' groups; without those that hold no label."""
    groups = np.array(totals.groups).reshape(len(TOKEN_MODES), len(bounds), 2)  # mode, position, loss and labels
    modes = dict(zip(TOKEN_MODES, groups.sum(1), strict=True))
    positions = dict(zip(map(str, bounds), groups.sum(0), strict=True))
    return _means(modes), _means(positions)


def _means(sums: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(loss / labels) for name, (loss, labels) in sums.items() if labels}
