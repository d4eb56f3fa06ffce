"""Loss, perplexity and bits per byte per mode plan over an indexed dataset, from a checkpoint, on any ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from oryx_megatron import parallel, platform
from oryx_megatron.checkpoint import Manifest, check_whole, find_checkpoint, load_model_weights, read_manifest
from oryx_megatron.config.schema import (
    BlendEntry,
    CheckpointConfig,
    EvaluationConfig,
    FaultsConfig,
    LoggingConfig,
    ModesConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    WeightsKind,
)
from oryx_megatron.config.validate import RUN_SETS, Layout, validate
from oryx_megatron.data.indexed import open_dataset
from oryx_megatron.data.loader import build_datasets, evaluation_samples, first_blend
from oryx_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.routed import Plans, routes
from oryx_megatron.model import build_model
from oryx_megatron.ops import backends
from oryx_megatron.train.evaluate import Evaluation, evaluate


@dataclass(frozen=True)
class Perplexity:
    """What was evaluated and what came out, equal on every rank."""

    checkpoint: Path
    manifest: Manifest
    results: list[Evaluation]


def evaluate_checkpoint(
    path: str | Path,
    plans: tuple[str, ...] | None = None,
    *,
    data: str | None = None,
    batches: int | None = None,
    batch_size: int = 1,
    sequence_length: int | None = None,
    layout: ParallelConfig | None = None,
    tokenizer: str | None = None,
    weights: WeightsKind = "trained",
    world_size: int = 1,
) -> Perplexity:
    """Evaluate a checkpoint (or a run's newest one) under every plan. Collective: all ranks call it alike.

    Args:
        path: Checkpoint or run folder, written under any layout.
        plans: Mode plan specs; default the run's evaluation.plans.
        data: Prefix of an indexed dataset, used whole; default the validation part of the run's own data.
        batches: Global batches to read; default all of `data`, or the run's evaluation.batches.
        batch_size: Sequences per forward pass and rank.
        sequence_length: Tokens per sequence; default the run's.
        layout: Parallel sizes of this evaluation; default data-parallel over all ranks.
        tokenizer: Its folder; default the run's.
        weights: Those that were trained, or their average (train.ema).
        world_size: Number of ranks.

    Raises:
        CheckpointError, DataError, ConfigError: what the user can fix, on every rank alike.
    """
    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    trained = manifest.run()
    plans = trained.evaluation.plans if plans is None else plans
    run, sizes = _evaluation_run(
        trained,
        tuple(plan for plan in plans if not routes(plan)),
        data,
        batches,
        batch_size,
        sequence_length,
        layout or ParallelConfig(),
        tokenizer,
        world_size,
    )
    used_tokenizer = load_tokenizer(run.data.tokenizer)
    check_tokenizer(used_tokenizer, manifest.tokenizer, str(folder))
    name = "valid" if data is None else _set_name(data)
    if data is not None and batches is None:
        held = open_dataset(data, vocab_size=used_tokenizer.vocab_size, tokenizer=used_tokenizer.describe())
        if held.tokens <= run.data.sequence_length:
            raise ConfigError(
                f"{data} has {held.tokens} tokens, too few for one sample of {run.data.sequence_length} and its last "
                "label; use a smaller sequence length"
            )
    platform.use_kernel_cache(run.kernels.cache_dir)
    parallel.initialize(run.parallel, seed=run.seed)
    check_whole(folder, manifest)
    text_plans = Plans.of_checkpoint(folder, run.modes.chunk, plans).of_texts(plans)
    backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
    asked = {name: evaluation_samples(run)}
    datasets = build_datasets(run, used_tokenizer, asked, once=True)
    chunks = build_model(run.model, run.parallel, run.precision, seed=run.seed)
    load_model_weights(folder, chunks, weights)
    with torch.inference_mode(False):
        results = evaluate(
            run,
            sizes,
            chunks,
            datasets,
            used_tokenizer,
            data_rank=parallel_state.get_data_parallel_rank(),
            plans=plans,
            text_plans=text_plans,
        )
    return Perplexity(folder, manifest, results)


def _evaluation_run(
    run: RunConfig,
    plans: tuple[str, ...],
    data: str | None,
    batches: int | None,
    batch_size: int,
    sequence_length: int | None,
    layout: ParallelConfig,
    tokenizer: str | None,
    world_size: int,
) -> tuple[RunConfig, Layout]:
    """The run's config with the data, sizes and layout of this evaluation, validated.

    What only training reads is left out, so that its rules (batch sizes to come, the best checkpoint's plan, ranks that
    are profiled) do not hold here.
    """
    ranks = layout.tensor * layout.pipeline * layout.context
    dp = max(1, world_size // ranks)
    validation: dict[str, tuple[BlendEntry, ...]] = {} if data is None else {_set_name(data): (BlendEntry(path=data),)}
    run = dataclasses.replace(
        run,
        parallel=layout,
        data=dataclasses.replace(
            run.data,
            sequence_length=run.data.sequence_length if sequence_length is None else sequence_length,
            tokenizer=tokenizer or run.data.tokenizer,
            blend=first_blend(run),
            stages=(),
            validation=validation,
        ),
        # One microbatch per rank and pipeline stage keeps every stage busy.
        train=TrainConfig(
            iterations=run.train.iterations,
            micro_batch_size=batch_size,
            global_batch_size=batch_size * dp * layout.pipeline,
        ),
        modes=ModesConfig(chunk=run.modes.chunk, fixed=run.model.single_mode),
        evaluation=EvaluationConfig(
            plans=plans,
            batches=run.evaluation.batches if batches is None and data is None else batches,  # None: all of `data`
        ),
        init_from=None,
        router=None,
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(),
        checkpoint=CheckpointConfig(),
        faults=FaultsConfig(),
        logging=LoggingConfig(),
    )
    return run, validate(run, world_size)


def _set_name(data: str) -> str:
    """What results call a dataset: the name of its files, with their folder's where a run has that name already."""
    path = Path(data)
    return path.name if path.name not in RUN_SETS else f"{path.parent}/{path.name}"
