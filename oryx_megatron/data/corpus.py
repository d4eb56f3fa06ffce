"""Corpora: which files, in which order, cut into which pieces of work, and the documents of each piece.

A corpus is `stdlib` (the sources of the running Python's standard library), files, folders, or URLs that fsspec knows.
Files are text (one document each, or many between separators), JSON lines or parquet; all but parquet may be
compressed (.gz, .zst, .bz2, .xz). `plan` depends on the input alone, never on how many processes work on it.

Every byte offered is used, or counted and named: files that `plan` leaves out are `LeftOut`, documents that cannot be
used are `Bad`, and what is no part of a document (byte order marks, blank lines) is counted in `Reading.dropped`.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import heapq
import importlib
import io
import json
import lzma
import os
import re
import stat
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from oryx_megatron.data.files import is_skipped_line, is_skipped_list
from oryx_megatron.errors import DataError, first_line

STDLIB = "stdlib"
"""Name of the default corpus: the .py files of the running Python's standard library."""
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
BOM = "\ufeff"
SKIPPED = "skipped.jsonl"
"""PREFIX.skipped.jsonl of a dataset, skipped.jsonl of a tokenizer: lists of what was left out."""
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
BLOCK = 1 << 22
"""Bytes read at once, and roughly the text handed on at once."""
PIECE = 1 << 23
"""Documents longer than this many bytes are encoded in parts, where the tokenizer allows it."""
CUT = re.compile(rb"[A-Za-z] (?=[A-Za-z])")
"""Where a document may be divided: before this space (see Tokenizer.splittable)."""

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
    """A document that cannot be used, or a file that cannot be read on."""

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


def plan(
    inputs: Sequence[str],
    options: ReadOptions,
    unit_bytes: int | None = None,
    shards: int = 1,
    *,
    left_out: list[LeftOut] | None = None,
    outputs: Collection[str | Path] = (),
) -> list[tuple[Segment, ...]]:
    """Pieces of work, in the order of the documents: some small files each, or part of a large one.

    Arguments: `unit_bytes` of input per piece; None chooses 8 MiB, more for corpora above 32 GiB, less when
    `shards` shall each get some of a small one; `left_out` takes what is found in folders and not read; `outputs` are
    files and folders that the command itself writes: they are no input, wherever they lie.
    Raises DataError when an input is missing or holds no file of a known kind.
    """
    left_out = [] if left_out is None else left_out
    own = {os.path.realpath(output) for output in outputs}
    files = [file for source in inputs for file in _files(source, options, left_out, own)]
    if unit_bytes is None:
        total = sum(file.size for file in files)
        unit_bytes = max(8 << 20 if shards == 1 else min(8 << 20, total // (4 * shards)), total // 4096, 1 << 16)
    units: list[tuple[Segment, ...]] = []
    small: list[Segment] = []
    weight = 0

    def close() -> None:
        nonlocal small, weight
        if small:
            units.append(tuple(small))
        small, weight = [], 0

    for file in files:
        parts = list(_cut(file, unit_bytes, options))
        if len(parts) > 1:
            close()
            units += [(part,) for part in parts]
            continue
        small += parts
        weight += file.size
        if weight >= unit_bytes:
            close()
    close()
    return units


def _cut(file: _File, unit_bytes: int, options: ReadOptions) -> Iterator[Segment]:
    """A file as segments of about `unit_bytes`, where its format lets work begin in the middle."""
    path, size = file.path, file.size
    if file.problem is not None:
        yield Segment(path, "text", size, problem=file.problem)
        return
    kind = _format(path, options)
    if kind == "parquet" and size > unit_bytes:
        try:
            yield from _row_groups(path, unit_bytes)
        except OSError:
            yield Segment(path, kind, size)  # reading will say why
        return
    # A separator that can overlap itself ("\n\n") is found only by reading from the beginning.
    lines = kind == "jsonl" or (options.separator is not None and not _overlaps(options.separator))
    if size <= unit_bytes or _compression(path) or kind == "parquet" or not lines:
        yield Segment(path, kind, size)
        return
    for start in range(0, size, unit_bytes):
        stop = min(start + unit_bytes, size)
        yield Segment(path, kind, stop - start, start, stop)


def _row_groups(path: str, unit_bytes: int) -> Iterator[Segment]:
    parquet = _parquet()
    with _open(path) as file:
        try:
            metadata = parquet.ParquetFile(file).metadata
        except _broken_parquet() as error:
            raise DataError(f"{path} is no parquet file, or truncated: {_line(error)}") from error
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    start = weight = 0
    for i, size in enumerate(sizes, 1):
        weight += size
        if weight >= unit_bytes or i == len(sizes):
            yield Segment(path, "parquet", weight, start, i)
            start, weight = i, 0


@dataclass(frozen=True)
class _File:
    path: str
    size: int
    problem: str | None = None
    """Why it cannot be read."""


def _files(source: str, options: ReadOptions, left_out: list[LeftOut], own: Collection[str]) -> list[_File]:
    """Files of one input; those of a folder by path, byte-wise."""
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return _Walk(str(root), lambda name: name.endswith(".py"), skip=PACKAGE_FOLDERS, links=False).files()
    before = len(left_out)
    if "://" in source:
        found = _remote_files(source, options, left_out, own)
    else:
        try:
            status = os.stat(source)
        except (OSError, ValueError) as error:
            if os.path.islink(source):
                raise DataError(f"input {source}: {_link_problem(source, error)}") from error
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise DataError(f"input {source} is neither a file, a folder, a URL nor `{STDLIB}`") from error
            raise DataError(f"cannot read input {source}: {_line(error)}") from error
        if stat.S_ISREG(status.st_mode):
            return [_File(source, status.st_size)]
        if not stat.S_ISDIR(status.st_mode):
            raise DataError(f"input {source} is {_special(status)}, neither a file, a folder, a URL nor `{STDLIB}`")
        found = _Walk(source, lambda name: _wanted(name, options), left_out=left_out, own=own).files()
    if not found:
        reasons = summarize_left_out(left_out[before:])
        counts = ", ".join(f"{facts['files']:,} {reason}" for reason, facts in reasons.items())
        more = f" (left out: {counts})" if counts else ""
        raise DataError(f"input {source} has no file with a known ending; name them with --endings{more}")
    return found


NAMED = 10
"""So many files of each reason stand in a manifest; all of them in PREFIX.skipped.jsonl."""


def summarize_left_out(left_out: Iterable[LeftOut]) -> dict[str, dict[str, Any]]:
    """By reason: how many files, their bytes, and the names of the first."""
    reasons: dict[str, dict[str, Any]] = {}
    for item in left_out:
        facts = reasons.setdefault(item.reason, {"files": 0, "bytes": 0, "first": []})
        facts["files"] += item.files
        facts["bytes"] += item.bytes
        facts["first"] = [*facts["first"], item.place][:NAMED]
    return dict(sorted(reasons.items()))


def _link_problem(path: str, error: BaseException) -> str:
    """Why a link leads nowhere."""
    if isinstance(error, FileNotFoundError):
        return f"a link to {os.readlink(path)}, which does not exist"
    return "a link in a loop" if getattr(error, "errno", None) == errno.ELOOP else _line(error)


def _special(status: os.stat_result) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(status.st_mode), "no regular file")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


class _Walk:
    """The files of a folder. Links are followed; every folder is read once, however many links lead to it.

    Nothing is opened but the first line of lists that an earlier run wrote, so that no FIFO or device can block.
    """

    def __init__(
        self,
        root: str,
        wanted: Callable[[str], bool],
        *,
        left_out: list[LeftOut] | None = None,
        own: Collection[str] = (),
        skip: Sequence[str] = (),
        links: bool = True,
    ) -> None:
        self.root, self.wanted, self.skip, self.links = root, wanted, skip, links
        self.left_out = [] if left_out is None else left_out
        self.own, self.own_names = own, {os.path.basename(output) for output in own}
        self.before = len(self.left_out)
        self.found: list[_File] = []
        self.folders = [root]
        self.linked: list[tuple[bytes, str]] = []  # folders behind links, read after all others

    def files(self) -> list[_File]:
        """By path, byte-wise; so is what is left out."""
        seen: set[tuple[int, int]] = set()
        while self.folders or self.linked:
            if linked := not self.folders:
                folder = heapq.heappop(self.linked)[1]
            else:
                folder = self.folders.pop()
            try:
                status = os.stat(folder)
                if status.st_ino and (status.st_dev, status.st_ino) in seen:
                    # A loop, or one folder twice.
                    self.left_out.append(LeftOut(folder, "folder read already under another name"))
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    for entry in entries:
                        self._take(entry)
            except OSError as error:
                problem = _link_problem(folder, error) if linked else f"the folder: {_line(error)}"
                self.found.append(_File(folder, 0, problem))
        key = len(os.path.join(os.fsencode(self.root), b""))
        self.found.sort(key=lambda file: os.fsencode(file.path)[key:])
        self.left_out[self.before :] = sorted(self.left_out[self.before :], key=lambda item: os.fsencode(item.place))
        return self.found

    def _take(self, entry: os.DirEntry[str]) -> None:
        name, path = entry.name, entry.path
        if name in self.skip or (name in self.own_names and os.path.realpath(path) in self.own):
            return
        if _is_hidden(name):
            files, size = _below(entry)
            if files:
                self.left_out.append(LeftOut(path, "hidden", files, size))
            return
        try:
            status = entry.stat()
        except OSError as error:
            if self.links:
                problem = _link_problem(path, error) if entry.is_symlink() else _line(error)
                self.found.append(_File(path, 0, problem))
            return
        if stat.S_ISDIR(status.st_mode):
            if _is_work_folder(path):
                self.left_out.append(LeftOut(path, "of an unfinished run", *_below(entry)))
            elif not entry.is_symlink():
                self.folders.append(path)
            elif self.links:
                heapq.heappush(self.linked, (os.fsencode(path), path))
        elif not stat.S_ISREG(status.st_mode):
            self.left_out.append(LeftOut(path, "not a regular file"))
        elif not self.wanted(name):
            self.left_out.append(LeftOut(path, "unknown ending", bytes=status.st_size))
        elif name.endswith(SKIPPED) and is_skipped_list(Path(path)):
            self.left_out.append(LeftOut(path, "list of what a run left out", bytes=status.st_size))
        else:
            self.found.append(_File(path, status.st_size))


def _is_work_folder(path: str) -> bool:
    """Whether a folder is the PREFIX.work of another, unfinished run."""
    return path.endswith(".work") and all(os.path.isfile(os.path.join(path, name)) for name in ("lock", "key.json"))


def _below(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Files and bytes of a file or of all below a folder, links not followed; what cannot be read counts as a file."""
    try:
        if not entry.is_dir(follow_symlinks=False):
            return 1, entry.stat(follow_symlinks=False).st_size
        with os.scandir(entry) as entries:
            counts = [_below(inner) for inner in entries]
        return sum(files for files, _ in counts), sum(size for _, size in counts)
    except (OSError, RecursionError):
        return 1, 0


def _remote_files(source: str, options: ReadOptions, left_out: list[LeftOut], own: Collection[str]) -> list[_File]:
    import fsspec.core
    from fsspec.implementations.local import LocalFileSystem

    def url(name: str) -> str:
        return _chained(source, system.unstrip_protocol(name))

    try:
        system, path = fsspec.core.url_to_fs(source)
        if isinstance(system, LocalFileSystem) and os.path.isdir(path):
            there: list[LeftOut] = []
            found = _Walk(path, lambda name: _wanted(name, options), left_out=there, own=own).files()
            left_out += [replace(item, place=url(item.place)) for item in there]
            return [replace(file, path=url(file.path)) for file in found]
        if not system.isdir(path):
            return [_File(url(path), int(system.info(path)["size"] or 0))]
        unread: list[OSError] = []
        own_find = type(system).find is not fsspec.AbstractFileSystem.find  # others have no way to tell of errors
        entries = system.find(path, detail=True, **({} if own_find else {"on_error": unread.append}))
        files = [_File(url(path), 0, f"the folder: {_line(error)}") for error in unread]
        for name, entry in sorted(entries.items(), key=lambda item: os.fsencode(item[0])):
            size = int(entry["size"] or 0)
            inside = name.removeprefix(path).strip("/").split("/")
            if any(map(_is_hidden, inside)):
                left_out.append(LeftOut(url(name), "hidden", bytes=size))
            elif not _wanted(inside[-1], options):
                left_out.append(LeftOut(url(name), "unknown ending", bytes=size))
            elif inside[-1].endswith(SKIPPED) and _is_remote_list(system, name):
                left_out.append(LeftOut(url(name), "list of what a run left out", bytes=size))
            else:
                files.append(_File(url(name), size))
        return files
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"cannot read {source}: {_line(error)}") from error


def _is_remote_list(system: Any, name: str) -> bool:
    with system.open(name, "rb") as file:
        return is_skipped_line(file.readline())


def _chained(source: str, url: str) -> str:
    """The URL of a file found in `source`, behind the same chain of file systems (`zip://…::s3://…`)."""
    first, chain, rest = source.partition("::")
    if not chain:
        return url
    return f"{url}::{rest}" if "://" in first else f"{first}::{url}"


def _name(path: str) -> str:
    """What tells the kind of a file: its path, or the path within a chain of file systems."""
    if "://" not in path or "::" not in path:
        return path
    first, _, rest = path.partition("::")
    return first if "://" in first else rest


def _wanted(name: str, options: ReadOptions) -> bool:
    if options.endings:
        return name.lower().endswith(tuple(ending.lower() for ending in options.endings))
    return _stem(name).endswith((*SOURCE_ENDINGS, *LINES_ENDINGS[:-1], *PARQUET_ENDINGS))


def _compression(path: str) -> str | None:
    """Name of a file's compression; that of archives (.zip) does not count."""
    ending = Path(_name(path)).suffix.lower()
    if not ending or ending in _PLAIN_ENDINGS:
        return None
    ending = COMPRESSED_ENDINGS.get(ending, ending)
    if ending == ".zst":
        return "zstd"  # also where fsspec lacks its package: reading says so
    from fsspec.utils import infer_compression

    kind = infer_compression(f"file{ending}")
    return None if kind == "zip" else kind


def _stem(path: str) -> str:
    """The name that tells a file's format, in lower case: without the ending of its compression."""
    name = _name(path)
    return (name[: -len(Path(name).suffix)] if _compression(path) else name).lower()


def _format(path: str, options: ReadOptions) -> str:
    if options.format != "auto":
        return options.format
    stem = _stem(path)
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
        with _open(path) as file:
            head = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    except DataError:
        return False
    except _unreadable():
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


def _overlaps(separator: str) -> bool:
    """Whether two occurrences can overlap."""
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


def read(unit: Sequence[Segment], options: ReadOptions, reading: Reading | None = None) -> Iterator[Text | Bad]:
    """Documents of a piece of work in order, and in between what is wrong with others.

    Documents above PIECE bytes come in parts (`Text.first`, `Text.last`). After a file that cannot be read on, the next
    file follows.
    """
    reading = Reading() if reading is None else reading
    readers = {"jsonl": _read_lines, "parquet": _read_parquet, "text": _read_text}
    for segment in unit:
        if segment.problem is not None:
            yield Bad(segment.path, "unreadable file", segment.problem, segment.size)
            continue
        try:
            yield from readers[segment.format](segment, options, reading)
        except _unreadable() as error:
            yield Bad(segment.path, "unreadable file", _line(error), segment.size)
        reading.done += segment.size
        reading.position = lambda: 0


def read_documents(source: str, *, text_key: str = "text") -> Iterator[Text]:
    """Documents of a corpus for training tokenizers and for tests.

    Raises DataError with file and line for input that is not usable; test files of the standard library that are not
    UTF-8 and empty documents are left out.
    """
    options = ReadOptions(text_key=text_key)
    for unit in plan([source], options):
        for item in read(unit, options):
            if isinstance(item, Text):
                yield item
            elif item.reason != "empty" and not may_skip(item, [source]):
                raise DataError(describe(item))


def may_skip(bad: Bad, inputs: Sequence[str]) -> bool:
    """The standard library has a few files in other encodings, on purpose: tests of Python's parser."""
    return bad.reason == "not UTF-8" and STDLIB in inputs and bad.place.startswith(sysconfig.get_path("stdlib"))


def check_share(bad: Mapping[str, int], documents: int, unread: int, size: int, allowed: float) -> None:
    """Raise DataError when more than the share `allowed` of the documents is bad, or of `size` input bytes unread.

    Arguments: `bad` counts by reason, `documents` are those that are good.
    """
    advice = "nothing was written. Raise --max-bad and run again to resume"
    if unread > allowed * size:
        raise DataError(
            f"files with {unread / size:.2%} of the input cannot be read to their end, more than "
            f"--max-bad {allowed:.2%}; {advice}"
        )
    number = sum(count for reason, count in bad.items() if reason != "empty")
    if number > allowed * (documents + number):
        worst = max((count, reason) for reason, count in bad.items() if reason != "empty")[1]
        raise DataError(
            f"{number:,} of {documents + number:,} documents are bad ({number / (documents + number):.2%}, mostly: "
            f"{worst}), more than --max-bad {allowed:.2%}; {advice}"
        )


def describe(bad: Bad) -> str:
    """One line: where, what, details."""
    return f"{bad.place}: {bad.reason}" + (f" ({bad.detail})" if bad.detail else "")


def _document(text: str, data: bytes, place: str, options: ReadOptions) -> Iterator[Text | Bad]:
    """One document, whole or in parts."""
    if not data:
        yield Text(text, data, place) if options.keep_empty else Bad(place, "empty")
    elif b"\0" in data and not options.keep_nul:
        yield Bad(place, "NUL character", f"byte {data.index(0)}")
    elif len(data) <= PIECE or not options.splittable:
        yield Text(text, data, place)
    else:
        start, first = 0, True
        while start < len(data):
            stop = _cut_before(data, start + PIECE) if len(data) - start > PIECE else len(data)
            part = data[start:stop]
            yield Text(part.decode(), part, place, first, stop == len(data))
            start, first = stop, False


def _cut_before(data: bytes, position: int) -> int:
    """A place to cut near `position`; the end when there is none after it."""
    last = _last_cut(data, position)
    if last is not None:
        return last
    match = CUT.search(data, position)
    return match.end() - 1 if match else len(data)


def _last_cut(data: bytes, end: int | None = None) -> int | None:
    """The last place to cut before `end`; looks at the last 64 KiB, then at everything."""
    end = len(data) if end is None else end
    for start in (max(end - (1 << 16), 0), 0):
        cuts = [match.end() - 1 for match in CUT.finditer(data, start, end)]
        if cuts:
            return cuts[-1]
    return None


# Text


def _read_text(segment: Segment, options: ReadOptions, reading: Reading) -> Iterator[Text | Bad]:
    if options.separator is not None:
        yield from _read_separated(segment, options.separator, options, reading)
        return
    with _open(segment.path, reading) as file:
        limit = PIECE if options.splittable else options.max_document_bytes
        data = file.read(limit + 1)
        if len(data) > limit:
            if options.splittable:
                yield from _read_long(file, segment.path, options, reading)
            else:
                yield Bad(segment.path, "too long", f"over {limit} bytes; see --max-document-bytes")
            return
    yield from _decoded(data, segment.path, options, reading, begins=True)


def _decoded(
    data: bytes, place: str, options: ReadOptions, reading: Reading, *, begins: bool, of: str = ""
) -> Iterator[Text | Bad]:
    """A document of a text file; `begins`: it stands at the beginning, where a byte order mark is no text."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        detail = f"byte {data[error.start]:#04x} at {error.start}{of}"
        if begins and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            detail += ": this is UTF-16"
        yield Bad(place, "not UTF-8", detail)
        return
    if begins and text.startswith(BOM):
        text, data = text[1:], data[len(codecs.BOM_UTF8) :]
        reading.dropped["byte order mark"] += 1
    yield from _document(text, data, place, options)


def _read_separated(segment: Segment, separator: str, options: ReadOptions, reading: Reading) -> Iterator[Text | Bad]:
    number = 0
    base: int | None = None if segment.start else 0
    mark = _separator(separator)

    def place() -> str:
        nonlocal base
        base = _count(segment, mark) if base is None else base
        return f"{segment.path}:document {base + number}"

    for block in _record_blocks(segment, mark, options, reading):
        for data in block:
            number += 1
            begins = number == 1 and segment.start == 0
            if isinstance(data, int):
                yield Bad(place(), "too long", f"over {data} bytes; see --max-document-bytes")
                continue
            if begins and data == codecs.BOM_UTF8:
                data = b""
                reading.dropped["byte order mark"] += 1
            if not data and not options.keep_empty:
                reading.dropped["blank line" if separator == "\n" else "blank document"] += 1
                continue
            for item in _decoded(data, segment.path, options, reading, begins=begins, of=" of the document"):
                yield replace(item, place=place()) if isinstance(item, Bad) else item


def _read_long(file: BinaryIO, path: str, options: ReadOptions, reading: Reading) -> Iterator[Text | Bad]:
    """A text file in parts, never whole in memory. It is read twice: a bad one must not be found out half-way."""
    file.seek(0)
    problem = _check_long(file, path, options)
    if problem is not None:
        yield problem
        return
    file.seek(0)
    rest, first = file.read(len(codecs.BOM_UTF8)), True
    if rest == codecs.BOM_UTF8:
        rest = b""
        reading.dropped["byte order mark"] += 1
    while block := file.read(BLOCK):
        rest += block
        if len(rest) <= PIECE or (stop := _cut_before(rest, PIECE)) == len(rest):
            continue
        part, rest = rest[:stop], rest[stop:]
        yield Text(part.decode(), part, path, first, last=False)
        first = False
    yield Text(rest.decode(), rest, path, first)


def _check_long(file: BinaryIO, path: str, options: ReadOptions) -> Bad | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = stretch = 0  # bytes so far, and those since the last place to cut
    while block := file.read(BLOCK):
        try:
            decoder.decode(block)
        except UnicodeDecodeError as error:
            return Bad(path, "not UTF-8", f"byte {error.object[error.start]:#04x} near {offset + error.start}")
        if b"\0" in block and not options.keep_nul:
            return Bad(path, "NUL character", f"byte {offset + block.index(0)}")
        offset += len(block)
        cut = _last_cut(block)
        stretch = stretch + len(block) if cut is None else len(block) - cut
        if stretch > options.max_document_bytes:
            return Bad(path, "too long", f"{stretch} bytes without a space between letters; see --max-document-bytes")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return Bad(path, "not UTF-8", "it ends within a character")
    return None


# Records: lines of JSON, text between separators


@dataclass(frozen=True)
class _Separator:
    """What stands between records."""

    data: bytes
    pattern: re.Pattern[bytes] | None = None
    """Matches `data` with line ends of either kind; None: `data` alone."""

    @property
    def longest(self) -> int:
        return len(self.data) + (self.data.count(b"\n") if self.pattern else 0)

    def find(self, data: bytes) -> int:
        """Where the first one ends; -1 when there is none."""
        if self.pattern is not None:
            match = self.pattern.search(data)
            return match.end() if match else -1
        found = data.find(self.data)
        return found + len(self.data) if found >= 0 else -1

    def split(self, data: bytes) -> tuple[list[bytes], list[int] | None]:
        """Records, the last of which has no end yet, and the bytes of each separator (None: all as `data`)."""
        if self.pattern is None:
            return data.split(self.data), None
        if b"\r" not in data:
            records = data.split(self.data)
            return records, [len(self.data)] * (len(records) - 1)
        records, widths, start = [], [], 0
        for match in self.pattern.finditer(data):
            records.append(data[start : match.start()])
            widths.append(match.end() - match.start())
            start = match.end()
        return [*records, data[start:]], widths


def _separator(text: str) -> _Separator:
    """For text: files from Windows end their lines in CR LF, whatever the separator says of line ends."""
    data = text.encode()
    if b"\n" not in data or b"\r" in data:
        return _Separator(data)
    return _Separator(data, re.compile(re.escape(data).replace(b"\\\n", b"\n").replace(b"\n", b"\r?\n")))


LINES = _Separator(b"\n")


def _record_blocks(
    segment: Segment, separator: _Separator, options: ReadOptions, reading: Reading
) -> Iterator[list[bytes | int]]:
    """Lists of records, each about BLOCK bytes: those whose first byte lies in the segment.

    A record above the limit is never held; the limit, a number, stands for it.
    """
    limit, stop = options.max_document_bytes, segment.stop
    exact, longest = len(separator.data), separator.longest
    with _open(segment.path, reading) as file:
        begin = max(segment.start - longest, 0)  # offset in the file of the first byte of `rest`
        file.seek(begin)
        if not _compression(segment.path):
            reading.position = lambda: max(begin - segment.start, 0)
        rest = b""
        skip = segment.start > 0  # drop what comes before the first record that begins in the segment
        while stop is None or begin < stop:
            block = file.read(max(BLOCK, len(rest)))
            if not block:
                if rest and not skip:
                    yield [rest if len(rest) <= limit else limit]
                return
            rest += block
            while skip:
                end = separator.find(rest)
                drop = end if end >= 0 else max(len(rest) - longest + 1, 0)
                rest, begin = rest[drop:], begin + drop
                if end < 0:
                    break
                skip = begin < segment.start
            if skip or (stop is not None and begin >= stop):
                continue
            records, widths = separator.split(rest)
            size = len(rest)
            rest = records.pop()
            if (stop is None or begin + size < stop) and size <= limit:
                begin += size - len(rest)
                if widths and (extra := sum(widths) - exact * len(widths)):
                    reading.dropped["carriage return"] += extra
                yield records  # type: ignore[misc]
                continue
            kept: list[bytes | int] = []
            for i, record in enumerate(records):
                if stop is not None and begin >= stop:
                    break
                width = exact if widths is None else widths[i]
                kept.append(record if len(record) <= limit else limit)
                begin += len(record) + width
                if width > exact:
                    reading.dropped["carriage return"] += width - exact
            yield kept
            if len(rest) > limit and (stop is None or begin < stop):
                yield [limit]
                skip = True


def _read_lines(segment: Segment, options: ReadOptions, reading: Reading) -> Iterator[Text | Bad]:
    key = options.text_key
    load = json.JSONDecoder().decode
    number = 0  # of the line within the segment
    base: int | None = None if segment.start else 0

    def place() -> str:
        """file:line. Lines before a segment in the middle of a file are counted when first needed."""
        nonlocal base
        if base is None:
            base = _count(segment, LINES)
        return f"{segment.path}:{base + number}"

    for block in _record_blocks(segment, LINES, options, reading):
        for line in block:
            number += 1
            if isinstance(line, int):
                yield Bad(place(), "too long", f"over {line} bytes; see --max-document-bytes")
                continue
            try:
                text = load(line.decode())[key]
                data = text.encode()
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                if number == 1 and segment.start == 0 and line.startswith(codecs.BOM_UTF8):
                    line = line.removeprefix(codecs.BOM_UTF8)
                    reading.dropped["byte order mark"] += 1
                if not line.strip():
                    reading.dropped["blank line"] += 1
                    continue
                problem = _line_problem(line, key)
                if isinstance(problem, str):
                    text, data = problem, problem.encode()
                else:
                    yield Bad(place(), *problem)
                    continue
            if data and len(data) <= PIECE and (b"\0" not in data or options.keep_nul):
                yield Text(text, data, f"{segment.path}:{base + number}" if base is not None else segment.path)
            else:
                yield from _document(text, data, place(), options)


def _line_problem(line: bytes, key: str) -> str | tuple[str, str]:
    """What is wrong with a line of JSON lines: reason and detail; or its text when nothing is."""
    try:
        # Python refuses integers of thousands of digits; beside the text they do no harm.
        record = json.loads(line.decode(), parse_int=lambda _: 0)
    except UnicodeDecodeError as error:
        return "not UTF-8", f"byte {line[error.start]:#04x} at {error.start} of the line"
    except json.JSONDecodeError as error:
        return "invalid JSON", f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except RecursionError:
        return "invalid JSON", "nested too deep"
    if not isinstance(record, dict):
        return "wrong type", f"the line is a JSON {_kind(record)}, not an object"
    if key not in record:
        return "missing key", f"no {key!r}, only {', '.join(map(repr, list(record)[:4])) or 'nothing'}; see --text-key"
    text = record[key]
    if not isinstance(text, str):
        return "wrong type", f"{key!r} is a JSON {_kind(text)}, not a string"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return "not Unicode", f"half a surrogate pair at character {error.start}"
    return text


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _count(segment: Segment, separator: _Separator) -> int:
    """Records that begin before the first one of a segment in the middle of a file."""
    count, rest, left = 0, b"", segment.start
    with _open(segment.path) as file:
        while left and (block := file.read(min(BLOCK, left))):
            left -= len(block)
            records, _ = separator.split(rest + block)
            rest = records.pop()
            count += len(records)
            if len(rest) > BLOCK:  # of a long record the end alone can be part of a separator
                rest = rest[-separator.longest :]
    return count if rest == b"" else count + 1


# Parquet


def _read_parquet(segment: Segment, options: ReadOptions, reading: Reading) -> Iterator[Text | Bad]:
    parquet = _parquet()
    column = options.text_key
    broken = _broken_parquet()
    with _open(segment.path, reading) as file:
        try:
            table = parquet.ParquetFile(file)
        except broken as error:
            yield Bad(segment.path, "unreadable file", _line(error), segment.size)
            return
        if column not in table.schema_arrow.names:
            names = ", ".join(map(repr, table.schema_arrow.names[:4]))
            problem = f"no column {column!r}, only {names}; see --text-key"
            yield Bad(segment.path, "missing key", problem, segment.size)
            return
        if (number := table.schema_arrow.names.count(column)) > 1:
            problem = f"{number} columns are named {column!r}; rename them, or name another one with --text-key"
            yield Bad(segment.path, "ambiguous key", problem, segment.size)
            return
        kind = str(table.schema_arrow.field(column).type)
        if kind not in ("string", "large_string", "string_view", "binary", "large_binary"):
            yield Bad(segment.path, "wrong type", f"column {column!r} holds {kind}, not text", segment.size)
            return
        groups = range(segment.start, table.num_row_groups if segment.stop is None else segment.stop)
        row = sum(table.metadata.row_group(i).num_rows for i in range(segment.start))
        for group in groups:
            rows = table.metadata.row_group(group).num_rows
            size = max(table.metadata.row_group(group).total_byte_size, 1)
            # About BLOCK bytes of this group's rows at once.
            batch = max(1, min(rows, rows * BLOCK // size))
            try:
                for part in table.iter_batches(batch_size=batch, row_groups=[group], columns=[column]):
                    for value in part.column(0):
                        row += 1
                        yield from _row(value, f"{segment.path}:row {row}", options)
            except broken as error:
                yield Bad(f"{segment.path}:row group {group}", "unreadable file", _line(error), segment.size)
                return


def _row(value: Any, place: str, options: ReadOptions) -> Iterator[Text | Bad]:
    if not value.is_valid:
        yield Bad(place, "missing key", "the row is null")
        return
    buffer = value.as_buffer()
    if buffer.size > options.max_document_bytes:
        yield Bad(place, "too long", f"{buffer.size} bytes; see --max-document-bytes")
        return
    data = buffer.to_pybytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        yield Bad(place, "not UTF-8", f"byte {data[error.start]:#04x} at {error.start}")
        return
    yield from _document(text, data, place, options)


def _parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("reading parquet needs the package pyarrow: pip install pyarrow") from error


def _broken_parquet() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a file that is no parquet file, or a damaged one."""
    arrow = importlib.import_module("pyarrow")
    return (OSError, ValueError, KeyError, TypeError, OverflowError, arrow.ArrowException)


# Files


@contextlib.contextmanager
def _open(path: str, reading: Reading | None = None) -> Iterator[BinaryIO]:
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
        raise DataError(f"cannot read {path}: {_line(error)}") from error
    with file:
        yield file


def _decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    kind = _compression(path)
    if kind is None:
        return raw
    from fsspec.compression import compr

    if kind not in compr:
        raise DataError("reading .zst needs the package backports.zstd: pip install backports.zstd")
    return io.BufferedReader(compr[kind](raw), 1 << 20)


def _unreadable() -> tuple[type[Exception], ...]:
    """What the file systems and decompressors raise for a file that cannot be read."""
    zstd = [sys.modules[name] for name in ("backports.zstd", "compression.zstd", "zstandard") if name in sys.modules]
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *(module.ZstdError for module in zstd))


def _line(error: BaseException) -> str:
    """First line of an error's message."""
    if isinstance(error, FileNotFoundError):
        return "no such file"  # fsspec says no more than the name
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
