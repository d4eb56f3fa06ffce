"""Corpora: which files, in which order, cut into which pieces of work, and the documents of each piece.

A corpus is `stdlib` (the sources of the running Python's standard library), files, folders, or URLs that fsspec knows.
Files are text (one document each, or many between separators), JSON lines or parquet; all but parquet may be
compressed (.gz, .zst, .bz2, .xz). `plan` depends on the input alone, never on how many processes work on it.

Every byte offered is used, or counted and named: files that `plan` leaves out are `LeftOut`, documents that cannot be
used are `Bad`, and what is no part of a document (byte order marks, blank lines) is counted in `Reading.dropped`.
"""

from __future__ import annotations

import codecs
import json
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from oryx_megatron.data.corpus_files import NAMED, PACKAGE_FOLDERS, SKIPPED, STDLIB, plan, summarize_left_out
from oryx_megatron.data.corpus_parts import (
    Bad,
    LeftOut,
    Reading,
    ReadOptions,
    Segment,
    Text,
    broken_parquet,
    compression_of,
    line_of,
    opened,
    parquet_module,
    unreadable,
)
from oryx_megatron.errors import DataError
from oryx_megatron.reading import not_text

__all__ = [
    "NAMED",
    "PACKAGE_FOLDERS",
    "SKIPPED",
    "STDLIB",
    "Bad",
    "LeftOut",
    "ReadOptions",
    "Reading",
    "Segment",
    "Text",
    "check_share",
    "describe",
    "may_skip",
    "plan",
    "read",
    "read_documents",
    "summarize_left_out",
]
BOM = "\ufeff"
BLOCK = 1 << 22
"""Bytes read at once, and roughly the text handed on at once."""
PIECE = 1 << 23
"""Documents longer than this many bytes are encoded in parts, where the tokenizer allows it."""
CUT = re.compile(rb"[A-Za-z] (?=[A-Za-z])")
"""Where a document may be divided: before this space (see Tokenizer.splittable)."""


def read(unit: Sequence[Segment], options: ReadOptions, reading: Reading | None = None) -> Iterator[Text | Bad]:
    """Documents of a piece of work in order, and in between what is wrong with others.

    Documents above PIECE bytes come in parts (`Text.first`, `Text.last`). After a file that cannot be read to its
    end, the next file follows.
    """
    reading = Reading() if reading is None else reading
    readers = {"jsonl": _read_lines, "parquet": _read_parquet, "text": _read_text}
    for segment in unit:
        if segment.problem is not None:
            yield Bad(segment.path, "unreadable file", segment.problem, segment.size)
            continue
        try:
            yield from readers[segment.format](segment, options, reading)
        except unreadable() as error:
            yield Bad(segment.path, "unreadable file", line_of(error), segment.size)
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
            elif not may_skip(item, [source]):
                raise DataError(describe(item))


def may_skip(bad: Bad, inputs: Sequence[str]) -> bool:
    """Whether bad input is left out even where bad input stops: an empty document, or a file that is bad on purpose.

    The standard library has a few in other encodings: tests of Python's parser.
    """
    if bad.reason == "empty":
        return True
    return bad.reason == "not UTF-8" and STDLIB in inputs and bad.place.startswith(sysconfig.get_path("stdlib"))


def check_share(bad: Mapping[str, int], documents: int, unread: int, size: int, allowed: float, hint: str) -> None:
    """Raise DataError when more than the share `allowed` of the documents is bad, or of `size` input bytes unread.

    Arguments: `bad` counts by reason, `documents` are those that are good, `hint` says where they are named.
    """
    advice = f"nothing was written. {hint}"
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
    with opened(segment.path, reading) as file:
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
        if begins:
            detail += not_text(data)
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
            return Bad(
                path,
                "not UTF-8",
                f"byte {error.object[error.start]:#04x} near {offset + error.start}{'' if offset else not_text(block)}",
            )
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
        """Where the first separator ends; -1 when there is none."""
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
    with opened(segment.path, reading) as file:
        begin = max(segment.start - longest, 0)  # offset in the file of the first byte of `rest`
        file.seek(begin)
        if not compression_of(segment.path):
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
    name = json.dumps(key, ensure_ascii=False).encode(errors="surrogateescape")
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
                if line.count(name) > 1:  # within a string its quotes would be escaped
                    _refuse_second(line, key)
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
        return "not UTF-8", f"byte {line[error.start]:#04x} at {error.start} of the line{not_text(line)}"
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
    try:
        _refuse_second(line, key)
    except ValueError as error:
        return "ambiguous key", str(error)
    return text


def _refuse_second(line: bytes, key: str) -> None:
    """Raise ValueError for an object that has its key more than once: all texts but one would be lost."""

    def count(pairs: list[tuple[str, Any]]) -> int:
        return sum(name == key for name, _ in pairs)

    number = json.loads(line.decode(), parse_int=lambda _: 0, object_pairs_hook=count)
    if number > 1:
        raise ValueError(f"{key!r} is there {number} times")


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _count(segment: Segment, separator: _Separator) -> int:
    """Records that begin before the first one of a segment in the middle of a file."""
    count, rest, left = 0, b"", segment.start
    with opened(segment.path) as file:
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
    parquet = parquet_module()
    column = options.text_key
    broken = broken_parquet()
    with opened(segment.path, reading) as file:
        try:
            table = parquet.ParquetFile(file, page_checksum_verification=True)  # of files that have them
        except broken as error:
            yield Bad(segment.path, "unreadable file", line_of(error), segment.size)
            return
        if (wrong := _column_problem(table.schema_arrow, column)) is not None:
            yield Bad(segment.path, *wrong, segment.size)
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
                        value = getattr(value, "value", value)  # of a column with a dictionary, as pandas' categories
                        yield from _row(value, f"{segment.path}:row {row}", options)
            except broken as error:
                yield Bad(f"{segment.path}:row group {group}", "unreadable file", line_of(error), segment.size)
                return


def _column_problem(schema: Any, column: str) -> tuple[str, str] | None:
    """Why the texts of a parquet file cannot be read from this column, as reason and detail; None: they can."""
    if column not in schema.names:
        names = ", ".join(map(repr, schema.names[:4]))
        return "missing key", f"no column {column!r}, only {names}; see --text-key"
    if (number := schema.names.count(column)) > 1:
        detail = f"{number} columns are named {column!r}; rename them, or name another one with --text-key"
        return "ambiguous key", detail
    field = schema.field(column).type
    kind = str(getattr(field, "value_type", None) if str(field).startswith("dictionary") else field)
    if kind not in ("string", "large_string", "string_view", "binary", "large_binary"):
        return "wrong type", f"column {column!r} holds {field}, not text"
    return None


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
