"""From the samples of the loader to microbatches with mode plans."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from oryx_megatron.config.schema import ModesConfig, RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.loader import Blend
from oryx_megatron.data.stream import Batch, SampleStream
from oryx_megatron.errors import DataError
from oryx_megatron.modes import ModePlan, Plan, draw_plan
from oryx_megatron.train.step import Microbatch


def open_stream(
    run: RunConfig,
    layout: Layout,
    dataset: Blend,
    *,
    data_rank: int,
    eod: int,
    vocab_size: int,
    consumed: int = 0,
    microbatches: Callable[[int], int] | None = None,
    num_workers: int = 0,
) -> SampleStream:
    """The samples of a data-parallel rank from `consumed` on; see SampleStream.

    `microbatches` by number of the step from there; default: those of train.global_batch_size.
    """
    return SampleStream(
        dataset,
        micro_batch_size=run.train.micro_batch_size,
        microbatches=microbatches or layout.microbatches,
        data_rank=data_rank,
        data_size=layout.dp,
        consumed=consumed,
        isolated=run.data.documents == "isolated",
        eod=eod,
        vocab_size=vocab_size,
        num_workers=num_workers,
    )


def next_samples(stream: SampleStream) -> list[Batch]:
    """The samples of a step; DataError of this rank alone, which read the one at fault."""
    try:
        return stream.next_batches()
    except DataError as error:
        error.rank_local = True
        raise


def training_batches(
    samples: Sequence[Batch],
    modes: ModesConfig,
    *,
    seed: int,
    iteration: int,
    data_rank: int,
    data_size: int,
    layers: Sequence[bool] = (),
) -> list[Microbatch]:
    """The microbatches of one step of this data-parallel rank, each with its drawn plan.

    `layers`: `ModelConfig.reads_plans`, which plans by layers need.
    """

    def drawn(number: int, batch: Batch) -> Microbatch:
        rows, length = batch["tokens"].shape
        draw = partial(draw_plan, modes, seed=seed, iteration=iteration, microbatch=number, layers=layers)
        if modes.align == "sequence" or batch["documents"] is None:
            return _microbatch(batch, draw(length=length))
        starts = join_documents(batch["documents"], length)
        return _microbatch(batch, draw(length=rows * length, documents=starts.tolist()))

    return [drawn(m * data_size + data_rank, batch) for m, batch in enumerate(samples)]


TextPlan = Callable[[Tensor], ModePlan]
"""The plan of one text, int64 [s], where it depends on the text."""


def evaluation_batches(samples: Sequence[Batch], plan: Plan | TextPlan, token_bytes: np.ndarray) -> list[Microbatch]:
    """The microbatches of one evaluation step, all under `plan`; `token_bytes` [vocabulary] makes bits per byte.

    Where the plan depends on the text every row is a microbatch of its own.

    Labels are grouped by the mode of the token before them and by its position: group `mode · n + i` for recurrent
    (0) and attention mode (1) and a mode that differs over the layers (2), where i is the first of the n
    `position_bounds` above the position.
    """
    sizes = torch.from_numpy(token_bytes)
    planned: list[tuple[Batch, Plan]]
    if callable(plan):
        rows = [row for batch in samples for row in _rows(batch)]
        planned = [(row, _plan_of_documents(plan, row)) for row in rows]
    else:
        planned = [(batch, plan) for batch in samples]
    found = []
    for batch, own in planned:
        made = _microbatch(batch, own, float((sizes[batch["labels"]] * batch["loss_mask"]).sum(dtype=torch.float64)))
        bounds = position_bounds(batch["tokens"].shape[1])
        positions = _positions(batch).reshape(made.tokens.shape).contiguous()
        places = torch.bucketize(positions, torch.tensor(bounds), right=True)
        modes = torch.from_numpy(made.plan.kinds())
        count = len(TOKEN_MODES) * len(bounds)
        found.append(dataclasses.replace(made, groups=modes * len(bounds) + places, group_count=count))
    return found


TOKEN_MODES = ("recurrent", "attention", "mixed")
"""Modes of a token, by number; mixed: not the same in all layers."""


def position_bounds(length: int) -> list[int]:
    """Positions at which the groups of an evaluation end: `length`, its half, and so on, at most twelve."""
    bounds = [length]
    while bounds[0] >= 2 * SHORTEST and len(bounds) < MOST_GROUPS:
        bounds.insert(0, bounds[0] // 2)
    return bounds


SHORTEST, MOST_GROUPS = 16, 12


def _positions(batch: Batch) -> Tensor:
    """[b, s]: tokens that each token may look back at, in its document where documents are isolated."""
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    if batch["documents"] is None:
        return positions
    begins = [torch.repeat_interleave(starts[:-1], starts.diff()) for starts in batch["documents"]]
    return positions - torch.stack(begins)


def _rows(batch: Batch) -> list[Batch]:
    """The rows of a batch as batches."""
    return [
        {key: None if value is None else value[i : i + 1] for key, value in batch.items()}  # type: ignore[misc,index]
        for i in range(len(batch["tokens"]))
    ]


def _plan_of_documents(plan: TextPlan, row: Batch) -> ModePlan:
    """The plan of a row; isolated documents are texts of their own."""
    (text,), documents = row["tokens"], row["documents"]
    if documents is None:
        return plan(text)
    parts = [plan(part).is_attention() for part in text.split(documents[0].diff().tolist())]
    return ModePlan.from_mask(np.concatenate(parts))


def _microbatch(batch: Batch, plan: Plan, text_bytes: float = 0.0) -> Microbatch:
    tokens, labels, mask = batch["tokens"], batch["labels"], batch["loss_mask"]
    documents = batch["documents"]
    if documents is None:
        return Microbatch(tokens, labels, mask, plan, text_bytes=text_bytes)
    # Rows end documents at different places; laid end to end they are one row of isolated documents.
    rows, length = tokens.shape
    tiled = plan if plan.length == rows * length else plan.tiled(rows)
    tokens, labels, mask = (t.reshape(1, -1) for t in (tokens, labels, mask))
    return Microbatch(tokens, labels, mask, tiled, join_documents(documents, length), text_bytes)


def join_documents(rows: Sequence[Tensor], length: int) -> Tensor:
    """Cumulative document starts of rows [0, …, length] laid end to end: int32 [0, …, len(rows) · length]."""
    starts = itertools.chain.from_iterable((row[:-1] + i * length).tolist() for i, row in enumerate(rows))
    return torch.tensor([*starts, len(rows) * length], dtype=torch.int32)
