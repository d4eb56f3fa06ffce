"""Checkpoints on object storage: URL/iteration_0001000/, complete with its manifest, which is written last.

A run writes them into a folder of each machine (`root`); every rank uploads the files that it wrote, rank 0 the rest
and then the manifest. At load each machine downloads what it lacks and compares all files with the checksums.

A save of an iteration that is there already, whole, gets a name with more zeros, iteration_00001000: objects cannot be
renamed, and the earlier one stays until the new one is complete.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from oryx_megatron import storage
from oryx_megatron.checkpoint.manifest import (
    NAME,
    PREFIX,
    Manifest,
    age_of,
    is_checkpoint_name,
    iteration_of,
    lowest,
    next_name,
    read_manifest,
)
from oryx_megatron.checkpoint.retention import is_own_file, to_remove, warn_once
from oryx_megatron.data.files import LISTING
from oryx_megatron.errors import CheckpointError, NewerCheckpointError
from oryx_megatron.storage import Remote

log = logging.getLogger(__name__)
FETCHED = ".fetched.json"
"""Beside a copy: sizes and times of the files that were compared with its manifest."""


class RemoteCheckpoints:
    """Where the checkpoints of a run are kept. Made by all ranks together.

    Args:
        url: Of the folder that holds them.
        root: Folder of this machine that they are written to and read from.
    """

    def __init__(self, url: str, root: Path) -> None:
        self.remote, self.root = Remote(url), root
        places: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(places, (socket.gethostname(), str(root)))
        rank = torch.distributed.get_rank()
        beside = [other for other, place in enumerate(places) if place == places[rank]]
        self.shard, self.shards = beside.index(rank), len(beside)
        """This rank's number among those that share `root`, and their number."""
        self.target = self.remote
        """Where the save under way goes, on all ranks: what `begin` gave."""

    def begin(self, iteration: int, damaged: Collection[str] = ()) -> Remote:
        """On rank 0: clear what unfinished saves left, and damaged ones of this iteration; where its save goes."""
        taken = []
        for folder, files in self._folders().items():
            same = iteration_of(Path(folder)) == iteration
            if NAME not in files or (same and (folder in damaged or not self._complete(folder, files))):
                self._remove(folder, files)
            if same and NAME in files:
                taken.append(folder)
        return self.remote / next_name(iteration, taken)

    def upload(self, folder: Path, names: Collection[str]) -> None:
        """Copy files of a save there."""
        for name in sorted(names):
            (self.target / name).upload(folder / name)

    def publish(self, folder: Path, names: Collection[str]) -> None:
        """On rank 0, when all ranks have uploaded theirs: the rest, then the manifest; earlier ones of the step go."""
        self.upload(folder, [name for name in names if name != NAME])
        (self.target / NAME).upload(folder / NAME)
        iteration = iteration_of(Path(self.target.name))
        for other, files in self._folders().items():
            if other != self.target.name and iteration_of(Path(other)) == iteration:
                self._remove(other, files)

    def mirror(self) -> None:
        """On rank 0: see `mirror`."""
        mirror(self.remote.url, self.root)

    def bring_manifest(self, folder: Path) -> None:
        """On one rank of each machine."""
        (self.remote / folder.name / NAME).download(folder / NAME)

    def bring(self, folder: Path, manifest: Manifest) -> list[str]:
        """Download this rank's share of a checkpoint's files, unless they are here; names of those that are damaged."""
        names = sorted(manifest.files)[self.shard :: self.shards]
        return _bring(self.remote / folder.name, folder, manifest, names)

    def tidy(self, final: Path) -> None:
        """On one rank of each machine: of the copies here, keep one."""
        for folder in self.root.glob(f"{PREFIX}*"):
            if folder != final:
                shutil.rmtree(folder, ignore_errors=True)

    def foreign(self) -> list[str]:
        """On rank 0: see `foreign`."""
        return foreign(self.remote.url)

    def retain(
        self,
        keep: int,
        keep_every: int,
        *,
        steps: Collection[int],
        best: str | None,
        damaged: Collection[str],
        told: set[str],
    ) -> None:
        """On rank 0: store.apply_retention, there."""
        if keep <= 0:
            return
        folders = {name: files for name, files in self._folders().items() if NAME in files}
        names = sorted(folders, key=age_of, reverse=True)
        kept_best = None if best is None else self._best(best, damaged)

        def whole(name: str) -> bool:
            return name not in damaged and self._complete(name, folders[name])

        for name in to_remove(names, keep, keep_every, steps=steps, best=kept_best, whole=whole):
            if why := self._remove(name, folders[name]):
                warn_once(told, name, self.remote / name, why)

    # ------------------------------------------------------------------------------------------------- internals

    def _best(self, best: str, damaged: Collection[str]) -> str | None:
        """The checkpoint with the lowest of this validation loss."""
        manifests = {}
        for name, files in self._folders().items():
            if NAME in files and name not in damaged and self._complete(name, files):
                with contextlib.suppress(CheckpointError):
                    manifests[name] = self._manifest(name)
        return lowest(manifests, best)

    def _folders(self) -> dict[str, dict[str, int]]:
        """Files with their sizes of all that has a checkpoint's name."""
        return _folders(self.remote.files())

    def _manifest(self, name: str) -> Manifest:
        folder = self.root / name
        if not (folder / NAME).is_file():
            (self.remote / name / NAME).download(folder / NAME)
        return read_manifest(folder)

    def _complete(self, name: str, files: dict[str, int]) -> bool:
        try:
            return all(files.get(file) == facts["bytes"] for file, facts in self._manifest(name).files.items())
        except CheckpointError:
            return False

    def _remove(self, name: str, files: dict[str, int]) -> str:
        """Remove a checkpoint's own files, its manifest first; what stays and why, in words."""
        listed: Collection[str] = ()
        if NAME in files:
            try:
                listed = self._manifest(name).files
            except NewerCheckpointError:
                return "it is of a newer version"
            except CheckpointError:
                pass
        for file in sorted(files, key=lambda file: file != NAME):
            if is_own_file(file, listed):
                (self.remote / name / file).remove()
                files.pop(file)
        if files:
            return f"it holds {min(files)}, which is no part of a checkpoint"
        (self.remote / name).remove_folder()
        return ""


def foreign(url: str) -> list[str]:
    """Names in the folder `url` that are no checkpoint's."""
    files = Remote(url).files()
    return sorted({name.partition("/")[0] for name in files} - set(_folders(files)))


def mirror(url: str, root: Path) -> None:
    """Make `root` hold the manifest of every complete checkpoint in the folder `url`, and no other checkpoint."""
    remote = Remote(url)
    complete = {name: files[NAME] for name, files in _folders(remote.files()).items() if NAME in files}
    for folder in root.glob(f"{PREFIX}*"):
        if folder.name not in complete and is_checkpoint_name(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    for name, size in complete.items():
        copy = root / name / NAME
        if not copy.is_file() or copy.stat().st_size != size:  # it is brought again when the checkpoint is loaded
            (remote / name / NAME).download(copy)


def fetch_checkpoint(url: str, *, only: Collection[str] | None = None) -> Path:
    """A copy, in the cache of this machine, of a checkpoint on object storage, or of a run's newest one there.

    Args:
        url: Of the checkpoint, or of the run's folder.
        only: Files to copy beside the manifest; None: all.

    Raises:
        CheckpointError: none there, or damaged.
        StorageError: the storage cannot be read.
    """
    remote, files = newest(url)
    folder = storage.entry("checkpoints", remote.url)
    with storage.alone(folder):
        copy = folder / remote.name
        (remote / NAME).download(copy / NAME)
        manifest = read_manifest(copy)
        if bad := [name for name, facts in manifest.files.items() if files.get(name) != facts["bytes"]]:
            raise CheckpointError(f"{remote} is damaged: {', '.join(bad[:3])} missing or of another size; use another")
        if bad := _bring(remote, copy, manifest, [n for n in manifest.files if only is None or n in only], again=False):
            raise CheckpointError(f"{remote} is damaged: {', '.join(bad[:3])} differ from the manifest; use another")
    storage.name_copy(copy, remote.url)
    return copy


def fetch_model(url: str) -> Path | None:
    """A copy, in the cache of this machine, of a Hugging Face folder on object storage; None when it is none.

    Raises:
        CheckpointError: it is damaged, as its own list of files shows.
        StorageError: the storage cannot be read.
    """
    remote = Remote(url)
    files = remote.files()
    if "config.json" not in files or NAME in files:
        return None
    folder = storage.entry("models", url)
    copy = folder / remote.name
    with storage.alone(folder):
        sums: dict[str, str | None] = {}
        if LISTING in files:
            listed = json.loads((remote / LISTING).read() or b"{}").get("files", {})
            sums = {name: facts[2] for name, facts in listed.items()}
            if missing := [name for name, facts in listed.items() if files.get(name) != facts[1]]:
                raise CheckpointError(f"{url} is damaged: {', '.join(missing[:3])} missing or of another size")
        if bad := storage.fetch(remote, copy, files, whole=storage.sha256_is(sums)):
            raise CheckpointError(
                f"{url} is damaged: {', '.join(bad[:3])} cannot be read or differ from what was written"
            )
    storage.name_copy(copy, url)
    return copy


def newest(url: str) -> tuple[Remote, dict[str, int]]:
    """A checkpoint on object storage, or a run's newest complete one there, with its files."""
    remote = Remote(url)
    files = remote.files()
    if NAME in files:
        return remote, files
    for start in ("checkpoints/", ""):
        below = {name.removeprefix(start): size for name, size in files.items() if name.startswith(start)}
        complete = {name: found for name, found in _folders(below).items() if NAME in found}
        if complete:
            name = max(complete, key=age_of)
            return remote / f"{start}{name}", complete[name]
    if not files:
        raise CheckpointError(f"{url} does not exist; give a checkpoint or a run folder")
    raise CheckpointError(f"{url} holds no complete checkpoint (no {PREFIX}*/{NAME})")


def list_remote(url: str) -> list[str]:
    """URLs of the checkpoint or, newest first, of the complete checkpoints of a run folder."""
    first, _ = newest(url)
    if first == Remote(url):
        return [first.url]
    root = Remote(first.url.rpartition("/")[0])
    complete = [name for name, files in _folders(root.files()).items() if NAME in files]
    return [(root / name).url for name in sorted(complete, key=age_of, reverse=True)]


def _folders(files: dict[str, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, size in files.items():
        folder, _, file = name.partition("/")
        if file and is_checkpoint_name(folder):
            found.setdefault(folder, {})[file] = size
    return found


def _bring(remote: Remote, folder: Path, manifest: Manifest, names: list[str], *, again: bool = True) -> list[str]:
    """Download files unless copies that fit the manifest are here; `again` compares also what was compared before."""
    compared: dict[str, Any] = {}
    if not again and (folder / FETCHED).is_file():
        compared = json.loads((folder / FETCHED).read_text() or "{}")
    sums = storage.sha256_is({name: manifest.files[name]["sha256"] for name in names})

    def whole(folder: Path, name: str) -> bool:
        facts = [(folder / name).stat().st_mtime_ns, manifest.files[name]["sha256"]]
        if compared.get(name) == facts:
            return True
        if not sums(folder, name):
            return False
        compared[name] = facts
        return True

    bad = storage.fetch(remote, folder, {name: manifest.files[name]["bytes"] for name in names}, whole=whole)
    if not again:
        (folder / FETCHED).write_text(json.dumps(compared))
    return bad
