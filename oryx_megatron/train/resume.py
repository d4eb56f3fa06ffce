"""What a resumed run should be told before it trains: nothing left to do, or a learning rate that jumps."""

from __future__ import annotations

import logging
from pathlib import Path

from oryx_megatron.checkpoint import Manifest
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.train.optimizer import learning_rate

log = logging.getLogger(__name__)

JUMP = 0.01
"""Relative change of the learning rate that is told."""


def tell(manifest: Manifest, run: RunConfig, root: Path) -> None:
    """Log how a run resumes from a checkpoint of `root`."""
    done, train = manifest.iteration, run.train
    log.info("resumed from iteration %d of %s", done, root)
    if done >= train.iterations:
        log.info("already at train.iterations=%d; increase it to continue", train.iterations)
    elif train.exit_after is not None and done >= train.exit_after:
        log.warning(
            "already at iteration %d, train.exit_after=%d; increase or remove it to continue", done, train.exit_after
        )
    elif manifest.data["train"] is not None and (text := jump(manifest.run(), run, done)):
        log.warning("%s", text)


def jump(then: RunConfig, now: RunConfig, done: int) -> str:
    """How the learning rate jumps after `done` steps because the config changed, in words; empty when it does not."""
    changes = [
        f"{name} {before} → {after}"
        for name, before, after in (
            ("train.iterations", then.train.iterations, now.train.iterations),
            ("optimizer.lr", then.optimizer.lr, now.optimizer.lr),
            *(
                (f"schedule.{field}", getattr(then.schedule, field), getattr(now.schedule, field))
                for field in ("name", "warmup", "min_lr", "decay", "decay_shape")
            ),
        )
        if before != after
    ]
    if not changes or not done:
        return ""
    expected, found = learning_rate(then, done), learning_rate(now, done)
    if abs(found - expected) <= JUMP * max(found, expected):
        return ""
    return (
        f"the learning rate jumps from {learning_rate(then, done - 1):.3g} in step {done} to {found:.3g} in step "
        f"{done + 1}: {', '.join(changes)}"
    )
