"""Folders of checkpoints: names, completeness, atomic appearance, retention.

    RUN/checkpoints/iteration_0001000/   complete: it has a manifest, written last and renamed into place
    RUN/checkpoints/.writing_0002000/    a save in progress, or one that died; removed at the next save
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from oryx_megatron.checkpoint.manifest import NAME, Manifest, file_digest
from oryx_megatron.errors import CheckpointError

PREFIX, WRITING = "iteration_", ".writing_"


def list_checkpoints(root: str | Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    return [folder for folder in list_folders(root) if (folder / NAME).is_file()]


def list_folders(root: str | Path) -> list[Path]:
    """Folders under `root` with the name of a checkpoint, complete or not, oldest first."""
    folders = Path(root).glob(f"{PREFIX}*")
    return sorted((f for f in folders if f.name.removeprefix(PREFIX).isdecimal()), key=iteration_of)


def foreign_files(root: Path) -> list[str]:
    """Names under `root` that no run of this project put there."""
    known = (PREFIX, WRITING)
    return sorted(f.name for f in root.iterdir() if not f.name.startswith(known)) if root.is_dir() else []


def iteration_of(folder: Path) -> int:
    """Iteration in a checkpoint's folder name."""
    return int(folder.name.removeprefix(PREFIX))


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest one of the run folder `path`.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    if (path / NAME).is_file():
        return path
    for root in (path / "checkpoints", path):
        if found := list_checkpoints(root):
            return found[-1]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint or a run folder")
    raise CheckpointError(f"{path} holds no complete checkpoint (no {PREFIX}*/{NAME})")


def begin(root: Path, iteration: int) -> Path:
    """Make an empty folder for a save, and clear away what earlier failed saves left."""
    for leftover in root.glob(f"{WRITING}*"):
        shutil.rmtree(leftover)
    folder = root / f"{WRITING}{iteration:07d}"
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path) -> Path:
    """Rename a finished save to its final name, durably; a checkpoint of the same iteration is replaced."""
    final = folder.with_name(PREFIX + folder.name.removeprefix(WRITING))
    for file in folder.iterdir():
        _fsync(file)
    _fsync(folder)
    if final.exists():
        old = final.with_name(f"{WRITING}replaced")
        final.rename(old)
        folder.rename(final)
        shutil.rmtree(old)
    else:
        folder.rename(final)
    _fsync(final.parent)
    return final


def apply_retention(root: Path, keep: int, keep_every: int) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those at multiples of `keep_every`; returns the removed."""
    if keep <= 0:
        return []
    removed = []
    for folder in list_checkpoints(root)[:-keep]:
        if not (keep_every and iteration_of(folder) % keep_every == 0):
            # Without its manifest it no longer counts as complete, should this stop half-way.
            (folder / NAME).unlink()
            shutil.rmtree(folder)
            removed.append(folder)
    return removed


def damaged_files(folder: Path, manifest: Manifest, *, shard: int = 0, shards: int = 1) -> list[str]:
    """Names of files that are missing or differ from the manifest, among every `shards`-th file."""
    bad = []
    for name, expected in sorted(manifest.files.items())[shard::shards]:
        path = folder / name
        if not path.is_file() or file_digest(path) != expected:
            bad.append(name)
    return bad


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
