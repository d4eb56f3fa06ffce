"""Which files a corpus has, in which order, cut into which pieces of work.

`plan` depends on the input alone, never on how many processes work on it. Files that it leaves out are `LeftOut`.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oryx_megatron.data.corpus_parts import (
    LINES_ENDINGS,
    PARQUET_ENDINGS,
    SOURCE_ENDINGS,
    LeftOut,
    ReadOptions,
    Segment,
    broken_parquet,
    compression_of,
    format_of,
    line_of,
    opened,
    overlaps,
    parquet_module,
    stem_of,
)
from oryx_megatron.data.files import is_skipped_line, is_skipped_list
from oryx_megatron.errors import DataError

STDLIB = "stdlib"
"""Name of the default corpus: the .py files of the running Python's standard library."""
SKIPPED = "skipped.jsonl"
"""PREFIX.skipped.jsonl of a dataset, skipped.jsonl of a tokenizer: lists of what was left out."""
PACKAGE_FOLDERS = ("site-packages", "dist-packages")


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
    Raises DataError when an input is missing, given twice, or holds no file of a known kind.
    """
    left_out = [] if left_out is None else left_out
    own = {os.path.realpath(output) for output in outputs}
    given: dict[str, str] = {}
    for source in inputs:
        place = source if "://" in source or source == STDLIB else os.path.realpath(source)
        if place in given:
            raise DataError(f"input {source} is given twice" + (f" (as {given[place]})" * (source != given[place])))
        given[place] = source
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
    kind = format_of(path, options)
    if kind == "parquet" and size > unit_bytes:
        try:
            yield from _row_groups(path, unit_bytes)
        except OSError:
            yield Segment(path, kind, size)  # reading will say why
        return
    # A separator that can overlap itself ("\n\n") is found only by reading from the beginning.
    lines = kind == "jsonl" or (options.separator is not None and not overlaps(options.separator))
    if size <= unit_bytes or compression_of(path) or kind == "parquet" or not lines:
        yield Segment(path, kind, size)
        return
    for start in range(0, size, unit_bytes):
        stop = min(start + unit_bytes, size)
        yield Segment(path, kind, stop - start, start, stop)


def _row_groups(path: str, unit_bytes: int) -> Iterator[Segment]:
    parquet = parquet_module()
    with opened(path) as file:
        try:
            metadata = parquet.ParquetFile(file).metadata
        except broken_parquet() as error:
            raise DataError(f"{path} is no parquet file, or truncated: {line_of(error)}") from error
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
            raise DataError(f"cannot read input {source}: {line_of(error)}") from error
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
    return "a link in a loop" if getattr(error, "errno", None) == errno.ELOOP else line_of(error)


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
                problem = _link_problem(folder, error) if linked else f"the folder: {line_of(error)}"
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
                problem = _link_problem(path, error) if entry.is_symlink() else line_of(error)
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
        files = [_File(url(path), 0, f"the folder: {line_of(error)}") for error in unread]
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
        raise DataError(f"cannot read {source}: {line_of(error)}") from error


def _is_remote_list(system: Any, name: str) -> bool:
    with system.open(name, "rb") as file:
        return is_skipped_line(file.readline())


def _chained(source: str, url: str) -> str:
    """The URL of a file found in `source`, behind the same chain of file systems (`zip://…::s3://…`)."""
    first, chain, rest = source.partition("::")
    if not chain:
        return url
    return f"{url}::{rest}" if "://" in first else f"{first}::{url}"


def _wanted(name: str, options: ReadOptions) -> bool:
    if options.endings:
        return name.lower().endswith(tuple(ending.lower() for ending in options.endings))
    return stem_of(name).endswith((*SOURCE_ENDINGS, *LINES_ENDINGS[:-1], *PARQUET_ENDINGS))
