"""Folders of checkpoints: names, completeness, atomic appearance, retention.

In RUN/checkpoints:

    iteration_0001000/   complete: it has a manifest, written last and renamed into place
    iteration_00001000/  the same, newer: with more zeros, as its save was killed while it replaced the other
    .writing_0002000/    a save in progress, or one that died; removed at the next save, unless a process writes it

What is removed is what a run of this project wrote: links are not followed, and files that someone else put into a
checkpoint stay. What cannot be removed is a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from oryx_megatron.atomic import sync
from oryx_megatron.checkpoint.manifest import (
    NAME,
    PREFIX,
    Manifest,
    age_of,
    file_digest,
    is_checkpoint_name,
    iteration_of,
    lowest,
    next_name,
    read_manifest,
)
from oryx_megatron.checkpoint.remote import fetch_checkpoint
from oryx_megatron.checkpoint.retention import is_own_file, to_remove, warn_once
from oryx_megatron.errors import CheckpointError, ClosedCheckpointError, NewerCheckpointError
from oryx_megatron.paths import is_url

log = logging.getLogger(__name__)

WRITING = ".writing_"
LEFT = re.compile(rf"{re.escape(WRITING)}(\d+|replaced)(\.\d+)?")
"""Names that saves leave behind."""
TEMPORARY = ".metadata.tmp"
"""torch's, while a save is written."""
SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""What DeepSpeed writes beside its checkpoints."""


def list_checkpoints(root: str | Path) -> list[Path]:
    """Complete checkpoints under `root` that stand under their own iteration, oldest first."""
    return [folder for folder in list_folders(root) if (folder / NAME).is_file() and _renamed_from(folder) is None]


def read_own(folder: Path) -> Manifest:
    """Manifest of a checkpoint in the folder of its run.

    Raises:
        ClosedCheckpointError, CheckpointError: see `read_manifest`.
        CheckpointError: it is of another iteration than its name says. As the newest by name every start would resume
            from it, and do again what was done since.
    """
    manifest = read_manifest(folder)
    if manifest.iteration != iteration_of(folder):
        raise CheckpointError(f"{folder} is the checkpoint of iteration {manifest.iteration}, renamed or copied")
    return manifest


def _renamed_from(folder: Path) -> int | None:
    """The iteration of a checkpoint that someone gave the name of another one; None: it has its own, or cannot tell."""
    with contextlib.suppress(CheckpointError):
        iteration = read_manifest(folder).iteration
        return None if iteration == iteration_of(folder) else iteration
    return None


def list_folders(root: str | Path) -> list[Path]:
    """Folders under `root` with the name of a checkpoint, complete or not, oldest first."""
    folders = Path(root).glob(f"{PREFIX}*")
    return sorted((f for f in folders if is_checkpoint_name(f.name)), key=lambda folder: age_of(folder.name))


def foreign_files(root: Path) -> list[str]:
    """Names under `root` that no run of this project put there."""
    if not root.is_dir():
        return []
    return sorted(f.name for f in root.iterdir() if not f.name.startswith((PREFIX, WRITING)) and f.name not in SCRIPTS)


def all_damaged(name: str, damaged: Collection[str]) -> CheckpointError:
    """The error of a run none of whose checkpoints, kept at `name`, is whole."""
    return CheckpointError(
        f"{name}: every checkpoint is damaged ({', '.join(damaged)}); restore one, or start anew in another output_dir"
    )


def not_ours(name: str, found: str) -> CheckpointError:
    """The error of a folder for checkpoints, `name`, that holds something else and no checkpoint."""
    return CheckpointError(f"{name} holds {found}, which is no checkpoint of this project; choose another output_dir")


def find_checkpoint(path: str | Path, *, only: Collection[str] | None = None) -> Path:
    """`path` itself if it is a checkpoint, else the newest one of the run folder `path`; of a URL, a copy of it here.

    Args:
        path: Of a checkpoint or a run; `scheme://…` on object storage.
        only: Of a URL, copy these files and the manifest; None: all.

    Raises:
        CheckpointError: neither.
        StorageError: object storage cannot be read.
    """
    if is_url(str(path)):
        return fetch_checkpoint(str(path), only=only)
    path = Path(path)
    if (path / NAME).is_file():
        return path
    for root in (path / "checkpoints", path):
        if found := list_checkpoints(root):
            return found[-1]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint or a run folder")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the folder of a checkpoint or a run")
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a folder of transformers, and a checkpoint is needed; make one: oryx convert from-hf {path} OUT"
        )
    raise CheckpointError(f"{path} holds no complete checkpoint (no {PREFIX}*/{NAME})")


def by_another_engine(folder: Path, names: Collection[str] = ()) -> bool:
    """Whether a checkpoint holds DeepSpeed's files, which nothing but DeepSpeed reads; `names`: of files elsewhere."""
    return any(folder.glob("*_model_states.pt")) or any(name.endswith("_model_states.pt") for name in names)


def check_format(folder: Path, names: Collection[str] = ()) -> None:
    """Raise CheckpointError for a checkpoint in DeepSpeed's format."""
    if by_another_engine(folder, names):
        raise CheckpointError(f"{folder} was written by DeepSpeed; convert it (oryx convert from-deepspeed)")


def begin(root: Path, iteration: int) -> Path:
    """Make an empty folder for a save, and clear away what earlier failed saves left.

    It is locked until `commit` or `discard`, or the process ends: no other save takes it for a leftover.
    """
    for leftover in root.glob(f"{WRITING}*"):
        _clear(leftover)
    name = f"{WRITING}{iteration:07d}"
    folder = next(path for path in _names(root / name) if not os.path.lexists(path))
    folder.mkdir(parents=True)
    with contextlib.suppress(OSError):  # a file system without locks
        _begun[os.getpid(), folder] = _lock(folder)
    return folder


_begun: dict[tuple[int, Path], int] = {}
"""Locks of the saves of this process. A forked writer inherits them, and so holds them as long as it writes."""


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock of a folder; BlockingIOError where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(folder: Path) -> None:
    if (descriptor := _begun.pop((os.getpid(), folder), None)) is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # for the processes that inherited it, too
        os.close(descriptor)


def _clear(leftover: Path) -> None:
    """Remove what a save left, unless it is being written, or holds anything that no save wrote."""
    _unlock(leftover)
    if leftover.is_dir() and not leftover.is_symlink():
        try:
            os.close(_lock(leftover))
        except BlockingIOError:
            log.warning("%s stays: another process writes it", leftover)
            return
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                log.warning("%s stays: %s", leftover, error.strerror)
                return
        foreign = [name for name in _foreign(leftover) if name != TEMPORARY]
        if foreign or not LEFT.fullmatch(leftover.name):
            what = f"it holds {foreign[0]}, which no save wrote" if foreign else "it has not the name of a save"
            log.warning("%s stays: %s", leftover, what)
            return
    discard(leftover)


def discard(folder: Path) -> None:
    """Remove a save that did not come to its end; what cannot be removed stays, with a warning."""
    _unlock(folder)
    if folder.is_symlink() or not folder.is_dir():
        if os.path.lexists(folder):
            log.warning("%s stays: it is not a folder of a save", folder)
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s, left by a save that failed, cannot be removed (%s)", folder, error)


def commit(folder: Path) -> Path:
    """Rename a finished save to its final name, durably; a checkpoint of the same iteration is replaced.

    One that is a link, a renamed checkpoint of another iteration, or that holds anything else, is renamed and kept. A
    kill at any moment leaves a whole checkpoint of that iteration under a name of a checkpoint.
    """
    final = folder.with_name(PREFIX + folder.name.removeprefix(WRITING).partition(".")[0])
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    _unlock(folder)
    others = [path for path in list_folders(final.parent) if iteration_of(path) == iteration_of(final)]
    if not others:
        folder.rename(final)
        sync(final.parent)
        return final
    new = final.with_name(next_name(iteration_of(final), [path.name for path in others]))
    folder.rename(new)
    sync(final.parent)
    for other in others:
        if other.is_symlink() or not other.is_dir() or _renamed_from(other) is not None or _foreign(other):
            old = next(path for path in _names(other.with_name(f"{other.name}.old")) if not os.path.lexists(path))
            other.rename(old)
            log.warning("%s was there already, and not a checkpoint of that step alone; it is now %s", other, old)
        else:
            old = next(path for path in _names(final.with_name(f"{WRITING}replaced")) if not os.path.lexists(path))
            other.rename(old)
            discard(old)
    new.rename(final)
    sync(final.parent)
    return final


def _names(path: Path) -> Iterator[Path]:
    """`path`, `path.1`, `path.2`, …"""
    yield path
    yield from (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))


def apply_retention(
    root: Path,
    keep: int,
    keep_every: int,
    *,
    steps: Collection[int] = (),
    best: str | None = None,
    damaged: Collection[str] = (),
    told: set[str] | None = None,
) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those to be kept for another reason; returns the removed.

    Damaged ones (those named, and those with files missing or of another size) do not count as kept. They go like any
    other once `keep` whole newer ones exist. Links, checkpoints of a newer version, and those under the name of another
    iteration neither count nor go.

    Args:
        root: Folder of the checkpoints.
        keep: 0 keeps all.
        keep_every: Those at multiples of it stay too; 0: none.
        steps: Those at these iterations stay too.
        best: So does the one with the lowest of this validation loss, `SET/PLAN` (`best_checkpoint`).
        damaged: Names found damaged at load.
        told: Names of those that could not be removed; each is logged once.
    """
    if keep <= 0:
        return []
    told = set() if told is None else told
    kept_best = None if best is None else best_checkpoint(root, best, damaged=damaged)
    names = []
    for folder in reversed(list_checkpoints(root)):
        if folder.is_symlink():
            warn_once(told, folder.name, folder, "it is a link")
        else:
            names.append(folder.name)

    def whole(name: str) -> bool:
        return name not in damaged and _complete(root / name)

    removed = []
    kept_name = None if kept_best is None else kept_best.name
    for name in to_remove(names, keep, keep_every, steps=steps, best=kept_name, whole=whole):
        try:
            left = _remove(root / name)
        except (CheckpointError, OSError) as error:
            warn_once(told, name, root / name, str(error))
            continue
        if left:
            warn_once(told, name, root / name, f"it holds {left[0]}, which is no part of a checkpoint")
        removed.append(root / name)
    return removed[::-1]


def best_checkpoint(root: Path, best: str, *, damaged: Collection[str] = ()) -> Path | None:
    """The whole checkpoint whose own evaluation has the lowest of the loss `SET/PLAN`, of equal ones the newest."""
    manifests = {}
    for folder in list_checkpoints(root):
        with contextlib.suppress(CheckpointError):
            if folder.name not in damaged and _complete(folder):
                manifests[folder.name] = read_manifest(folder)
    name = lowest(manifests, best)
    return None if name is None else root / name


def _remove(folder: Path) -> list[str]:
    """Remove a checkpoint's own files, and its folder when nothing else is in it; returns what is.

    Raises:
        CheckpointError: of a newer version, whose files are not known.
        OSError: protected, for instance; then nothing is removed, or all from the manifest on in any order.
    """
    foreign = _foreign(folder)
    if NAME in foreign:
        raise CheckpointError("it is of a newer version")
    # Without its manifest it no longer counts as complete, should this stop half-way.
    (folder / NAME).unlink()
    for path in folder.iterdir():
        if path.name not in foreign:
            path.unlink()
    if not foreign:
        folder.rmdir()
    return foreign


def _foreign(folder: Path) -> list[str]:
    """Names in a checkpoint's folder that a run of this version did not put there."""
    listed: Collection[str] = ()
    try:
        listed = read_manifest(folder).files
    except NewerCheckpointError:
        return sorted(path.name for path in folder.iterdir())
    except CheckpointError:
        pass
    return sorted(
        path.name
        for path in folder.iterdir()
        if (path.is_dir() and not path.is_symlink()) or not is_own_file(path.name, listed)
    )


def _complete(folder: Path) -> bool:
    """Whether all files are there in their sizes; their contents are compared at load."""
    try:
        files = read_manifest(folder).files
        return all((folder / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (CheckpointError, OSError):
        return False


def damaged_files(folder: Path, manifest: Manifest, *, shard: int = 0, shards: int = 1) -> list[str]:
    """Names of files that are missing or differ from the manifest, among every `shards`-th file.

    Raises:
        ClosedCheckpointError: this user may not read one.
    """
    files = sorted(manifest.files.items())[shard::shards]
    with ThreadPoolExecutor(READERS) as pool:
        whole = pool.map(lambda file: _is_whole(folder / file[0], file[1]), files)
        return [name for (name, _), same in zip(files, whole, strict=True) if not same]


def check_files(folder: Path, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Raise CheckpointError when files (all, or those named) are missing or differ from the manifest."""
    files = {name: file for name, file in manifest.files.items() if names is None or name in names}
    if bad := damaged_files(folder, dataclasses.replace(manifest, files=files)):
        raise CheckpointError(
            f"{folder} is damaged: {', '.join(bad)} cannot be read or differ from the manifest; use another checkpoint"
        )


READERS = 8
"""Files read at once: checksums are made beside each other."""


def _is_whole(path: Path, expected: dict[str, Any]) -> bool:
    try:
        return path.is_file() and path.stat().st_size == expected["bytes"] and file_digest(path) == expected
    except PermissionError as error:
        raise ClosedCheckpointError(f"{path}: {error.strerror}; allow reading it") from None
    except OSError:  # missing, or the disk cannot read it
        return False
