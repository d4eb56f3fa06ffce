"""What a run would open, opened before it starts: for --dry-run. One process, no ranks; writes nothing.

A file that is missing, damaged or of another run is the same error, in the same words, as at the start of the run.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from oryx_megatron import arch, platform
from oryx_megatron.checkpoint import store
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.loader import look_at_datasets
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import ConfigError
from oryx_megatron.ops import backends
from oryx_megatron.train import init_from
from oryx_megatron.train.remote import run_folder
from oryx_megatron.train.sizes import check_sizes

GIB = 2.0**30
OPTIMIZER_BYTES = {"adamw": 12, "muon": 8}
"""Of a parameter in a checkpoint, beside the weight: the fp32 master and AdamW's two means, or Muon's one."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """One thing that was looked at."""

    what: str
    found: str


def look(run: RunConfig, layout: Layout) -> Iterator[Checked]:
    """Open what the run would open and say what is there.

    Raises:
        ConfigError, DataError, CheckpointError, ConversionError: what would end the run's start.
    """
    check_sizes(run, layout)
    tokenizer = load_tokenizer(run.data.tokenizer)
    rows = f"{tokenizer.vocab_size:,} tokens for {run.model.vocab_size:,} rows of the embedding"
    yield Checked("tokenizer", f"{run.data.tokenizer}: {tokenizer.kind}, {rows}")
    root = run_folder(run) / "checkpoints"
    expected = init_from.expected_count(run, root)  # of a run on object storage, it brings the manifests here
    own = store.list_folders(root)
    for name, parts in look_at_datasets(run, tokenizer, expected).items():
        for part in parts:
            wanted = f"{'' if name == 'train' else 'up to '}{part.samples:,} samples"
            yield Checked(
                name, f"{part.path}: {wanted} of {run.data.sequence_length:,} tokens, {part.epochs:.2f} epochs"
            )
    backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
    yield Checked("kernels", f"{backends.describe()} ({'GPU' if platform.has_gpu() else 'CPU'})")
    if own:
        yield Checked("start", f"resumes from iteration {store.iteration_of(own[-1])} of {run.output_dir}/checkpoints")
    elif run.init_from is None:
        yield Checked("start", f"new weights, seed {run.seed}")
    else:
        yield Checked("start", f"from {run.init_from.path}, as listed below")
    yield Checked("disk", _disk(run, root, len(own)))


def checkpoint_bytes(run: RunConfig) -> int:
    """Size of one checkpoint: weights, masters, optimizer state and fp32 average, if any, of every parameter."""
    width = 4 if run.precision.dtype == "fp32" else 2
    average = 0 if run.train.ema is None else 4
    return arch.parameter_counts(run.model).total * (width + OPTIMIZER_BYTES[run.optimizer.name] + average)


def checkpoints_held(run: RunConfig) -> int:
    """Most checkpoints on disk at once: those kept, and the one being written."""
    settings, last = run.checkpoint, run.train.iterations
    saved = last // settings.interval + bool(last % settings.interval) if settings.interval else 1
    kept = saved if settings.keep == 0 else settings.keep
    if settings.keep and settings.keep_every and settings.interval:
        kept += last // settings.keep_every
    return min(kept + 1, saved)


def _disk(run: RunConfig, root: Path, there: int) -> str:
    """Room for the checkpoints, of a run on object storage for the copies here; ConfigError when not one fits."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    size, held = checkpoint_bytes(run), checkpoints_held(run)
    text = f"{free / GIB:,.1f} GiB free for {run.output_dir}; {held} checkpoints of {size / GIB:,.2f} GiB"
    if free < size:
        raise ConfigError(
            f"output_dir {run.output_dir}: a checkpoint takes {size / GIB:,.2f} GiB, {free / GIB:,.2f} GiB are free; "
            "make room or choose another disk"
        )
    if free < size * max(held - there, 1):
        text += ": too little for all of them; lower checkpoint.keep or make room"
    return text
