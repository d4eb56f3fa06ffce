"""Corpora: which files, in which order, cut into which pieces of work, and the documents of each piece.

A corpus is `stdlib` (the sources of the running Python's standard library), files, folders, or URLs that fsspec knows.
Files are text (one document each, or many between separators), JSON lines or parquet; all but parquet may be
compressed (.gz, .zst, .bz2, .xz). `plan` depends on the input alone, never on how many processes work on it.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import importlib
import io
import json
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from oryx_megatron.errors import DataError

STDLIB = "stdlib"
"""Name of the default corpus: the .py files of the running Python's standard library."""
SOURCE_ENDINGS = (
    *(".bash", ".c", ".cc", ".cfg", ".cpp", ".cs", ".css", ".cu", ".cuh", ".go", ".h", ".hpp", ".html", ".java", ".jl"),
    *(".js", ".kt", ".lua", ".m", ".md", ".php", ".pl", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".rst", ".scala"),
    *(".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".tsx", ".txt", ".xml", ".yaml", ".yml", ".zig"),
)
"""Endings of files that a folder contributes as text."""
LINES_ENDINGS = (".jsonl", ".ndjson", ".json")
"""Endings of JSON lines; folders contribute the first two."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
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


@dataclass
class Reading:
    """How far `read` is; updated as documents are taken."""

    done: int = 0
    """Input bytes."""
    blank: int = 0
    """Blank lines of JSON lines files, which are no documents."""
    position: Callable[[], int] = field(default=lambda: 0)
    """Input bytes of the segment in work."""


def plan(
    inputs: Sequence[str], options: ReadOptions, unit_bytes: int | None = None, shards: int = 1
) -> list[tuple[Segment, ...]]:
    """Pieces of work, in the order of the documents: some small files each, or part of a large one.

    Arguments: `unit_bytes` of input per piece; None chooses 8 MiB, more for corpora above 32 GiB, less when
    `shards` shall each get some of a small one.
    Raises DataError when an input is missing or holds no file of a known kind.
    """
    files = [file for source in inputs for file in _files(source, options)]
    if unit_bytes is None:
        total = sum(size for _, size in files)
        unit_bytes = max(8 << 20 if shards == 1 else min(8 << 20, total // (4 * shards)), total // 4096, 1 << 16)
    units: list[tuple[Segment, ...]] = []
    small: list[Segment] = []
    weight = 0

    def close() -> None:
        nonlocal small, weight
        if small:
            units.append(tuple(small))
        small, weight = [], 0

    for path, size in files:
        kind = _format(path, options)
        parts = list(_cut(path, kind, size, unit_bytes, options))
        if len(parts) > 1:
            close()
            units += [(part,) for part in parts]
            continue
        small += parts
        weight += size
        if weight >= unit_bytes:
            close()
    close()
    return units


def _cut(path: str, kind: str, size: int, unit_bytes: int, options: ReadOptions) -> Iterator[Segment]:
    """A file as segments of about `unit_bytes`, where its format lets work begin in the middle."""
    if kind == "parquet" and size > unit_bytes:
        yield from _row_groups(path, unit_bytes)
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
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no parquet file, or truncated: {_line(error)}") from error
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    start = weight = 0
    for i, size in enumerate(sizes, 1):
        weight += size
        if weight >= unit_bytes or i == len(sizes):
            yield Segment(path, "parquet", weight, start, i)
            start, weight = i, 0


def _files(source: str, options: ReadOptions) -> list[tuple[str, int]]:
    """Files of one input with their sizes; those of a folder by path, byte-wise."""
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return _walk(root, lambda name: name.endswith(".py"), skip=PACKAGE_FOLDERS)
    if "://" in source:
        return _remote_files(source, options)
    path = Path(source)
    if path.is_file():
        return [(source, path.stat().st_size)]
    if not path.is_dir():
        raise DataError(f"input {source} is neither a file, a folder, a URL nor `{STDLIB}`")
    found = _walk(path, lambda name: _wanted(name, options))
    if not found:
        raise DataError(f"input {source} has no file with a known ending; name them with --endings")
    return found


def _walk(root: Path, wanted: Callable[[str], bool], skip: Sequence[str] = ()) -> list[tuple[str, int]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ("__pycache__", *skip) and not name.startswith(".")]
        found += [Path(folder, name) for name in names if wanted(name) and not name.startswith(".")]
    found.sort(key=lambda path: path.relative_to(root).as_posix().encode())
    return [(str(path), path.stat().st_size) for path in found]


def _remote_files(source: str, options: ReadOptions) -> list[tuple[str, int]]:
    import fsspec.core

    try:
        system, path = fsspec.core.url_to_fs(source)
        if system.isdir(path):
            entries = system.find(path, detail=True)
            found = [(name, entry) for name, entry in entries.items() if _wanted(os.path.basename(name), options)]
            found.sort(key=lambda item: item[0].encode())
        else:
            found = [(path, system.info(path))]
        files = [(_chained(source, system.unstrip_protocol(name)), int(entry["size"] or 0)) for name, entry in found]
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"cannot read {source}: {_line(error)}") from error
    if not files:
        raise DataError(f"input {source} has no file with a known ending; name them with --endings")
    return files


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
        return name.endswith(options.endings)
    stem = name.removesuffix(Path(name).suffix) if _compression(name) else name
    return stem.endswith((*SOURCE_ENDINGS, *LINES_ENDINGS[:2], ".parquet"))


def _compression(path: str) -> str | None:
    return COMPRESSIONS.get(Path(_name(path)).suffix)


def _format(path: str, options: ReadOptions) -> str:
    if options.format != "auto":
        return options.format
    name = _name(path)
    stem = name.removesuffix(Path(name).suffix) if _compression(name) else name
    if stem.endswith(LINES_ENDINGS):
        return "jsonl"
    return "parquet" if stem.endswith(".parquet") else "text"


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
        yield from _read_separated(segment, options.separator.encode(), options, reading)
        return
    with _open(segment.path, reading) as file:
        limit = PIECE if options.splittable else options.max_document_bytes
        data = file.read(limit + 1)
        if len(data) > limit:
            if options.splittable:
                yield from _read_long(file, segment.path, options)
            else:
                yield Bad(segment.path, "too long", f"over {limit} bytes; see --max-document-bytes")
            return
    try:
        yield from _document(data.decode(), data, segment.path, options)
    except UnicodeDecodeError as error:
        yield Bad(segment.path, "not UTF-8", f"byte {data[error.start]:#04x} at {error.start}")


def _read_separated(segment: Segment, separator: bytes, options: ReadOptions, reading: Reading) -> Iterator[Text | Bad]:
    number = 0
    base: int | None = None if segment.start else 0
    for block in _record_blocks(segment, separator, options, reading):
        for data in block:
            number += 1
            if not data and not options.keep_empty:
                reading.blank += 1
                continue
            if not isinstance(data, int):
                try:
                    yield from _document(data.decode(), data, segment.path, options)
                    continue
                except UnicodeDecodeError as error:
                    problem = "not UTF-8", f"byte {data[error.start]:#04x} at {error.start} of the document"
            else:
                problem = "too long", f"over {data} bytes; see --max-document-bytes"
            base = _count(segment, separator) if base is None else base
            yield Bad(f"{segment.path}:document {base + number}", *problem)


def _read_long(file: BinaryIO, path: str, options: ReadOptions) -> Iterator[Text | Bad]:
    """A text file in parts, never whole in memory. It is read twice: a bad one must not be found out half-way."""
    file.seek(0)
    problem = _check_long(file, path, options)
    if problem is not None:
        yield problem
        return
    file.seek(0)
    rest, first = b"", True
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


def _record_blocks(
    segment: Segment, separator: bytes, options: ReadOptions, reading: Reading
) -> Iterator[list[bytes | int]]:
    """Lists of records, each about BLOCK bytes: those whose first byte lies in the segment.

    A record above the limit is never held; the limit, a number, stands for it.
    """
    limit, stop = options.max_document_bytes, segment.stop
    with _open(segment.path, reading) as file:
        begin = max(segment.start - len(separator), 0)  # offset in the file of the first byte of `rest`
        file.seek(begin)
        if not _compression(segment.path):
            reading.position = lambda: max(begin - segment.start, 0)
        rest = b""
        skip = segment.start > 0  # drop what comes before the next separator
        while stop is None or begin < stop:
            block = file.read(max(BLOCK, len(rest)))
            if not block:
                if rest and not skip:
                    yield [rest if len(rest) <= limit else limit]
                return
            rest += block
            if skip:
                found = rest.find(separator)
                drop = found + len(separator) if found >= 0 else max(len(rest) - len(separator) + 1, 0)
                rest, begin = rest[drop:], begin + drop
                if found < 0 or (stop is not None and begin >= stop):
                    continue
                skip = False
            records = rest.split(separator)
            size = len(rest)
            rest = records.pop()
            if (stop is None or begin + size < stop) and size <= limit:
                begin += size - len(rest)
                yield records  # type: ignore[misc]
                continue
            kept: list[bytes | int] = []
            for record in records:
                if stop is not None and begin >= stop:
                    break
                kept.append(record if len(record) <= limit else limit)
                begin += len(record) + len(separator)
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
            base = _count(segment, b"\n")
        return f"{segment.path}:{base + number}"

    for block in _record_blocks(segment, b"\n", options, reading):
        for line in block:
            number += 1
            if isinstance(line, int):
                yield Bad(place(), "too long", f"over {line} bytes; see --max-document-bytes")
                continue
            try:
                text = load(line.decode())[key]
                data = text.encode()
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                if not line.strip():
                    reading.blank += 1
                    continue
                if number == 1 and segment.start == 0 and line.startswith(codecs.BOM_UTF8):
                    line = line.removeprefix(codecs.BOM_UTF8)
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


def _count(segment: Segment, separator: bytes) -> int:
    """Records that begin before the first one of a segment in the middle of a file."""
    count, rest, left = 0, b"", segment.start
    with _open(segment.path) as file:
        while left and (block := file.read(min(BLOCK, left))):
            left -= len(block)
            rest += block
            count += rest.count(separator)
            rest = rest[rest.rfind(separator) + len(separator) :] if separator in rest else rest[-len(separator) :]
    return count if rest == b"" else count + 1


# Parquet


def _read_parquet(segment: Segment, options: ReadOptions, reading: Reading) -> Iterator[Text | Bad]:
    parquet = _parquet()
    column = options.text_key
    with _open(segment.path, reading) as file:
        try:
            table = parquet.ParquetFile(file)
        except ValueError as error:  # pyarrow's ArrowInvalid
            yield Bad(segment.path, "unreadable file", _line(error), segment.size)
            return
        if column not in table.schema_arrow.names:
            names = ", ".join(map(repr, table.schema_arrow.names[:4]))
            problem = f"no column {column!r}, only {names}; see --text-key"
            yield Bad(segment.path, "missing key", problem, segment.size)
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
            except ValueError as error:
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
    if kind == "zstd":
        try:
            zstd = importlib.import_module("backports.zstd")
        except ImportError as error:
            raise DataError("reading .zst needs the package backports.zstd: pip install backports.zstd") from error
        return io.BufferedReader(zstd.ZstdFile(raw), 1 << 20)
    file = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[kind]
    return io.BufferedReader(file(raw) if kind != "gzip" else gzip.GzipFile(fileobj=raw), 1 << 20)


def _unreadable() -> tuple[type[Exception], ...]:
    """What the file systems and decompressors raise for a file that cannot be read."""
    zstd = sys.modules.get("backports.zstd")
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *((zstd.ZstdError,) if zstd else ()))


def _line(error: BaseException) -> str:
    """First line of an error's message."""
    if isinstance(error, FileNotFoundError):
        return "no such file"  # fsspec says no more than the name
    return (str(error).splitlines() or [type(error).__name__])[0]
