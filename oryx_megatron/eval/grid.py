"""Retrieval accuracy over tasks × lengths × mode plans: run, table, JSON and plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.data.files import mark, replacing, write_json
from oryx_megatron.display import plain_texts, shown
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.generation import LoadedModel
from oryx_megatron.eval.retrieval import RetrievalBatch, RetrievalTask, Score, score
from oryx_megatron.model import SequenceInfo
from oryx_megatron.modes import ModePlan, Plan, plan_for

Predict = Callable[[Tensor, Plan], Tensor]
"""(tokens [n, s], plan) → most likely next token after each, [n, s]."""


@dataclass(frozen=True)
class Cell:
    """One task at one length under one plan."""

    task: str
    length: int
    plan: str
    attention_share: float
    """Share of the tokens in attention mode, mean over layers."""
    accuracy: float
    """Share of answers found in full."""
    token_accuracy: float
    answers: int


def run_grid(
    predict: Predict,
    tasks: Sequence[RetrievalTask],
    lengths: Sequence[int],
    plans: Sequence[str],
    *,
    chunk: int,
    examples: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    on_cell: Callable[[Cell], None] | None = None,
    text_plans: Mapping[str, Callable[[Tensor], ModePlan]] | None = None,
    layers: Sequence[bool] = (),
) -> list[Cell]:
    """Score every combination on the same texts per task and length.

    Args:
        predict: The model.
        tasks: What to ask.
        lengths: Tokens per text.
        plans: Mode plan specs; `chunk` is the chunk of `ratio:R` and `every:K`.
        examples: Texts per task and length.
        batch_size: Texts per call of `predict`.
        seed: Of the texts.
        on_cell: Called with every result.
        text_plans: Of the specs whose plan depends on the text (`router:R`).
        layers: The model's, true for those that read plans; plans by layer need them.

    Raises:
        ConfigError: a plan that does not parse at a length, or a length too small for a task.
    """
    routed = text_plans or {}
    parsed = {
        (spec, length): plan_for(layers, spec, length, chunk=chunk)
        for spec in plans
        if spec not in routed
        for length in lengths
    }
    cells = []
    for task in tasks:
        for length in lengths:
            batch = task.sample(length, examples, seed)
            for spec in plans:
                total, shares = Score(0, 0, 0, 0), []
                for part in _parts(batch, 1 if spec in routed else batch_size):
                    plan = routed[spec](part.tokens[0]) if spec in routed else parsed[spec, length]
                    total += score(predict(part.tokens, plan), part)
                    shares.append(plan.attention_share)
                cells.append(
                    Cell(
                        task.name,
                        length,
                        spec,
                        statistics.mean(shares),
                        total.accuracy,
                        total.token_accuracy,
                        total.answers,
                    )
                )
                if on_cell is not None:
                    on_cell(cells[-1])
    return cells


def _parts(batch: RetrievalBatch, size: int) -> list[RetrievalBatch]:
    parts = []
    for start in range(0, len(batch.tokens), size):
        rows = slice(start, start + size)
        inside = (batch.answers[:, 0] >= start) & (batch.answers[:, 0] < start + size)
        answers = batch.answers[inside] - torch.tensor([start, 0, 0])
        parts.append(RetrievalBatch(batch.tokens[rows], batch.labels[rows], answers))
    return parts


def predict_with_checkpoint(model: LoadedModel) -> Predict:
    """Predictions of a training checkpoint; under tensor parallelism every rank calls it alike."""

    @torch.inference_mode()
    def predict(tokens: Tensor, plan: Plan) -> Tensor:
        info = SequenceInfo.build(plan, device=platform.device())
        logits = model.chunk(
            tokens.to(platform.device()), None, None, packed_seq_params=info, runtime_gather_output=True
        )
        return logits.argmax(-1).cpu()

    return predict


def predict_with_export(model: Any) -> Predict:
    """Predictions of a Hugging Face Oryx model (or any causal model there, when the plan is all attention)."""

    @torch.inference_mode()
    def predict(tokens: Tensor, plan: Plan) -> Tensor:
        options: dict[str, Any] = {}
        if model.config.model_type == "oryx":
            options["mode_plan"] = torch.from_numpy(plan.is_attention())
        elif plan.attention_share < 1:
            raise ConfigError(f"a {model.config.model_type} model attends to all tokens; its only plan is `attention`")
        return model(tokens.to(model.device), use_cache=False, **options).logits.argmax(-1).cpu()

    return predict


def write_cells(cells: Sequence[Cell], path: str | Path, **about: Any) -> None:
    """Write results as JSON, with what `about` says of the model and settings."""
    write_json(path, {**about, "cells": [asdict(cell) for cell in cells]})


def plot_cells(cells: Sequence[Cell], path: str | Path, title: str = "") -> None:
    """Plot accuracy against the share of attention tokens, one panel per task, one line per length (PNG)."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    figure = Figure(figsize=(4.2 * len(tasks) + 0.6, 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], tasks):
        for number, length in enumerate(lengths):
            points = sorted(
                (cell.attention_share, cell.accuracy, cell.plan)
                for cell in cells
                if cell.task == task and cell.length == length
            )
            colour = f"C{number}"
            axes.plot([x for x, *_ in points], [y for _, y, _ in points], "o-", color=colour, label=f"{length} tokens")
            if length == lengths[-1]:
                for x, y, plan in points:
                    axes.annotate(plan, (x, y), xytext=(3, 4), textcoords="offset points", fontsize=6)
        axes.set(title=task, xlabel="share of attention tokens", xlim=(-0.04, 1.12), ylim=(-0.04, 1.08))
        axes.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("answers found")
    first.legend(fontsize=7, loc="best")
    if title:
        figure.suptitle(shown(title))
    plain_texts(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140, metadata=mark("png"))
