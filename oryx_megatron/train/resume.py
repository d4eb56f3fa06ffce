"""What a resumed run should be told before it trains: nothing left to do, or a learning rate that jumps."""

from __future__ import annotations

import logging

from oryx_megatron.checkpoint import Manifest
from oryx_megatron.config.batch_sizes import SampleCount, planned
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.train.schedule import learning_rate

log = logging.getLogger(__name__)

JUMP = 0.01
"""Relative change of the learning rate that is told."""


def tell(manifest: Manifest, run: RunConfig, root: str) -> None:
    """Log how a run resumes from a checkpoint of `root`."""
    done, train = manifest.iteration, run.train
    log.info("resumed from iteration %d of %s", done, root)
    then, now = manifest.count(), sample_count(manifest, run)
    if (before := then.batch_at(done)) != (after := now.batch_at(done)) and done < train.iterations:
        log.info(
            "train.global_batch_size %d → %d from step %d on: samples continue at %d; learning rate and schedules stay "
            "per step", before, after, done + 1, now.samples_at(done),
        )  # fmt: skip
    if done >= train.iterations:
        log.info("already at train.iterations=%d; increase it to continue", train.iterations)
    elif train.exit_after is not None and done >= train.exit_after:
        log.warning(
            "already at iteration %d, train.exit_after=%d; increase or remove it to continue", done, train.exit_after
        )
    elif manifest.data["train"] is not None and (text := jump(manifest.run(), run, done)):
        log.warning("%s", text)


def sample_count(manifest: Manifest, run: RunConfig) -> SampleCount:
    """Samples by iteration of a run that resumes from a checkpoint, which its config may have changed from there on.

    Raises:
        CheckpointError: the checkpoint's config cannot be read.
    """
    count = manifest.count()
    if planned(manifest.run().train) == planned(run.train):
        return count
    return count.continued(manifest.iteration, planned(run.train))


def jump(then: RunConfig, now: RunConfig, done: int) -> str:
    """How the learning rate jumps after `done` steps because the config changed, in words; empty when it does not."""
    changes = [
        f"{name} {before} → {after}"
        for name, before, after in (
            ("train.iterations", then.train.iterations, now.train.iterations),
            ("optimizer.lr", then.optimizer.lr, now.optimizer.lr),
            *(
                (f"schedule.{field}", getattr(then.schedule, field), getattr(now.schedule, field))
                for field in ("name", "warmup", "min_lr", "decay", "decay_shape", "restarts", "rewarm")
            ),
        )
        if before != after
    ]
    if not changes or not done:
        return ""
    expected, found = learning_rate(then, done), learning_rate(now, done)
    if abs(found - expected) <= JUMP * max(found, expected):
        return ""
    text = (
        f"the learning rate jumps from {learning_rate(then, done - 1):.3g} in step {done} to {found:.3g} in step "
        f"{done + 1}: {', '.join(changes)}"
    )
    if done < then.train.iterations or now.schedule.name == "constant":
        return text
    restarts = [*now.schedule.restarts, done]
    return f"{text}; to warm up again from there: schedule.restarts={restarts} schedule.rewarm=N"
