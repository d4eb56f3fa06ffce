"""A run whose output_dir is on object storage: its files are written on this machine and copied there.

Checkpoints have their own way (checkpoint/remote.py). Rank 0 writes the rest, metrics and events above all, into the
run's folder in the cache; `RunFiles` copies what changed every `storage.sync_interval` seconds, and at the end.

The lock (train/lock.py) is an object, URL/lock, made with a condition that the storage checks (S3's If-None-Match, the
generation of GCS). Its holder rewrites it every BEAT seconds; one that stays the same for STALE seconds counts as
left behind. Storage without such conditions keeps all but starts within the same second apart.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from oryx_megatron import storage
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import is_url
from oryx_megatron.storage import Remote, StorageError
from oryx_megatron.train import lock, metrics
from oryx_megatron.train.callbacks.base import Callback
from oryx_megatron.train.history import EVENTS

log = logging.getLogger(__name__)

BEAT = 15.0
"""Seconds between signs of life of a lock on object storage: each is a request that costs money."""
GROWING = (metrics.NAME, EVENTS)
"""Files to which lines are added."""
APART = ("checkpoints", lock.NAME)
"""What is not copied as it stands."""


def run_folder(run: RunConfig) -> Path:
    """Where this machine has the files of a run: output_dir, or the folder from which they are copied there."""
    storage.use_cache(run.storage.cache_dir, run.storage.cache_gb)  # for datasets and init_from, too
    if not is_url(run.output_dir):
        return Path(run.output_dir)
    # Of this machine alone, also where machines share the cache.
    return storage.entry("runs", run.output_dir) / socket.gethostname() / Remote(run.output_dir).name


def hold(run: RunConfig, folder: Path) -> lock.RunLock | None:
    """Take the lock of a run, on its storage and on this machine. See lock.hold."""
    there = (lambda: RemoteLock(Remote(run.output_dir) / lock.NAME)) if is_url(run.output_dir) else None
    return lock.hold(folder, there)


def run_files(run: RunConfig, folder: Path) -> tuple[Callback, ...]:
    """On rank 0: what copies a run to object storage, last of all callbacks; it has brought what was left there."""
    if not is_url(run.output_dir):
        return ()
    files = RunFiles(run.output_dir, folder, run.storage.sync_interval)
    files.pull()
    return (files,)


class RemoteLock(lock.RunLock):
    """The lock of a run on object storage.

    Args:
        remote: The object.
    """

    beat = BEAT

    def __init__(self, remote: Remote) -> None:
        super().__init__(Path(remote.url))
        self.remote, self.name = remote, remote.url

    def watch(self) -> lock.Watch:
        """See RunLock."""
        return _RemoteWatch(self.remote)

    def read(self) -> str:
        """See RunLock."""
        return (self.remote.read() or b"").decode(errors="replace")

    def create(self) -> bool:
        """See RunLock."""
        try:
            self.remote.write(self.text().encode(), new=True)
        except FileExistsError:
            return False
        return self.is_mine()

    def touch(self) -> None:
        """See RunLock."""
        self.identity["beat"] = self.identity.get("beat", 0) + 1
        self.remote.write(self.text().encode())

    def take_over(self, text: str) -> bool:
        """See RunLock: should two do so at once, the one whose object is gone ends at its next beat."""
        if self.read() == text:
            self.remote.remove()
        return self.create()

    def unlink(self) -> None:
        """See RunLock."""
        self.remote.remove()

    def renew(self) -> bool:
        """See RunLock."""
        return self.create()


class _RemoteWatch(lock.Watch):
    """Looks at an object: it lives while its text changes."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(Path(remote.url))
        self.remote = remote

    def look(self) -> dict[str, Any] | None:
        data = self.remote.read()
        if data is None:
            return None
        text = data.decode(errors="replace")
        holder = lock.parse(text)
        token = holder.get("token")
        if self._first is None or self._first[0] != str(token):
            self._first, self._since, self._beaten = (str(token), 0), time.monotonic(), False
        elif text != self.text:
            self._beaten = True
        self.text = text
        return holder

    def beats(self) -> bool | None:
        if self._beaten:
            return True
        return False if time.monotonic() - self._since > max(lock.STALE, 4 * RemoteLock.beat) else None


class RunFiles(Callback):
    """Copies the files of a run to object storage; on rank 0 only. Storage that fails costs reports, not the run.

    Args:
        url: The run's output_dir.
        folder: Its files on this machine.
        interval: Seconds between copies.
    """

    def __init__(self, url: str, folder: Path, interval: float) -> None:
        self.remote, self.folder, self.interval = Remote(url), folder, interval
        self._copied: dict[str, tuple[int, int]] = {}
        """Size and time of change of what was copied."""
        self._muted = False
        self._lock = threading.Lock()
        self._end, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def on_checkpoint(self, path: str) -> None:
        """Copy now, in the background: the files should not be behind a checkpoint."""
        self._wake.set()

    def pull(self) -> None:
        """Bring what an earlier process left there. A local file that has more lines than that stays."""
        found = self.remote.files()
        for name in found:
            if _is_apart(name) or name.startswith("tensorboard/"):
                continue
            path = self.folder / name
            data = (self.remote / name).read()
            if data is None or (name in GROWING and path.is_file() and path.read_bytes().startswith(data)):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._note(name, path)
        for path in self.folder.iterdir():
            if path.name not in (*APART, *GROWING) and path.is_file() and path.name not in found:
                path.unlink()

    def on_start(self, run: RunConfig, iteration: int) -> None:
        """Copy every `interval` seconds from now on."""
        self._thread = threading.Thread(target=self._beat, daemon=True, name="copies of the run's files")
        self._thread.start()

    def on_end(self) -> None:
        """Copy what is left."""
        self._end.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self.push()

    def push(self) -> None:
        """Copy what changed since the last time; what was removed here is removed there."""
        with self._lock:
            try:
                here = {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}
                for name, path in here.items():
                    if _is_apart(name) or path.name.startswith("."):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        self._push_file(name, path)
                for name in [name for name in self._copied if name not in here]:
                    (self.remote / name).remove()
                    del self._copied[name]
                self._muted = False
            except StorageError as error:
                if not self._muted:
                    log.error(
                        "%s; training continues, the run's files stay in %s until they can be copied",
                        error,
                        self.folder,
                    )
                self._muted = True

    def _push_file(self, name: str, path: Path) -> None:
        """Copy one file if it changed since the last time."""
        before = self._copied.get(name)
        if self._note(name, path) == before:
            return
        try:
            (self.remote / name).upload(path)
        except BaseException:
            self._copied.pop(name, None)
            raise

    def _note(self, name: str, path: Path) -> tuple[int, int]:
        status = os.stat(path)
        self._copied[name] = status.st_size, status.st_mtime_ns
        return self._copied[name]

    def _beat(self) -> None:
        while True:
            self._wake.wait(self.interval)
            self._wake.clear()
            if self._end.is_set():
                return
            self.push()


def _is_apart(name: str) -> bool:
    return name.partition("/")[0] in APART


def check(run: RunConfig) -> None:
    """Raise ConfigError when output_dir is on storage that cannot be read; for --dry-run."""
    if is_url(run.output_dir):
        try:
            Remote(f"{run.output_dir}/{lock.NAME}").read()
        except StorageError as error:
            raise ConfigError(f"output_dir: {error}") from None
