"""Files on object storage (s3://, gs://, …) through fsspec, and a bounded folder of this machine that keeps copies.

A `Remote` is one name there. Everything that goes wrong is a StorageError of one line, which is an OSError as well:
what copes with a full disk copes with a lost bucket.

The cache ($ORYX_CACHE, else ~/.cache/oryx_megatron; `storage` in a run config):

    checkpoints/KEY/  models/KEY/  datasets/KEY/  runs/KEY/    copies of one URL each
    blocks/KEY/NUMBER                                          ranges of .bin files, each with its CRC-32

It holds at most `cache_gb`: the least recently used goes first. What a process uses is locked (flock) until it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from oryx_megatron.atomic import replacing
from oryx_megatron.errors import ConfigError, OryxError

T = TypeVar("T")
ATTEMPTS, PAUSE = 3, 1.0
"""How often a transfer is tried, and seconds before the second try; twice that before each further one."""
CACHE, CACHE_GB = "ORYX_CACHE", "ORYX_CACHE_GB"
"""Environment variables: the cache folder, and its largest size in GB (10^9 bytes)."""
DEFAULT_GB = 100.0
KINDS = ("checkpoints", "models", "datasets", "runs")
BLOCK = 1 << 20
"""Bytes of a block: some tens of samples, and a transfer as long as an object store takes to answer."""
AT_ONCE = 32
"""Blocks fetched by one request at most."""


class StorageError(OryxError, OSError):
    """Object storage cannot be reached, or refuses."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[StorageError], tuple[str]]:
        return type(self), (str(self.strerror),)


class Remote:
    """A file, or a folder by the names that begin with it, on object storage.

    Args:
        url: `scheme://bucket/name`.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """After the last slash."""
        return self.url.rpartition("/")[2]

    def files(self) -> dict[str, int]:
        """Bytes of every file below, by its name from here on."""

        def find(system: Any, path: str) -> dict[str, int]:
            try:
                found = system.find(path, detail=True)
            except FileNotFoundError as error:  # some say so of a bucket without files, too
                _bucket_exists(error)
                return {}
            start = len(path.rstrip("/")) + 1
            names = {name[start:]: int(info["size"] or 0) for name, info in found.items()}
            # A name is made a path of this machine: it must lead nowhere else.
            return {name: size for name, size in names.items() if not {"", ".", ".."} & set(name.split("/"))}

        return self._do("listed", find)

    def size(self) -> int | None:
        """Bytes of the file; None when there is none."""
        info = self._info()
        return None if info is None else int(info["size"])

    def version(self) -> str | None:
        """Changes when the file is written again; None when there is none."""
        info = self._info()
        if info is None:
            return None
        mark = next(
            (info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created") if key in info), ""
        )
        return f"{info['size']}:{str(mark).strip(chr(34))}"

    def read(self) -> bytes | None:
        """Content of the file; None when there is none."""

        def cat(system: Any, path: str) -> bytes | None:
            try:
                return bytes(system.cat_file(path))
            except FileNotFoundError as error:
                _bucket_exists(error)
                return None

        return self._do("read", cat)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file."""
        return self._patiently("read", lambda system, path: bytes(system.cat_file(path, start=start, end=stop)))

    def write(self, data: bytes, *, new: bool = False) -> None:
        """Write the file at once; FileExistsError when it should be `new` and there is one."""

        def pipe(system: Any, path: str) -> None:
            if not new:
                system.pipe_file(path, data)
                return
            try:
                system.pipe_file(path, data, mode="create")
            except (TypeError, ValueError, NotImplementedError):  # storage that cannot refuse by itself
                if system.exists(path):
                    raise FileExistsError(path) from None
                system.pipe_file(path, data)
            except OSError as error:
                if "PreconditionFailed" in repr(error) or "pre-conditions" in str(error) or error.errno == errno.EEXIST:
                    raise FileExistsError(path) from None
                raise

        self._do("written", pipe)

    def upload(self, path: Path) -> None:
        """Copy a file of this machine here."""
        self._patiently("written", lambda system, there: system.put_file(str(path), there))

    def download(self, path: Path) -> None:
        """Copy the file to this machine; it appears under its name when whole."""
        with replacing(path, durable=False) as temporary:
            self._patiently("read", lambda system, there: system.get_file(there, str(temporary)))

    def remove(self) -> None:
        """Remove the file, if there is one."""

        def remove(system: Any, path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(path)

        self._do("removed", remove)

    def remove_folder(self) -> None:
        """Remove the folder where it is one of its own and empty, as in `file://`; on S3 and its like there is none."""

        def remove(system: Any, path: str) -> None:
            with contextlib.suppress(OSError, NotImplementedError):  # an empty folder that stays is no harm
                if system.isdir(path):
                    system.rmdir(path)

        self._do("removed", remove)

    # ------------------------------------------------------------------------------------------------- internals

    def _info(self) -> dict[str, Any] | None:
        def info(system: Any, path: str) -> dict[str, Any] | None:
            try:
                found = system.info(path)
            except FileNotFoundError as error:
                _bucket_exists(error)
                return None
            return found if found.get("type") == "file" else None

        return self._do("read", info)

    def _do(self, what: str, action: Callable[[Any, str], T]) -> T:
        """Call an action with file system and path; StorageError for what goes wrong."""
        try:
            return action(*self._system())
        except (OryxError, FileExistsError):
            raise
        except Exception as error:  # each storage library has its own errors, with no common base
            raise StorageError(f"{self.url} cannot be {what}: {_why(error, self.url)}") from error

    def _patiently(self, what: str, action: Callable[[Any, str], T]) -> T:
        """As `_do`, tried again: a run of weeks meets a storage that does not answer once."""
        for attempt in range(ATTEMPTS):
            try:
                return self._do(what, action)
            except StorageError as error:
                if attempt == ATTEMPTS - 1 or isinstance(error.__cause__, (FileNotFoundError, PermissionError)):
                    raise
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("no attempt")

    def _system(self) -> tuple[Any, str]:
        core = importlib.import_module("fsspec.core")
        protocol = self.url.partition(":")[0]
        options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        try:
            # A new process gets file systems of its own: fsspec's are not to be used across a fork.
            system, path = core.url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            known = importlib.import_module("fsspec.registry").known_implementations.get(protocol, {})
            package = known.get("class", protocol).partition(".")[0]
            raise StorageError(
                f"{self.url}: {protocol}:// needs the package {package}: pip install {package}"
            ) from error
        except ValueError as error:
            raise StorageError(f"{self.url}: {protocol}:// is no storage that fsspec knows") from error
        return system, str(path)


def _bucket_exists(error: FileNotFoundError) -> None:
    """Raise `error` where the storage says that the bucket is missing, not the file alone: a typo in its name."""
    if "bucket does not exist" in str(error):
        raise error


def _why(error: Exception, url: str) -> str:
    """What a storage library says went wrong, in one line, with what to do."""
    kind = type(error).__name__
    line = " ".join((str(error).strip().splitlines() or [kind])[0].split()) or kind
    text = f"{kind} {line}".lower()
    if "credential" in text or "anonymous caller" in text or "accesskeyid" in text:
        return f"no valid credentials ({line}); set those of {url.partition(':')[0]}:// for this user (docs/storage.md)"
    if isinstance(error, PermissionError) or "forbidden" in text or "access denied" in text:
        return f"access denied ({line}); ask for permission, or use other credentials"
    if isinstance(error, FileNotFoundError) or "nosuchbucket" in text:
        return f"no such bucket or file ({line})" if "specified bucket" in text else "no such bucket or file"
    if isinstance(error, (ConnectionError, TimeoutError)) or any(
        word in text for word in ("connect", "timeout", "timed out", "resolve", "unreachable", "endpoint")
    ):
        return f"the storage does not answer ({line}); check its endpoint and the network"
    return line


# ------------------------------------------------------------------------------------------------------------ cache


@dataclass
class _Settings:
    folder: Path | None = None
    gigabytes: float | None = None


_settings = _Settings()
_held: dict[Path, int] = {}
"""Lock descriptors of the entries that this process uses."""
_unchecked = 0
"""Bytes of blocks written since the cache's size was looked at."""


def use_cache(folder: str | None, gigabytes: float | None) -> None:
    """Set the cache of this process, as a run config has it; None: as the environment says."""
    _settings.folder = None if folder is None else Path(folder)
    _settings.gigabytes = gigabytes


def cache_folder() -> Path:
    """Where copies are kept."""
    if _settings.folder is not None:
        return _settings.folder
    if named := os.environ.get(CACHE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oryx_megatron"


def cache_bytes() -> int:
    """What the cache may hold. Raises ConfigError for an environment that does not say a number."""
    if _settings.gigabytes is not None:
        return int(_settings.gigabytes * 1e9)
    text = os.environ.get(CACHE_GB, "").strip()
    try:
        value = float(text) if text else DEFAULT_GB
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value):
        raise ConfigError(f"{CACHE_GB}: {text!r} is no number of gigabytes; unset it or give one above 0")
    return int(value * 1e9)


def key_of(url: str) -> str:
    """Name under which copies of a URL are kept: readable, and of this URL alone."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in url.rstrip("/").rpartition("/")[2])[:40]
    return f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def entry(kind: str, url: str) -> Path:
    """Folder of the cache for copies of a URL, in use by this process until it ends. Made if missing."""
    folder = cache_folder() / kind / key_of(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder not in _held:
            _held[folder] = _lock(_lock_file(folder), fcntl.LOCK_SH)
        os.utime(_lock_file(folder))
        folder.mkdir(exist_ok=True)  # it may have gone before the lock was ours
    except OSError as error:
        raise StorageError(
            f"the cache of copies cannot be written ({folder}: {error.strerror}); set storage.cache_dir, or {CACHE}"
        ) from error
    return folder


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time fills an entry of the cache."""
    descriptor = _lock(folder.with_name(f".{folder.name}.busy"), fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def fetch(remote: Remote, folder: Path, sizes: dict[str, int], *, whole: Callable[[Path, str], bool]) -> list[str]:
    """Copy files below `remote` into an entry of the cache, unless they are there; names of those that are not whole.

    Args:
        sizes: Bytes of the wanted files, by name.
        whole: Whether a copy is what it should be; asked of copies of the right size.
    """

    def good(name: str) -> bool:
        path = folder / name
        return path.is_file() and path.stat().st_size == sizes[name] and whole(folder, name)

    missing = [name for name in sizes if not good(name)]
    if missing:
        make_room(sum(sizes[name] for name in missing))
    bad = []
    for name in missing:
        try:
            (remote / name).download(folder / name)
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        if not good(name):
            bad.append(name)
    return bad


def make_room(wanted: int) -> None:
    """Remove the least recently used copies until `wanted` more bytes fit, or nothing is left that may go."""
    root, limit = cache_folder(), cache_bytes()
    found: list[tuple[float, int, Path]] = []
    for kind in KINDS:
        for folder in _children(root / kind):
            if not folder.name.startswith(".") and folder.is_dir():
                lock = _lock_file(folder)
                used = lock.stat().st_mtime if lock.exists() else folder.stat().st_mtime
                found.append((used, _bytes_in(folder), folder))
    for folder in _children(root / "blocks"):
        with contextlib.suppress(OSError), os.scandir(folder) as blocks:
            for block in blocks:
                with contextlib.suppress(OSError):
                    status = block.stat()
                    found.append((status.st_mtime, status.st_size, Path(block.path)))
    excess = sum(size for _, size, _ in found) + wanted - limit
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        if path.parent.parent == root / "blocks":
            path.unlink(missing_ok=True)
        elif not _drop(path):
            continue
        excess -= size


def _drop(folder: Path) -> bool:
    """Remove an entry that no process uses."""
    if folder in _held:
        return False
    try:
        descriptor = _lock(_lock_file(folder), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    try:
        shutil.rmtree(folder, ignore_errors=True)
        _lock_file(folder).unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return not folder.exists()


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _lock(path: Path, how: int) -> int:
    """Descriptor of a lock that is held; BlockingIOError when another holds it and `how` does not wait."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:  # a file system without locks
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        os.close(descriptor)  # removed with its entry meanwhile


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _bytes_in(folder: Path) -> int:
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(here, name)).st_size
    return total


# ----------------------------------------------------------------------------------------------------------- ranges


class Ranges:
    """A large file on object storage, read in blocks that the cache keeps. Survives forks and pickling.

    Args:
        remote: The file.
        size: Its bytes.
        version: Changes with its content: blocks of an earlier one are not used.
    """

    def __init__(self, remote: Remote, size: int, version: str) -> None:
        self.remote, self.size, self.version = remote, size, version
        self._recent: dict[int, bytes] = {}

    def __getstate__(self) -> tuple[Remote, int, str]:
        return self.remote, self.size, self.version

    def __setstate__(self, state: tuple[Remote, int, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @functools.cached_property
    def folder(self) -> Path:
        """Of its blocks."""
        return cache_folder() / "blocks" / key_of(f"{self.remote.url}#{self.version}")

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises StorageError."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"{self.remote}: bytes {start} to {stop} are outside its {self.size}")
        if start == stop:
            return b""
        numbers = range(start // BLOCK, (stop - 1) // BLOCK + 1)
        parts = []
        for first in range(numbers.start, numbers.stop, AT_ONCE):
            parts += self._blocks(range(first, min(first + AT_ONCE, numbers.stop)))
        begin = start - numbers.start * BLOCK
        return b"".join(parts)[begin : begin + stop - start]

    def _blocks(self, numbers: range) -> list[bytes]:
        found = {number: self._kept(number) for number in numbers}
        missing = [number for number, block in found.items() if block is None]
        while missing:
            count = next((i for i in range(1, len(missing)) if missing[i] != missing[0] + i), len(missing))
            first, missing = missing[0], missing[count:]
            begin, end = first * BLOCK, min((first + count) * BLOCK, self.size)
            data = self.remote.read_range(begin, end)
            if len(data) != end - begin:
                raise StorageError(
                    f"{self.remote} gave {len(data)} bytes for {end - begin}: it was replaced; start again"
                )
            for i in range(count):
                found[first + i] = block = data[i * BLOCK : (i + 1) * BLOCK]
                self._keep(first + i, block)
        blocks = [block for block in found.values() if block is not None]
        self._recent = dict(zip(numbers, blocks)) if len(numbers) <= 4 else {}
        return blocks

    def _kept(self, number: int) -> bytes | None:
        if (block := self._recent.get(number)) is not None:
            return block
        path = self.folder / f"{number:08x}"
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        block, mark = data[:-4], data[-4:]
        right = min(BLOCK, self.size - number * BLOCK)
        return block if len(block) == right and zlib.crc32(block).to_bytes(4, "little") == mark else None

    def _keep(self, number: int, block: bytes) -> None:
        """A cache that cannot be written costs time, not the run."""
        global _unchecked
        with contextlib.suppress(OSError), replacing(self.folder / f"{number:08x}", durable=False) as temporary:
            temporary.write_bytes(block + zlib.crc32(block).to_bytes(4, "little"))
        _unchecked += len(block)
        if _unchecked > cache_bytes() // 512:  # each process looks by itself: together they may be over by some percent
            _unchecked = 0
            make_room(cache_bytes() // 20)  # room for a while: a look at all blocks takes a moment


def sha256_is(sums: dict[str, str | None]) -> Callable[[Path, str], bool]:
    """For `fetch`: copies are compared with these sha256; a name without one is taken as it is."""

    def whole(folder: Path, name: str) -> bool:
        if (wanted := sums.get(name)) is None:
            return True
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == wanted

    return whole


class FollowedFiles:
    """Copies of a few small files of a folder on object storage, which may not exist yet, brought up to date on demand.

    Args:
        url: Of the folder.
        names: Of the files.
    """

    def __init__(self, url: str, names: tuple[str, ...]) -> None:
        self.remote, self.names = Remote(url), names
        self.folder = entry("runs", f"{url}#followed") / self.remote.name
        self._versions: dict[str, str | None] = {}

    def look(self) -> None:
        """Copy what changed. Raises StorageError."""
        for name in self.names:
            version = (self.remote / name).version()
            if version is None:
                (self.folder / name).unlink(missing_ok=True)
            elif version != self._versions.get(name):
                (self.remote / name).download(self.folder / name)
            self._versions[name] = version


_names: dict[Path, str] = {}


def name_copy(copy: Path, url: str) -> None:
    """Note of what a folder is a copy, for `named`."""
    _names[copy] = url


def named(path: Path) -> str:
    """A path as messages name it: the URL of which it is a copy, if it is one."""
    return next(
        (_names[part] + str(path)[len(str(part)) :] for part in (path, *path.parents) if part in _names), str(path)
    )
