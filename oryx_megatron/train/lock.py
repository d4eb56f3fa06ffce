"""One run at a time in an output_dir: RUN/lock names who trains there.

The file appears whole, by a hard link, which shared file systems make atomic too; nothing here relies on flock. It
holds host, process id, start time and Slurm job of rank 0, which touches it every BEAT seconds and removes it at the
end. A start that finds one left behind by kill -9, a lost node or a requeue takes over:

- on the same machine (same boot, same pid namespace) when no process has that id and that start time;
- by the same Slurm job in a later start: its earlier one has ended;
- else when the file was not touched for STALE seconds, by the file system's clock or watched from here.

Who replaces or removes a lock first claims it: a file named after the lock's text, made in the same way, of which there
is one. A text never comes twice, so what is read under the claim holds until the claimant acts: of any number of starts
one takes over. A claimant that was asleep for so long that its claim went to another start sees so, and takes nothing.

A holder that was only asleep for so long notices that the lock is another's, and ends before it writes any more.
A run on object storage has such a lock there as well (train/remote.py). Reading a run folder (replay, evaluation,
monitor, conversion) needs no lock.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from oryx_megatron.errors import ConfigError, OryxError

log = logging.getLogger(__name__)

NAME = "lock"
BEAT = 5.0
"""Seconds between signs of life."""
STALE = 60.0
"""Seconds without one after which a holder on another machine counts as gone."""

_held: dict[Path, RunLock] = {}
"""Locks of this process."""


def hold(folder: Path, beyond: Callable[[], RunLock] | None = None) -> RunLock | None:
    """Take the lock of a run folder, which is made if missing; collective, gives the lock on rank 0 and None elsewhere.

    A process that holds it already keeps it.

    Args:
        folder: The run's folder.
        beyond: Makes a further lock, not taken yet, which is held as long as this one; None: there is none.

    Raises:
        ConfigError: another run is under way there, or the folder cannot be written to; on all ranks alike.
    """
    lock, failure = None, None
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world == 1 or torch.distributed.get_rank() == 0:
        try:
            lock = _hold(folder, beyond)
        except ConfigError as error:
            failure = error
    if world > 1:
        outcome: list[ConfigError | None] = [failure]
        torch.distributed.broadcast_object_list(outcome, src=0)
        (failure,) = outcome
    if failure is not None:
        raise failure
    return lock


def release() -> None:
    """Give back what this process holds; nothing where a run has ended already."""
    for lock in list(_held.values()):
        lock.release()


def _hold(folder: Path, beyond: Callable[[], RunLock] | None) -> RunLock:
    try:
        path = folder.resolve() / NAME
        lock = _held.get(path)
        if lock is not None and not lock.is_mine():
            lock.release()  # its folder was deleted: left alive, it would take the next lock for another run's
            lock = None
        missing = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoints", "faults"):
            if (folder / name).exists() and not (folder / name).is_dir():
                raise ConfigError(f"output_dir: {folder / name} should be a folder; choose another output_dir")
        if lock is None:
            lock = RunLock(path)
            lock.acquire(shown=str(folder))
            lock.made = missing
            _held[path] = lock
            if beyond is not None:
                try:
                    lock.beyond = beyond()
                    lock.beyond.acquire(shown=lock.beyond.name.rpartition("/")[0])
                except BaseException:
                    lock.beyond = None
                    lock.release()
                    raise
        return lock
    except OryxError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"output_dir: {error}") from None
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"output_dir: {error.filename or folder} is not a folder; choose another") from None
    except OSError as error:
        raise ConfigError(
            f"output_dir: cannot write to {error.filename or folder} ({error.strerror}); choose another"
        ) from None


class RunLock:
    """RUN/lock of this process.

    Args:
        path: The file.
    """

    beat = 0.0
    """Seconds between signs of life; 0: BEAT."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self.beyond: RunLock | None = None
        """A lock that is held and given back with this one."""
        self.pid = os.getpid()
        self.identity = _identity()
        self.made: list[Path] = []
        """Folders that were made for it, innermost first: a start that fails leaves none that is empty."""
        self.rival: dict[str, Any] | None = None
        """Who else was taking the lock over when this process last tried."""
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, *, shown: str) -> None:
        """Make the file, in place of one whose holder is gone.

        Args:
            shown: The run folder as messages name it.

        Raises:
            ConfigError: its holder lives.
            OSError: it cannot be written.
        """
        watch = self.watch()
        told, since = False, time.monotonic()
        while not self.create():
            holder = watch.look()
            if holder is None:  # gone in between
                continue
            lives = _lives(holder, self.identity)
            if lives is None:
                lives = watch.beats()
            if lives:
                raise ConfigError(
                    f"output_dir: {shown} is in use by {describe(holder)}; two runs would delete each other's "
                    "checkpoints: wait for it, end it, or choose another output_dir"
                )
            if lives is False:
                if self.take_over(watch.text):
                    log.info("output_dir: the run of %s is gone; its lock was taken over", describe(holder))
                    break
                if self.rival is not None and time.monotonic() - since > 2 * STALE:
                    raise ConfigError(
                        f"output_dir: {shown} is being taken over by {describe(self.rival)}; end it first"
                    )
                time.sleep(0.01)
                continue
            if not told:
                log.info(
                    "output_dir: %s was left by %s; waiting up to %.0f s for a sign of life",
                    self.name, describe(holder), max(STALE, 4 * self.beat),
                )  # fmt: skip
                told = True
            time.sleep(min(1.0, BEAT / 5))
        self._thread = threading.Thread(target=self._live, daemon=True, name="run lock")
        self._thread.start()
        atexit.register(self.release)

    def is_mine(self) -> bool:
        """Whether the file is still this process's."""
        return self.pid == os.getpid() and parse(self.read()).get("token") == self.identity["token"]

    def release(self) -> None:
        """Remove the file, if it is still this process's; harmless when called again, or in a forked process."""
        self._end.set()
        if self.pid != os.getpid():
            return
        atexit.unregister(self.release)
        if self._thread is not None:
            self._thread.join(self.beat or BEAT)  # a sign of life after the end would leave a lock behind
        _held.pop(self.path, None)
        if self.beyond is not None:
            self.beyond.release()
        with contextlib.suppress(OSError):
            if self.is_mine():
                self.unlink()
        for folder in self.made:
            with contextlib.suppress(OSError):  # something was written there
                folder.rmdir()

    def watch(self) -> Watch:
        """What looks whether another holder beats."""
        return Watch(self.path)

    def text(self) -> str:
        """What the lock says while this process holds it."""
        return json.dumps(self.identity) + "\n"

    def read(self) -> str:
        """Text of the lock; empty when it is not there."""
        return _read(self.path)

    def touch(self) -> None:
        """Give a sign of life."""
        os.utime(self.path)

    def unlink(self) -> None:
        """Take this process's own lock away, unless another start is about to."""
        with self._claimed(text := self.read()) as mine:
            if mine is not None and parse(text).get("token") == self.identity["token"] and self.read() == text:
                self.path.unlink(missing_ok=True)

    def create(self) -> bool:
        """Make the file unless there is one."""
        try:
            if _make(self.path, self.text()):
                return True
        except OSError as error:
            error.filename = self.name
            raise
        if not self.path.is_file() and self.path.exists():
            raise ConfigError(f"output_dir: {self.path} should be a file; choose another output_dir")
        return False

    def take_over(self, text: str) -> bool:
        """Put this process's lock in the place of the one that says `text`; False where another start was faster."""
        with self._claimed(text) as mine:
            if mine is None or self.read() != text:
                return False
            new = _written(self.path, self.text())
            new.replace(self.path)
            if mine():
                return True
        self.unlink()  # it was asleep in between, and its claim is another's
        return False

    @contextlib.contextmanager
    def _claimed(self, text: str) -> Iterator[Callable[[], bool] | None]:
        """Alone with a lock that says `text`: gives what tells whether that is still so, or None where another is.

        A claim is a lock itself, held for a moment and without signs of life.
        """
        claim = RunLock(self.path.with_name(f".{NAME}.{_key(self.path, text)}.claim"))
        made = claim.create()
        self.rival = None
        if not made:
            watch = claim.watch()
            self.rival = watch.look()
            if self.rival is not None:
                lives = _lives(self.rival, claim.identity)
                if lives is False or (lives is None and watch.beats() is False):
                    made = claim.take_over(watch.text)
        try:
            yield claim.is_mine if made else None
        finally:
            if made and claim.is_mine():
                claim.path.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._end.wait(self.beat or BEAT):
            with contextlib.suppress(OSError, ConfigError):
                text = self.read()
                if parse(text).get("token") == self.identity["token"]:
                    self.touch()
                elif text or not self.renew():
                    self._give_up(parse(text))

    def renew(self) -> bool:
        """Make a lock that someone deleted by hand again; True also where the folder itself is gone."""
        return not self.path.parent.is_dir() or self.create()

    def _give_up(self, holder: dict[str, Any]) -> None:
        sys.stderr.write(
            f"error: output_dir: {self.name} was taken over by {describe(holder)} while this process made no sign of "
            "life; it ends, so as not to write into that run's folder\n"
        )
        sys.stderr.flush()
        os._exit(2)


class Watch:
    """Looks at a lock whose holder cannot be asked: does it beat?"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = ""
        self._first: tuple[str, int] | None = None
        self._beaten = False
        self._since = time.monotonic()
        self._touched = 0.0

    def look(self) -> dict[str, Any] | None:
        """What the file says now; None when it is gone, an empty dict when it says nothing readable."""
        try:
            with self.path.open() as file:  # opening it makes NFS ask the server
                self.text = file.read(65536)
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            self.text, status = "", self.path.stat()
        seen = (self.text, status.st_mtime_ns)
        if self._first is None or self._first[0] != self.text:
            self._first, self._since = seen, time.monotonic()
        self._beaten = seen != self._first
        self._touched = status.st_mtime
        return parse(self.text)

    def beats(self) -> bool | None:
        """True when it was touched since the first look, False when not for STALE seconds, None: not known yet."""
        if self._beaten:
            return True
        gone = time.monotonic() - self._since > STALE or self._now() - self._touched > STALE
        return False if gone else None

    def _now(self) -> float:
        """The file system's clock, which on shared storage is not this machine's."""
        probe = self.path.with_name(f".{NAME}.{uuid.uuid4().hex}.tmp")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def describe(holder: dict[str, Any]) -> str:
    """Who holds a lock, in words."""
    if "pid" not in holder:
        return "a run that its lock does not name"
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder.get('host')}, started {holder.get('started')}{job}"


def _lives(holder: dict[str, Any], me: dict[str, Any]) -> bool | None:
    """Whether the holder of a lock still runs; None when that cannot be asked from here."""
    if holder.get("machine") == me["machine"] and isinstance(pid := holder.get("pid"), int):
        if (birth := _birth(pid)) is not None:
            return birth == holder.get("birth")
        return None if _hidden(pid) else False
    if me["job"] and holder.get("job") == me["job"] and isinstance(start := holder.get("start"), int):
        return False if start < me["start"] else None
    return None


def _identity() -> dict[str, Any]:
    """What the lock says of this process."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time())),
        "job": os.environ.get("SLURM_JOB_ID") or None,
        "start": int(restarts) if restarts.isdigit() else 0,
        "birth": _birth(os.getpid()),
        "machine": _machine(),
        "token": uuid.uuid4().hex,
    }


def _birth(pid: int) -> float | None:
    """When a process began, in ticks that do not move with the clock; None for one that is gone or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (ProcessLookupError, IndexError, ValueError):
        return None
    try:  # not Linux
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _hidden(pid: int) -> bool:
    """Whether a process is there that /proc does not show, as another user's under hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _machine() -> list[str]:
    """Where a process id means something: host, its present boot, and the pid namespace (a container has its own)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return parts


def _read(path: Path) -> str:
    """Text of a lock; empty when it is not there or not text."""
    try:
        with path.open() as file:
            return file.read(65536)
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _write_new(path: Path, text: str) -> None:
    """Make a file, on disk; FileExistsError where there is one."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _written(path: Path, text: str) -> Path:
    """A new file beside `path`, on disk."""
    new = path.with_name(f".{NAME}.{uuid.uuid4().hex}.new")
    try:
        _write_new(new, text)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    return new


def _make(path: Path, text: str) -> bool:
    """Make a file that appears whole; False where there is one."""
    new = _written(path, text)
    try:
        os.link(new, path)
    except FileExistsError:  # or it was made, and NFS lost the answer
        return new.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here: the file is empty for a moment, which makes it nobody's after STALE seconds.
        try:
            _write_new(path, text)
        except FileExistsError:
            return False
        return _read(path) == text
    finally:
        new.unlink(missing_ok=True)
    return True


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
"""What a file system without hard links says."""


def _key(path: Path, text: str) -> str:
    """What tells a lock from every other: its token, or for a damaged one its bytes and its file."""
    token = parse(text).get("token")
    if not isinstance(token, str):
        with contextlib.suppress(OSError):
            status = path.stat()
            text += f"{status.st_ino} {status.st_mtime_ns}"
    return hashlib.sha256(repr((token, text)).encode()).hexdigest()[:32]


def parse(text: str) -> dict[str, Any]:
    """What a lock says; an empty dict when that cannot be read."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
