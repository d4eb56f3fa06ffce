"""What a resumed run should be told before it trains: nothing left to do, changed fields, a jump of lr."""

from __future__ import annotations

import logging
from typing import Any

from oryx_megatron.checkpoint import Manifest
from oryx_megatron.config.batch_sizes import SampleCount, planned
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.train.differences import differences, to_text
from oryx_megatron.train.schedule import learning_rate

log = logging.getLogger(__name__)

NOT_TOLD = (
    *("output_dir", "init_from", "license", "checkpoint", "evaluation", "logging", "kernels.cache_dir"),
    "train.exit_after",
)
"""Of a resumed run: what changes nothing of what it computes."""
JUMP = 0.01
"""Relative change of the learning rate that is told."""


def tell(manifest: Manifest, run: RunConfig, root: str) -> list[tuple[str, Any, Any]]:
    """Log how a run resumes from a checkpoint of `root`; returns the fields that changed, with both values."""
    log.info("resumed from iteration %d of %s", manifest.iteration, root)
    for level, text in lines(manifest, run):
        log.log(level, "%s", text)
    return [] if manifest.data["train"] is None else changes(manifest.run(), run)


def lines(manifest: Manifest, run: RunConfig) -> list[tuple[int, str]]:
    """What there is to tell of a resume from a checkpoint, each with its level of logging."""
    done, train, found = manifest.iteration, run.train, []
    then, now = manifest.count(), sample_count(manifest, run)
    if (before := then.batch_at(done)) != (after := now.batch_at(done)) and done < train.iterations:
        text = f"samples continue at {now.samples_at(done)}; learning rate and schedules stay per step"
        found.append((logging.INFO, f"train.global_batch_size {before} → {after} from step {done + 1} on: {text}"))
    if now.sizes != planned(train) and done < train.iterations:
        samples = now.samples_at(train.iterations)
        found.append((logging.INFO, f"batch sizes with those of the steps before: {now}; {samples:,} samples in all"))
    if done >= train.iterations:
        found.append((logging.INFO, f"already at train.iterations={train.iterations}; increase it to continue"))
    elif train.exit_after is not None and done >= train.exit_after:
        text = f"already at iteration {done}, train.exit_after={train.exit_after}; increase or remove it to continue"
        found.append((logging.WARNING, text))
    elif manifest.data["train"] is not None and (text := jump(manifest.run(), run, done)):
        found.append((logging.WARNING, text))
    if manifest.data["train"] is None:  # a conversion
        return found
    for name, old, new in changes(manifest.run(), run):
        found.append((logging.INFO, f"changed since the checkpoint: {name} {to_text(old)} → {to_text(new)}"))
    return found


def sample_count(manifest: Manifest, run: RunConfig) -> SampleCount:
    """Samples by iteration of a run that resumes from a checkpoint, which its config may have changed from there on.

    Raises:
        CheckpointError: the checkpoint's config cannot be read.
    """
    count = manifest.count()
    if planned(manifest.run().train) == planned(run.train):
        return count
    return count.continued(manifest.iteration, planned(run.train))


def changes(then: RunConfig, now: RunConfig) -> list[tuple[str, Any, Any]]:
    """Fields of what a run computes that differ from those of its checkpoint: name, value there, value here."""
    return differences(then, now, NOT_TOLD)


def jump(then: RunConfig, now: RunConfig, done: int) -> str:
    """How the learning rate jumps after `done` steps because the config changed, in words; empty when it does not."""
    changes = [
        f"{name} {to_text(before)} → {to_text(after)}"
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
    last, expected, found = learning_rate(then, done - 1), learning_rate(then, done), learning_rate(now, done)
    if any(abs(found - other) <= JUMP * max(found, other) for other in (last, expected)):
        return ""
    text = (
        f"the learning rate jumps from {last:.3g} in step {done} to {found:.3g} in step "
        f"{done + 1}: {', '.join(changes)}"
    )
    if done < then.train.iterations or now.schedule.name == "constant":
        return text
    restarts, rewarm = [*now.schedule.restarts, done], now.schedule.rewarm or "N"
    return f"{text}; to warm up again from there: schedule.restarts={restarts} schedule.rewarm={rewarm}"
