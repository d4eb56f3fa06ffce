"""Training of a model's router: what attention gains in its texts, a router that predicts it, and what that buys."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from oryx_megatron import parallel, platform
from oryx_megatron.checkpoint import find_checkpoint
from oryx_megatron.config.schema import RouterConfig
from oryx_megatron.data.files import check_output
from oryx_megatron.data.loader import build_datasets
from oryx_megatron.data.stream import SampleStream
from oryx_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.generation import LoadedModel, load_for_inference
from oryx_megatron.hf.router import facts_of, is_router, router_of, save_router
from oryx_megatron.hf.router_oryx import OryxRouter, RouterShape
from oryx_megatron.modes import Mode, ModePlan, Plan, parse_plan
from oryx_megatron.train.step import Microbatch, OryxProgram

log = logging.getLogger(__name__)
CLIP = 8.0
"""Nats: a gain beyond this says no more about where to attend."""
SHARES = (0.02, 0.05, 0.1, 0.25)
"""Of attention tokens, in the table at the end."""
LOGITS = 1 << 29
"""Most that a forward pass makes: 2 GiB in fp32."""


@dataclass(frozen=True)
class Gains:
    """What attention gains, token by token."""

    tokens: Tensor
    """int64 [n, s]"""
    gains: Tensor
    """float32 [n, s]: nats by which all attention predicts the next token better than all recurrence."""
    counted: Tensor
    """bool [n, s]: whether the next token counts in the loss."""
    losses: Tensor
    """float32 [2, n, s]: loss under `attention` and under `recurrent`."""
    labels: Tensor
    """int64 [n, s]: the token after each."""


@dataclass(frozen=True)
class Row:
    """Held-out loss under one plan."""

    plan: str
    share: float
    loss: float


def table(rows: list[Row]) -> str:
    """Loss against share, and how much of the gap between the two modes each plan closes."""
    losses = {row.plan: row.loss for row in rows}
    gap = losses["recurrent"] - losses["attention"]
    lines = [f"{'plan':<14}{'attention':>10}{'loss':>9}{'of the gap':>12}"]
    for row in rows:
        closed = f"{(losses['recurrent'] - row.loss) / gap:.1%}" if abs(gap) > 1e-6 else "-"
        lines.append(f"{row.plan:<14}{row.share:>10.1%}{row.loss:>9.4f}{closed:>12}")
    return "\n".join(lines) + "\n"


def train_router(run: str | Path, options: RouterConfig, *, overwrite: bool = False) -> tuple[list[Row], Path | None]:
    """Train, calibrate, compare and write a router. Collective: all data-parallel ranks call it.

    Returns:
        Held-out losses, and the file on rank 0 (None on the others).

    Raises:
        ConfigError: a model with one mode only.
        DataError, CheckpointError: what cannot be read; a file in the way that is not a router.
    """
    path = router_of(find_checkpoint(run))
    check_output(path, ours=is_router, overwrite=overwrite)
    model = load_for_inference(run)
    if not model.run.model.takes_plans:
        raise ConfigError(f"{run}: no layer of the model reads a mode plan: there is nothing to route")

    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        shape = RouterShape(model.run.model.vocab_size, options.width, options.layers, options.heads, options.table)
        router = OryxRouter(shape)
        router.start_from(_embedding(model))
    both = []
    for name, stream, count in texts_of(model, options):
        both.append(collect(model, stream, count))
        if name == "train" and router.counts:
            count_texts(router, stream, count * options.counted)
    training, held_out = both
    generator = torch.Generator().manual_seed(options.seed)
    router.to(platform.device())
    fit(router, training, options, generator)
    router.eval()
    with torch.no_grad():
        scores = torch.cat([router(part)[0] for part in held_out.tokens.to(platform.device()).split(4)])
    router.calibrate(_everywhere(scores[held_out.counted.to(scores.device)]))
    rows = compare(model, router, held_out, scores.cpu())
    if not parallel.is_main_rank():
        return rows, None
    about = {
        "checkpoint": model.folder.name,
        "iteration": model.manifest.iteration,
        **facts_of(model.manifest),
        "options": dataclasses.asdict(options),
        "held_out": [dataclasses.asdict(row) for row in rows],
    }
    save_router(router, path, about)
    return rows, path


def texts_of(model: LoadedModel, options: RouterConfig) -> Iterator[tuple[str, Any, int]]:
    """`train` and `valid`: this rank's stream of texts, and how many to take of it."""
    tokenizer = load_tokenizer(model.run.data.tokenizer)
    check_tokenizer(tokenizer, model.manifest.tokenizer, str(model.folder))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    wanted = {"train": options.texts, "valid": options.held_out}
    times = {"train": 1 + options.counted if options.table else 1, "valid": 1}
    blends = build_datasets(
        model.run, tokenizer, {name: -(-n // size) * size * times[name] for name, n in wanted.items()}
    )
    for name, count in wanted.items():
        if name not in blends:
            raise ConfigError(f"the run has no {name} texts (data.split); a router needs training and validation texts")
        stream = SampleStream(
            blends[name],
            micro_batch_size=1,
            microbatches=1,
            data_rank=rank,
            data_size=size,
            eod=tokenizer.eod_id,
            vocab_size=tokenizer.vocab_size,
        )
        try:
            yield name, stream, max(1, count // size)
        finally:
            stream.close()


def collect(model: LoadedModel, stream: Any, count: int) -> Gains:
    """Both losses of so many texts."""
    batches = [stream.next_batches()[0] for _ in range(count)]
    tokens, labels, counted = (
        torch.cat([batch[name] for batch in batches]) for name in ("tokens", "labels", "loss_mask")
    )
    uniform = [ModePlan.uniform(mode, tokens.shape[1]) for mode in (Mode.ATTENTION, Mode.RECURRENT)]
    both = torch.stack([losses_of(model, tokens, labels, plan) for plan in uniform])
    return Gains(tokens, both[1] - both[0], counted > 0, both, labels)


def count_texts(router: OryxRouter, stream: Any, count: int) -> None:
    """Let a router count so many further texts of every rank: not those it learns from, which hold what it counts."""
    batch = 256
    for begin in range(0, count, batch):
        texts = [stream.next_batches()[0]["tokens"] for _ in range(min(batch, count - begin))]
        router.count(torch.cat(texts))
    router.table.copy_(_summed(router.table))
    router.singles.copy_(_summed(router.singles))


def tokens_at_once(vocab_size: int) -> int:
    """About how many tokens are read in one forward pass. A GPU takes more: its kernels hold no scores of attention."""
    return min(32768 if platform.has_gpu() else 8192, max(1, LOGITS // vocab_size))


def losses_of(model: LoadedModel, tokens: Tensor, labels: Tensor, plan: Plan | Sequence[ModePlan]) -> Tensor:
    """Nats per token [n, s] of texts under a plan, or each under its own, on the host.

    Texts of different plans are read as isolated documents of one sequence.
    """
    n, s = tokens.shape
    size, found = max(1, tokens_at_once(model.run.model.vocab_size) // s), []
    for rows in torch.arange(n).split(size):
        if isinstance(plan, Plan):
            found.append(_pass(model, tokens[rows], labels[rows], plan, None))
        else:
            joined = ModePlan.from_mask(np.concatenate([plan[i].is_attention() for i in rows]))
            documents = torch.arange(len(rows) + 1, dtype=torch.int32) * s
            found.append(
                _pass(model, tokens[rows].view(1, -1), labels[rows].view(1, -1), joined, documents).view(-1, s)
            )
    return torch.cat(found)


def _pass(model: LoadedModel, tokens: Tensor, labels: Tensor, plan: Plan, documents: Tensor | None) -> Tensor:
    """Losses [b, s] by the step that training evaluates with, on the host."""
    program = OryxProgram(model.run.model)
    with torch.no_grad():
        placed = program.place(Microbatch(tokens, labels, torch.ones(tokens.shape), plan, documents), model.chunk)
        losses = program.forward(placed, model.chunk)[0]
        return placed.info.restore(losses).float().cpu()


def fit(router: OryxRouter, gains: Gains, options: RouterConfig, generator: torch.Generator) -> None:
    """Train a router to predict gains: the mean of what is to come, by which a budget is spent best.

    All ranks hold equal weights and average their gradients.
    """
    device, count = platform.device(), len(gains.tokens)
    targets = gains.gains.clamp(-CLIP, CLIP)
    steps = options.epochs * -(-count // options.batch_size)
    optimizer = torch.optim.AdamW(
        router.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=steps + 1, pct_start=min(0.1, 20 / steps), anneal_strategy="cos"
    )
    router.train()
    loss = torch.zeros(())
    for epoch in range(options.epochs):
        for rows in torch.randperm(count, generator=generator).split(options.batch_size):
            scores, _ = router(gains.tokens[rows].to(device))
            weights = gains.counted[rows].to(device).float()
            loss = ((scores - targets[rows].to(device)).square() * weights).sum() / weights.sum().clamp_min(1.0)
            optimizer.zero_grad()
            loss.backward()
            _average(router)
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        log.info("router: epoch %d of %d, squared error %.4f", epoch + 1, options.epochs, loss.item())


def compare(model: LoadedModel, router: OryxRouter, held_out: Gains, scores: Tensor) -> list[Row]:
    """Held-out loss under all attention, all recurrence, evenly spread chunks, and the router, at some shares.

    `scores` [n, s]: the router's of these texts, on the host.
    """
    length = held_out.tokens.shape[1]
    plans: dict[str, list[ModePlan]] = {}
    for share in SHARES:
        evenly = parse_plan(f"ratio:{share:g}", length, chunk=model.run.modes.chunk).anywhere  # the same in all layers
        plans[f"ratio:{share:g}"] = [evenly] * len(scores)
    for share in SHARES:
        attends = (scores > router.threshold(share)).numpy()
        plans[f"router:{share:g}"] = [ModePlan.from_mask(row) for row in attends]
    rows = []
    for spec in ("attention", "recurrent", *plans):
        if spec in ("attention", "recurrent"):
            losses, share = held_out.losses[int(spec == "recurrent")], float(spec == "attention") * len(held_out.tokens)
        else:
            losses = losses_of(model, held_out.tokens, held_out.labels, plans[spec])
            share = sum(plan.attention_share for plan in plans[spec])
        loss = (losses * held_out.counted).sum(dtype=torch.float64)
        sums = [float(loss), float(held_out.counted.sum()), share, len(held_out.tokens)]
        total = _summed(torch.tensor(sums, dtype=torch.float64))
        rows.append(Row(spec, float(total[2] / total[3]), float(total[0] / total[1])))
    return rows


def _embedding(model: LoadedModel) -> Tensor:
    return unwrap_model(model.chunk).embedding.word_embeddings.weight.detach().float().cpu()


def _average(router: OryxRouter) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for parameter in router.parameters():
            assert parameter.grad is not None  # every part of a router takes part in every score
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def _summed(values: Tensor) -> Tensor:
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return values
    there = values.to(platform.device())
    torch.distributed.all_reduce(there)
    return there.cpu()


def _everywhere(scores: Tensor) -> Tensor:
    """Scores of all ranks, each [n] of its own length."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return scores
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, scores.cpu())
    return torch.cat(parts)
