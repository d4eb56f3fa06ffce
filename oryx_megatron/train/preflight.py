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
from oryx_megatron.checkpoint.remote import foreign
from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.loader import BlendPreview, preview_datasets
from oryx_megatron.data.tokenizer import Tokenizer, load_tokenizer
from oryx_megatron.errors import ConfigError
from oryx_megatron.ops import backends
from oryx_megatron.paths import is_url
from oryx_megatron.storage import cache_folder
from oryx_megatron.train import freeze, init_from, manifests, resume
from oryx_megatron.train.intervals import retention
from oryx_megatron.train.remote import run_folder
from oryx_megatron.train.sizes import check_sizes

GIB = 2.0**30
MASTER_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Checked:
    """What one check of a dry run found."""

    what: str
    """Empty: a line that the start of the run logs."""
    found: str


def checks(run: RunConfig, layout: Layout) -> Iterator[Checked]:
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
    data = preview_datasets(run, tokenizer, expected)
    for name, seen in data.items():
        for part in seen.parts:
            wanted = f"{'' if name == 'train' else 'up to '}{part.samples:,} samples"
            yield Checked(
                name, f"{part.path}: {wanted} of {run.data.sequence_length:,} tokens, {part.epochs:.2f} epochs"
            )
    backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
    yield Checked("kernels", f"{backends.describe()} ({'GPU' if platform.has_gpu() else 'CPU'})")
    if run.optimizer.name == "muon":
        yield Checked("muon", arch.muon_line(run.model))
    if run.train.freeze:
        names = freeze.names(run.model)
        freeze.check(run.train.freeze, names)
        frozen = sum(freeze.is_frozen(name, run.train.freeze) for name in names)
        yield Checked("freeze", f"{frozen:,} of {len(names):,} weights and parts of weights")
    start, lines = _start(run, layout, root, tokenizer, data["train"], expected)
    yield Checked("start", start)
    yield Checked("disk", _disk(run, root, len(store.list_folders(root))))
    for line in lines:
        yield Checked("", line)


def _start(
    run: RunConfig, layout: Layout, root: Path, tokenizer: Tokenizer, data: BlendPreview, count: SampleCount
) -> tuple[str, list[str]]:
    """Where the run starts, and what it tells then."""
    name = f"{run.output_dir}/checkpoints"
    if own := store.list_folders(root):
        if (manifest := init_from.newest_own(root)) is None:
            raise store.all_damaged(name, [folder.name for folder in reversed(own)])
        manifests.check(manifest, run, name=name, root=root, count=count, blend=data)
        layout.microbatches_from(manifest.iteration, count, run.train)
        lines = [text for _, text in resume.lines(manifest, run)]
        if run.init_from is not None:
            lines.insert(0, init_from.NO_EFFECT)
        return f"resumes from iteration {manifest.iteration} of {name}", lines
    if others := foreign(name) if is_url(run.output_dir) else store.foreign_files(root):
        raise store.not_ours(name, others[0])
    lines = init_from.preview(run, tokenizer, data)
    layout.microbatches_from(count.iteration, count, run.train)
    if run.init_from is None:
        return f"new weights, seed {run.seed}", lines
    return f"from {run.init_from.path}, as listed below", lines


def checkpoint_bytes(run: RunConfig) -> int:
    """Size of one checkpoint: weights, masters, optimizer state and fp32 average, if any, of every parameter."""
    width = 4 if run.precision.dtype == "fp32" else 2
    average = 0 if run.train.ema is None else 4
    parameters = arch.parameter_counts(run.model).total
    return parameters * (width + average + MASTER_BYTES) + arch.moment_bytes(run.model, run.optimizer.name)


def checkpoints_held(run: RunConfig) -> int:
    """Most checkpoints on disk at once: those kept, and the one being written."""
    settings, last = retention(run), run.train.iterations
    saved = last // settings.interval + bool(last % settings.interval) if settings.interval else 1
    listed = {step for step in settings.steps if step < last}
    saved += len([step for step in listed if not settings.interval or step % settings.interval or not step])
    kept = saved if settings.keep == 0 else settings.keep
    if settings.keep and settings.keep_every and settings.interval:
        kept += last // settings.keep_every
    if settings.keep:
        kept += len(listed) + (settings.keep_best is not None)
    return min(kept + 1, saved)


def _disk(run: RunConfig, root: Path, there: int) -> str:
    """Room for the checkpoints, of a run on object storage for the copies here; ConfigError when not one fits."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    size, held = checkpoint_bytes(run), checkpoints_held(run)
    if is_url(run.output_dir):  # copies alone take room here: of the newest, and of the one that is being written
        held, there = min(held, 2), min(there, 1)
        where, place = f"copies in {cache_folder()}", f"storage.cache_dir {cache_folder()}"
        another, advice = "folder", "make room, or set storage.cache_dir"
    else:
        where, place = run.output_dir, f"output_dir {run.output_dir}"
        another, advice = "disk", "lower checkpoint.keep or make room"
    if free < size:
        raise ConfigError(
            f"{place}: a checkpoint takes {size / GIB:,.2f} GiB, {free / GIB:,.2f} GiB are free; make room or choose "
            f"another {another}"
        )
    text = f"{free / GIB:,.1f} GiB free for {where}; {held} checkpoints of {size / GIB:,.2f} GiB"
    return text if free >= size * max(held - there, 1) else f"{text}: too little for all of them; {advice}"
