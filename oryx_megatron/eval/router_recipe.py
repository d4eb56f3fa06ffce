"""What a run's `router` asks for: to train the model's router when the run has ended, and to evaluate its plans.

Imports little: `recipe` is asked before a run begins.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable
from pathlib import Path

from oryx_megatron.config.schema import RouterConfig, RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.display import shown

log = logging.getLogger(__name__)


def recipe(run: RunConfig) -> Callable[[RunConfig, Layout], None] | None:
    """What a run's `router` asks for when the run has ended; None for a run without.

    Raises:
        DataError: a file in the way that is not a router.
    """
    if run.router is None:
        return None
    from oryx_megatron.data.files import check_output
    from oryx_megatron.hf.router import NAME, is_router

    check_output(Path(run.output_dir) / NAME, ours=is_router, overwrite=True)
    return after_training


def after_training(run: RunConfig, layout: Layout) -> None:
    """Train the router that a run's config asks for, once the run has ended, and evaluate its plans. Collective.

    What is there of both is not done again. The run's process groups are given up.

    Raises:
        DataError, CheckpointError: what cannot be read; a file in the way that is not a router.
    """
    from oryx_megatron import parallel
    from oryx_megatron.checkpoint import find_checkpoint, read_manifest
    from oryx_megatron.eval.perplexity import evaluate_checkpoint
    from oryx_megatron.eval.router_training import table, train_router
    from oryx_megatron.hf.plans_oryx import routed_share
    from oryx_megatron.hf.router import router_of
    from oryx_megatron.train.callbacks.metrics_file import MetricsFile
    from oryx_megatron.train.metrics import NAME, read_lines

    folder = find_checkpoint(run.output_dir)
    if run.router is None or (iteration := read_manifest(folder).iteration) < run.train.iterations:
        return
    path = router_of(folder)
    if there := _told_by_main(_serves(path, folder, run.router)):
        log.info("router: %s is of this checkpoint already", shown(path))
    else:
        gc.collect()  # what the trained model held
        parallel.release()
        rows, _ = train_router(run.output_dir, run.router, overwrite=True)
        for line in table(rows).splitlines():
            log.info("router: %s", line)
    plans = tuple(spec for spec in run.evaluation.plans if routed_share(spec) is not None)
    metrics = Path(run.output_dir) / NAME
    known = [
        line["plan"] for line in read_lines(metrics) if line["kind"] == "evaluation" and line["iteration"] == iteration
    ]
    if not plans or (there and _told_by_main(set(plans) <= set(known))):
        return
    parallel.release()
    train, stages = run.train, run.parallel.pipeline
    samples = None if run.evaluation.batches is None else run.evaluation.batches * train.global_batch_size
    results = evaluate_checkpoint(
        run.output_dir,
        plans,
        batches=None if samples is None else max(1, samples // (train.micro_batch_size * layout.dp * stages)),
        batch_size=train.micro_batch_size,
        layout=run.parallel,
        world_size=layout.world_size,
    ).results
    for result in results:
        text = "%s under %s: loss %.4f, %.3f bits per byte, %.1f %% attention"
        log.info(text, result.dataset, result.plan, result.loss, result.bits_per_byte, 100 * result.attention_share)
    if parallel.is_main_rank():
        file = MetricsFile(metrics)
        file.on_start(run, iteration)
        file.on_evaluation(iteration, results)
        file.on_end()


def _serves(path: Path, checkpoint: Path, options: RouterConfig) -> bool:
    """Whether a router is of this checkpoint and was trained with these options."""
    from oryx_megatron.hf.router import is_router, load_router

    if not is_router(path) or path.stat().st_mtime < checkpoint.stat().st_mtime:
        return False
    about = load_router(path)[1]
    return about.get("checkpoint") == checkpoint.name and about.get("options") == dataclasses.asdict(options)


def _told_by_main(fact: bool) -> bool:
    """What the main rank found, on all ranks: others may look at its files too late."""
    import torch

    facts = [fact]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(facts)
    return facts[0]
