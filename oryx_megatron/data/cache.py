"""Sample indices on disk: keyed by what they are made of, whole or not there, made by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oryx_megatron import compat, parallel, platform
from oryx_megatron.data.files import read_json, sha256_of, sync, temporary_name, write_json
from oryx_megatron.errors import DataError
from oryx_megatron.parallel.wait import LIFE

logger = logging.getLogger(__name__)

CACHE_MANIFEST = "complete.json"
VISIBLE = 60.0
"""Seconds that other ranks wait to see what rank 0 has written."""


def cached(root: Path, key: dict[str, Any], build: Any, *, shared: bool = True) -> Path:
    """Folder of `root` with the files that `build(folder)` makes for this key; made if missing or not whole.

    Folders appear whole (renamed) and are checked against the digests recorded in them. Rank 0 of the job alone builds,
    or a process without torch.distributed: every rank reads the same samples, whatever the layout. Of several jobs one
    builds at a time where the file system has locks; without, they make the same and the first one stays.
    Where `root` is not `shared` but each machine has its own, its first rank builds.
    """
    key = key | {"megatron-core": importlib.metadata.version("megatron-core")}
    folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    main = parallel.is_main_rank()
    if not main and (shared or platform.local_rank() != 0):
        deadline = time.monotonic() + (VISIBLE if shared else LIFE)
        while not _whole(folder, content=False):  # shared file systems remember for a while that it was not there
            if time.monotonic() > deadline:
                if not shared:
                    raise DataError(f"{folder}: the first rank of this machine has not made it in {LIFE:.0f} s")
                raise DataError(
                    f"{folder}, made by rank 0, is not visible here: data.cache_dir must be on shared storage"
                )
            time.sleep(0.5)
        return folder
    if _whole(folder):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _one_writer(root):
        temporary = temporary_name(folder)
        try:
            if not _whole(folder):  # another job may have been faster
                temporary.mkdir()
                with contextlib.nullcontext() if main else compat.megatron.as_rank_0():
                    build(temporary)
                files = {
                    path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
                    for path in sorted(temporary.iterdir())
                }
                write_json(temporary / CACHE_MANIFEST, {"key": key, "files": files})
                _put(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _put(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name; a damaged one there goes, a whole one of another job stays."""
    for _ in range(8):
        if os.path.lexists(folder):
            if _whole(folder):
                return
            logger.warning("rebuilding the damaged sample index in %s", folder)
            aside = temporary_name(folder)
            with contextlib.suppress(FileNotFoundError):  # another job moved it
                folder.rename(aside)
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            continue
        sync(folder.parent)
        return
    raise DataError(f"{folder} is in the way of a sample index and cannot be replaced; move it away")


@contextlib.contextmanager
def _one_writer(root: Path) -> Iterator[None]:
    """Hold a folder of caches for this process, as far as its file system has locks. Also clears what kills left."""
    with open(root / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another job builds sample indices in %s: waiting for it", root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        for path in root.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 86400:
                    shutil.rmtree(path, ignore_errors=True)
        yield


def _whole(folder: Path, *, content: bool = True) -> bool:
    """Whether a cache holds what its manifest says; `content`: compared by digest, else by size."""
    if not (folder / CACHE_MANIFEST).is_file():
        return False
    try:
        files = read_json(folder / CACHE_MANIFEST)["files"]
        if not files or not all((folder / name).stat().st_size == file["size"] for name, file in files.items()):
            return False
        if content and not all(sha256_of(folder / name) == file["sha256"] for name, file in files.items()):
            return False
    except (DataError, OSError, KeyError, AttributeError, TypeError, ValueError):
        return False
    # megatron-core opens arrays with allow_pickle: only what is an array of numbers may come before it.
    return all(map(_is_array, folder.glob("*.npy")))


def _is_array(path: Path) -> bool:
    try:
        np.lib.format.open_memmap(path, mode="r")
    except Exception:  # noqa: BLE001 - a header is parsed as Python, and a damaged one raises what that does
        return False
    return True
