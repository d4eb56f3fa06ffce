"""Where the files of an indexed dataset are: in a folder, or on object storage.

On object storage PREFIX.idx and PREFIX.json are copied to the cache of this machine when they changed, and PREFIX.bin
is read in blocks that the cache keeps (storage.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from oryx_megatron import storage
from oryx_megatron.data.files import sha256_of
from oryx_megatron.errors import DataError
from oryx_megatron.paths import is_url
from oryx_megatron.storage import BLOCK, Ranges, Remote, StorageError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

READERS = 16
"""Small pieces fetched at once from object storage."""
VERSIONS = ".versions.json"
"""Beside copies: of what they are copies."""


class Place(Protocol):
    """The files of one dataset. `end` is bin, idx or json."""

    shared: bool
    """Whether all machines of a run see what is written to `folder`."""

    def name(self, end: str) -> str:
        """A file as messages name it."""

    def has(self, end: str) -> bool:
        """Whether there is such a file."""

    def local(self, end: str) -> Path:
        """A file of this machine with its content; not for bin."""

    def size(self, end: str) -> int:
        """Bytes."""

    def written(self, end: str) -> str:
        """Size, and when or as what it was written."""

    def sha256(self, end: str) -> str:
        """sha256 of a whole file, as hex."""

    def pieces(self, end: str, starts: Sequence[int], length: int) -> Iterator[bytes]:
        """`length` bytes of a file from each of `starts` on."""

    def tokens(self, dtype: np.dtype) -> Any:
        """All tokens [tokens]: indexed by a number, a slice or an array of numbers, as a memory-mapped array is."""

    def megatron(self) -> IndexedDataset:
        """The dataset as megatron-core's samples read it."""

    @property
    def folder(self) -> Path:
        """Where caches beside the dataset go."""


def place_of(prefix: str | Path | Remote) -> Place:
    """The files of a prefix or URL. Raises DataError for a folder that has no name of its own."""
    text = str(prefix)
    if is_url(text):
        return StoredPlace(Remote(text))
    if not Path(text).name or Path(text).name == "..":
        raise DataError(f"dataset {text!r} is a folder; name a dataset in it: {text.rstrip('/')}/NAME")
    return LocalPlace(Path(text))


class LocalPlace:
    """Files of this machine."""

    shared = True

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix

    def name(self, end: str) -> str:
        """See Place."""
        return str(file_of(self.prefix, end))

    def has(self, end: str) -> bool:
        """See Place."""
        return file_of(self.prefix, end).is_file()

    def local(self, end: str) -> Path:
        """See Place."""
        return file_of(self.prefix, end)

    def size(self, end: str) -> int:
        """See Place."""
        return file_of(self.prefix, end).stat().st_size

    def written(self, end: str) -> str:
        """See Place."""
        status = file_of(self.prefix, end).stat()
        return f"{status.st_size}:{status.st_mtime_ns}"

    def sha256(self, end: str) -> str:
        """See Place."""
        return sha256_of(file_of(self.prefix, end))

    def pieces(self, end: str, starts: Sequence[int], length: int) -> Iterator[bytes]:
        """See Place."""
        return pieces_of(file_of(self.prefix, end), starts, length)

    def tokens(self, dtype: np.dtype) -> Any:
        """See Place."""
        return np.memmap(file_of(self.prefix, "bin"), dtype, "r")

    def megatron(self) -> IndexedDataset:
        """See Place."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # it imports torch

        return IndexedDataset(str(self.prefix))

    @property
    def folder(self) -> Path:
        """See Place."""
        return self.prefix.parent


class StoredPlace:
    """Files on object storage."""

    shared = False

    def __init__(self, prefix: Remote) -> None:
        self.prefix = prefix

    def name(self, end: str) -> str:
        """See Place."""
        return f"{self.prefix}.{end}"

    def has(self, end: str) -> bool:
        """See Place."""
        return self._versions[end] is not None

    def local(self, end: str) -> Path:
        """See Place."""
        path, version = self.folder / f"{self.prefix.name}.{end}", self.written(end)
        with storage.alone(self.folder):
            kept = self.folder / VERSIONS
            versions: dict[str, str] = {}
            with contextlib.suppress(OSError, ValueError):
                versions = json.loads(kept.read_text())
            if versions.get(end) != version or not path.is_file() or path.stat().st_size != self.size(end):
                storage.make_room(self.size(end))
                self._file(end).download(path)
                kept.write_text(json.dumps(versions | {end: version}))
        return path

    def size(self, end: str) -> int:
        """See Place."""
        return int(self.written(end).partition(":")[0])

    def written(self, end: str) -> str:
        """See Place."""
        if (version := self._versions[end]) is None:
            raise DataError(f"{self.name(end)} is missing")
        return version

    def sha256(self, end: str) -> str:
        """See Place."""
        if end != "bin":
            return sha256_of(self.local(end))
        digest, size = hashlib.sha256(), self.size(end)
        for start in range(0, size, 32 * BLOCK):
            digest.update(self.ranges.read(start, min(start + 32 * BLOCK, size)))
        return digest.hexdigest()

    def pieces(self, end: str, starts: Sequence[int], length: int) -> Iterator[bytes]:
        """See Place; not in blocks, which would be much of the file."""
        if end != "bin":
            yield from pieces_of(self.local(end), starts, length)
            return
        file = self._file(end)
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(lambda start: file.read_range(start, start + length), starts)

    def tokens(self, dtype: np.dtype) -> Any:
        """See Place."""
        return StoredTokens(self.ranges, np.dtype(dtype))

    def megatron(self) -> IndexedDataset:
        """See Place."""
        from oryx_megatron.data.stored import StoredIndexedDataset

        return StoredIndexedDataset(self.prefix.url, self.ranges, self.local("idx"))

    @functools.cached_property
    def folder(self) -> Path:
        """See Place."""
        return storage.entry("datasets", self.prefix.url)

    @functools.cached_property
    def _versions(self) -> dict[str, str | None]:
        with ThreadPoolExecutor(3) as pool:
            ends = ("bin", "idx", "json")
            return dict(zip(ends, pool.map(lambda end: self._file(end).version(), ends)))

    @functools.cached_property
    def ranges(self) -> Ranges:
        """PREFIX.bin, by ranges of bytes."""
        return Ranges(self._file("bin"), self.size("bin"), self.written("bin"))

    def _file(self, end: str) -> Remote:
        return Remote(self.name(end))


class StoredTokens:
    """Tokens of a .bin on object storage, as far as they are asked for.

    Args:
        ranges: The file.
        dtype: Of a token.
    """

    def __init__(self, ranges: Ranges, dtype: np.dtype) -> None:
        self.ranges, self.dtype = ranges, dtype

    def __len__(self) -> int:
        return self.ranges.size // self.dtype.itemsize

    def __getitem__(self, where: Any) -> Any:
        if isinstance(where, slice):
            start, stop, step = where.indices(len(self))
            return self._read(start, max(start, stop))[::step] if step > 0 else self._read(0, len(self))[where]
        if isinstance(where, (int, np.integer)):
            start = int(where) if where >= 0 else int(where) + len(self)
            return self._read(start, start + 1)[0]
        numbers = np.asarray(where)
        found = np.empty(len(numbers), self.dtype)
        size = BLOCK // self.dtype.itemsize
        blocks = numbers // size
        few = len(numbers) <= 1024  # of each block its token alone, rather than all of it

        def one(number: int) -> Any:
            start = number * self.dtype.itemsize
            return np.frombuffer(self.ranges.remote.read_range(start, start + self.dtype.itemsize), self.dtype)[0]

        if few and len(np.unique(blocks)) > 4:
            with ThreadPoolExecutor(READERS) as pool:
                return np.array(list(pool.map(one, numbers.tolist())), self.dtype)
        for block in np.unique(blocks):
            here = blocks == block
            tokens = self._read(int(block) * size, min(int(block + 1) * size, len(self)))
            found[here] = tokens[numbers[here] - int(block) * size]
        return found

    def _read(self, start: int, stop: int) -> np.ndarray:
        width = self.dtype.itemsize
        try:
            return np.frombuffer(self.ranges.read(start * width, stop * width), self.dtype)
        except StorageError as error:
            raise DataError(str(error)) from error


def pieces_of(path: Path, starts: Sequence[int], length: int) -> Iterator[bytes]:
    """`length` bytes of a file of this machine from each of `starts` on."""
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            yield file.read(length)


def file_of(prefix: Path, end: str) -> Path:
    """PREFIX.end"""
    return prefix.with_name(f"{prefix.name}.{end}")
