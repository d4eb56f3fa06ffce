"""The parts of a corpus: how its files are read, what their names tell, and how they are opened."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from oryx_megatron.errors import DataError, first_line

SOURCE_ENDINGS = (
    *(".bash", ".c", ".cc", ".cfg", ".cpp", ".cs", ".css", ".cu", ".cuh", ".go", ".h", ".hpp", ".html", ".java", ".jl"),
    *(".js", ".kt", ".lua", ".m", ".md", ".php", ".pl", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".rst", ".scala"),
    *(".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".tsx", ".txt", ".xml", ".yaml", ".yml", ".zig"),
)
"""Endings of files that a folder contributes as text."""
LINES_ENDINGS = (".jsonl", ".jsonlines", ".ndjson", ".ldjson", ".json")
"""Endings of JSON lines; folders contribute all but the last."""
MIXED_ENDING = ".jl"
"""JSON lines or Julia: the first line tells."""
PARQUET_ENDINGS = (".parquet", ".parq", ".pq")
_PLAIN_ENDINGS = frozenset((*SOURCE_ENDINGS, *LINES_ENDINGS, MIXED_ENDING, *PARQUET_ENDINGS))
COMPRESSED_ENDINGS = {".gzip": ".gz", ".zstd": ".zst"}
"""Endings that fsspec, which knows the compressions, calls otherwise. Letter case does not count, here and above."""

Format = Literal["auto", "text", "jsonl", "parquet"]


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    format: Format = "auto"
    """By ending when `auto`."""
    text_key: str = "text"
    """Key, or column, of the text."""
    separator: str | None = None
    """What stands between the documents of a text file; None: a file is one document."""
    endings: tuple[str, ...] = ()
    """Endings of the files that folders contribute; (): SOURCE_ENDINGS, JSON lines and parquet."""
    max_document_bytes: int = 1 << 28
    """Longer records (lines of JSON, rows, text between separators) count as bad input."""
    keep_empty: bool = False
    """Keep empty documents, as megatron's tool does, instead of leaving them out."""
    keep_nul: bool = False
    """Keep documents that hold a NUL character, which mostly means binary data."""
    splittable: bool = True
    """Documents above PIECE may be cut at CUT."""


@dataclass(frozen=True)
class Segment:
    """Part of one file."""

    path: str
    format: str
    """text, jsonl or parquet."""
    size: int
    """Bytes of input, compressed or not, for progress."""
    start: int = 0
    """First byte (parquet: row group); a document belongs to the segment its first byte lies in."""
    stop: int | None = None
    """Byte (row group) after the last; None: to the end of the file."""
    problem: str | None = None
    """Why it can already be seen not to be readable."""


@dataclass(frozen=True)
class Text:
    """A document, or a part of a very long one."""

    text: str
    data: bytes
    """`text` in UTF-8."""
    place: str
    """Where it is from, for messages."""
    first: bool = True
    """It begins its document."""
    last: bool = True
    """It ends its document."""


@dataclass(frozen=True)
class Bad:
    """A document that cannot be used, or a file that cannot be read to its end."""

    place: str
    reason: str
    """One of a few words, for counting."""
    detail: str = ""
    unread: int = 0
    """Input bytes of the file, or the part of it, that could not be read to its end."""

    def record(self) -> dict[str, Any]:
        """The line for PREFIX.skipped.jsonl."""
        fields = {"place": self.place, "reason": self.reason, "detail": self.detail}
        return fields | ({"unread": self.unread} if self.unread else {})


@dataclass(frozen=True)
class LeftOut:
    """A file, or the files of a folder, that `plan` found and that no piece of work reads."""

    place: str
    reason: str
    """One of a few words, for counting."""
    files: int = 1
    bytes: int = 0

    def record(self) -> dict[str, Any]:
        """The line for PREFIX.skipped.jsonl."""
        return {"place": self.place, "reason": self.reason, "detail": "", "files": self.files, "bytes": self.bytes}


@dataclass
class Reading:
    """How far `read` is; updated as documents are taken."""

    done: int = 0
    """Input bytes."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What is no part of any document, by kind: blank lines, byte order marks, carriage returns before a separator."""
    position: Callable[[], int] = field(default=lambda: 0)
    """Input bytes of the segment in work."""


def name_of(path: str) -> str:
    """What tells the kind of a file: its path, or the path within a chain of file systems."""
    if "://" not in path or "::" not in path:
        return path
    first, _, rest = path.partition("::")
    return first if "://" in first else rest


def compression_of(path: str) -> str | None:
    """Name of a file's compression; that of archives (.zip) does not count."""
    ending = Path(name_of(path)).suffix.lower()
    if not ending or ending in _PLAIN_ENDINGS:
        return None
    ending = COMPRESSED_ENDINGS.get(ending, ending)
    if ending == ".zst":
        return "zstd"  # also where fsspec lacks its package: reading says so
    from fsspec.utils import infer_compression

    kind = infer_compression(f"file{ending}")
    return None if kind == "zip" else kind


def stem_of(path: str) -> str:
    """The name that tells a file's format, in lower case: without the ending of its compression."""
    name = name_of(path)
    return (name[: -len(Path(name).suffix)] if compression_of(path) else name).lower()


def format_of(path: str, options: ReadOptions) -> str:
    if options.format != "auto":
        return options.format
    stem = stem_of(path)
    if stem.endswith(LINES_ENDINGS):
        return "jsonl"
    if stem.endswith(PARQUET_ENDINGS):
        return "parquet"
    if stem.endswith(MIXED_ENDING):
        return "jsonl" if _begins_with_object(path) else "text"
    if not stem.endswith(SOURCE_ENDINGS) and _begins_with_object(path):
        raise DataError(
            f"{path} looks like JSON lines, which its ending does not say; give --format jsonl, or --format text to "
            "take it as text"
        )
    return "text"


def _begins_with_object(path: str) -> bool:
    """Whether the first line of a file that is not blank is a JSON object."""
    try:
        with opened(path) as file:
            head = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    except DataError:
        return False
    except unreadable():
        return False
    line, end, _ = head.partition(b"\n")
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except RecursionError:
        return False
    except ValueError:
        return not end and re.match(rb'\{\s*"', line) is not None  # too long to see its end


def overlaps(separator: str) -> bool:
    """Whether two occurrences can overlap."""
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


def parquet_module() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("reading parquet needs the package pyarrow: pip install pyarrow") from error


def broken_parquet() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a file that is no parquet file, or a damaged one."""
    arrow = importlib.import_module("pyarrow")
    return (OSError, ValueError, KeyError, TypeError, OverflowError, arrow.ArrowException)


@contextlib.contextmanager
def opened(path: str, reading: Reading | None = None) -> Iterator[BinaryIO]:
    """Open a file or URL, decompressed; `reading` learns the position in the file as it is."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(_open_raw(path))
        if reading is not None:
            reading.position = raw.tell
            stack.callback(setattr, reading, "position", lambda: 0)
        yield stack.enter_context(_decompressed(raw, path))


@contextlib.contextmanager
def _open_raw(path: str) -> Iterator[BinaryIO]:
    if "://" not in path:
        with open(path, "rb", buffering=1 << 20) as local:
            yield local
        return
    import fsspec.core

    try:
        system, name = fsspec.core.url_to_fs(path)  # an archive is closed when its file system is forgotten
        file = system.open(name, "rb")
    except (ImportError, ValueError) as error:
        raise DataError(f"cannot read {path}: {line_of(error)}") from error
    with file:
        yield file


def _decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    kind = compression_of(path)
    if kind is None:
        return raw
    from fsspec.compression import compr

    if kind not in compr:
        raise DataError("reading .zst needs the package backports.zstd: pip install backports.zstd")
    reader = _Streams(raw, *_STREAMS[kind]) if kind in _STREAMS else compr[kind](raw)
    return io.BufferedReader(reader, 1 << 20)


_STREAMS: dict[str, tuple[Callable[[], Any], bytes]] = {
    "bz2": (bz2.BZ2Decompressor, b""),
    "xz": (lzma.LZMADecompressor, b"\0"),
    "lzma": (lzma.LZMADecompressor, b""),
}
"""Python's own readers of these end without an error at bytes after a stream that begin no other one: at padding, which
xz allows, or at a stream with a damaged head. What follows would be lost."""


class _Streams(io.RawIOBase):
    """Compressed streams, one after another, up to the last byte; raises what the decompressor does at other bytes.

    Args:
        raw: Where they are.
        decompressor: Makes one for a stream.
        padding: Bytes that may stand behind a stream.
    """

    def __init__(self, raw: BinaryIO, decompressor: Callable[[], Any], padding: bytes) -> None:
        self.raw, self.decompressor, self.padding = raw, decompressor, padding
        self.stream, self.position = decompressor(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.raw.seekable()

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            block = b""
            if self.stream.eof:
                block = self.stream.unused_data.lstrip(self.padding)
                while not block:
                    if not (more := self.raw.read(1 << 16)):
                        return 0
                    block = more.lstrip(self.padding)
                self.stream = self.decompressor()
            elif self.stream.needs_input and not (block := self.raw.read(1 << 16)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            data = self.stream.decompress(block, len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            while self.read(1 << 20):
                pass
        offset += self.position if whence != io.SEEK_SET else 0
        if offset < self.position:
            self.raw.seek(0)
            self.stream, self.position = self.decompressor(), 0
        while self.position < offset and self.read(min(offset - self.position, 1 << 20)):
            pass
        return self.position


def unreadable() -> tuple[type[Exception], ...]:
    """What the file systems and decompressors raise for a file that cannot be read."""
    zstd = [sys.modules[name] for name in ("backports.zstd", "compression.zstd", "zstandard") if name in sys.modules]
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *(module.ZstdError for module in zstd))


def line_of(error: BaseException) -> str:
    """First line of an error's message."""
    if isinstance(error, FileNotFoundError):
        return "no such file"  # fsspec says no more than the name
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
