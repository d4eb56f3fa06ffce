"""What a checkpoint's manifest says of its run, and whether a run may resume from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from oryx_megatron import platform
from oryx_megatron.checkpoint import Manifest
from oryx_megatron.checkpoint.manifest import Digests, package_versions
from oryx_megatron.config import to_dict
from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.loader import Blend, BlendPreview, check_resume
from oryx_megatron.errors import WEIGHTS_ALONE, CheckpointError
from oryx_megatron.train.differences import SHAPES, foreign_optimizer, told, unlike
from oryx_megatron.train.init_from import Start

OF_NO_MATTER = ("name", "recurrence_chunk", "init_std", "decay_init", "dt_init")
"""Fields of a model that may change on the way: they alter neither its parameters nor what it computes."""


def make(
    files: Digests,
    run: RunConfig,
    layout: Layout,
    start: Start,
    *,
    iteration: int,
    samples: int,
    stream: dict[str, Any],
    tokenizer: dict[str, Any],
    evaluations: list[dict[str, Any]],
    guard: dict[str, Any],
) -> Manifest:
    """The manifest of a checkpoint.

    Args:
        files: Digests of its files.
        run: The config.
        layout: How ranks are used.
        start: Where the run started.
        iteration: Steps done.
        samples: Samples that these steps read; those skipped by rollbacks are in `guard`.
        stream: State of the sample stream.
        tokenizer: `Tokenizer.describe()`.
        evaluations: The latest results.
        guard: State of the guard.
    """
    return Manifest(
        iteration=iteration,
        consumed_samples=samples + guard["skipped_samples"],
        config=to_dict(run),
        layout={
            name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "dp", *(["ep"] if layout.ep > 1 else []))
        },
        rng={"seed": run.seed, "state": "none: every draw is a function of seed, iteration, microbatch"},
        data={"train": stream, "tokenizer": tokenizer},
        evaluations=evaluations,
        versions=package_versions(),
        commit=platform.git_commit(),
        files=files,
        guard=guard,
        init_from=start.record,
        origin=[start.count.iteration, start.count.samples],
        batch_sizes=[list(piece) for piece in start.count.sizes],
    )


def check(
    manifest: Manifest, run: RunConfig, *, name: str, root: Path, count: SampleCount, blend: Blend | BlendPreview
) -> None:
    """Refuse to resume from the checkpoint of another model, or of other data or batches so far.

    Args:
        manifest: Of the checkpoint.
        run: The config now.
        name: Where the run's checkpoints are kept, for messages.
        root: Their folder on this machine.
        count: Samples of this run by iteration.
        blend: The training data now.

    Raises:
        CheckpointError, DataError: it does not fit.
    """
    written = manifest.run()
    then, now = written.model, run.model
    fields = tuple(field.name for field in dataclasses.fields(now) if field.name not in OF_NO_MATTER)
    if changed := unlike(then, now, fields):
        fits = not unlike(then, now, SHAPES)
        raise CheckpointError(
            f"{name}: belongs to model {then.name}, which differs in {told(changed)}; "
            f"{_own_config(manifest, root)}{WEIGHTS_ALONE if fits else 'choose another output_dir'}"
        )
    skipped = int(manifest.guard.get("skipped_samples", 0))
    if manifest.consumed_samples != count.samples_at(manifest.iteration) + skipped:
        raise CheckpointError(
            f"{name}: its {manifest.iteration} iterations read {manifest.consumed_samples} samples, which the run's "
            f"batch sizes ({count}) do not give; choose another output_dir"
        )
    if (trained_on := manifest.trained_on) is None:  # a conversion: of weights alone, read from no data
        return
    if (why := foreign_optimizer(written, run)) is not None:
        raise CheckpointError(f"{name}: {why}; set it back, or {WEIGHTS_ALONE}")
    check_resume(trained_on, blend)


def _own_config(manifest: Manifest, root: Path) -> str:
    """Advice where a conversion wrote the config that its checkpoint belongs to."""
    path = root.parent / "config.yaml"
    return f"train {path}, or " if manifest.trained_on is None and path.is_file() else ""
