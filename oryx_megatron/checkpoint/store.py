"""Folders of checkpoints: names, completeness, atomic appearance, retention.

In RUN/checkpoints:

    iteration_0001000/   complete: it has a manifest, written last and renamed into place
    .writing_0002000/    a save in progress, or one that died; removed at the next save
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from oryx_megatron.checkpoint.manifest import NAME, Manifest, file_digest, read_manifest
from oryx_megatron.errors import CheckpointError

PREFIX, WRITING = "iteration_", ".writing_"
SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""What DeepSpeed lays beside its checkpoints."""


def list_checkpoints(root: str | Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    return [folder for folder in list_folders(root) if (folder / NAME).is_file()]


def list_folders(root: str | Path) -> list[Path]:
    """Folders under `root` with the name of a checkpoint, complete or not, oldest first."""
    folders = Path(root).glob(f"{PREFIX}*")
    return sorted((f for f in folders if f.name.removeprefix(PREFIX).isdecimal()), key=iteration_of)


def foreign_files(root: Path) -> list[str]:
    """Names under `root` that no run of this project put there."""
    if not root.is_dir():
        return []
    return sorted(f.name for f in root.iterdir() if not f.name.startswith((PREFIX, WRITING)) and f.name not in SCRIPTS)


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


def by_deepspeed(folder: Path) -> bool:
    """Whether a checkpoint holds DeepSpeed's files, which nothing but DeepSpeed reads."""
    return any(folder.glob("*_model_states.pt"))


def check_format(folder: Path) -> None:
    """Raise CheckpointError for a checkpoint in DeepSpeed's format."""
    if by_deepspeed(folder):
        raise CheckpointError(f"{folder} was written by DeepSpeed; convert it (tools/convert_from_deepspeed.py)")


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


def apply_retention(root: Path, keep: int, keep_every: int, *, damaged: Collection[str] = ()) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those at multiples of `keep_every`; returns the removed.

    Damaged ones (those named, and those with files missing or of another size) do not count as kept. They go like any
    other once `keep` whole newer ones exist.
    """
    if keep <= 0:
        return []
    removed = []
    whole = 0
    for folder in reversed(list_checkpoints(root)):
        if whole < keep:
            whole += folder.name not in damaged and _complete(folder)
        elif not (keep_every and iteration_of(folder) % keep_every == 0):
            # Without its manifest it no longer counts as complete, should this stop half-way.
            (folder / NAME).unlink()
            shutil.rmtree(folder)
            removed.append(folder)
    return removed[::-1]


def _complete(folder: Path) -> bool:
    """Whether all files are there in their sizes; their contents are compared at load."""
    try:
        files = read_manifest(folder).files
        return all((folder / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (CheckpointError, OSError):
        return False


def damaged_files(folder: Path, manifest: Manifest, *, shard: int = 0, shards: int = 1) -> list[str]:
    """Names of files that are missing or differ from the manifest, among every `shards`-th file."""
    bad = []
    for name, expected in sorted(manifest.files.items())[shard::shards]:
        try:
            if file_digest(folder / name) != expected:
                bad.append(name)
        except OSError:  # missing, or the disk cannot read it
            bad.append(name)
    return bad


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
