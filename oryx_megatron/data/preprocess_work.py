"""What a process of preprocessing does: a piece of a corpus to tokens, in files of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from oryx_megatron.data.corpus import (
    Bad,
    Reading,
    ReadOptions,
    Segment,
    Text,
    describe,
    may_skip,
    read,
)
from oryx_megatron.data.fast import Encoder
from oryx_megatron.data.files import write_json
from oryx_megatron.data.indexed import token_dtype
from oryx_megatron.data.lost import LostCharacters
from oryx_megatron.data.tokenizer import Tokenizer, load_tokenizer
from oryx_megatron.errors import DataError

BATCH_BYTES = 1 << 21
"""Text encoded in one call of a library."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the contents of a dataset."""

    inputs: tuple[str, ...]
    """`stdlib`, files, folders or URLs, in this order."""
    tokenizer: str
    """Folder of the tokenizer."""
    read: ReadOptions = field(default_factory=ReadOptions)
    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with bad input: stop at the first, or leave it out and count it."""
    max_bad: float = 0.01
    """With `skip`: largest share of documents that may be bad, and of input in files that cannot be read to the end."""
    fast: bool = True
    """Use gigatoken where it gives the same tokens."""
    verify_fraction: float = 0.001
    """Share of gigatoken's documents that the original library encodes too."""
    shard: tuple[int, int] = (1, 1)
    """(i, n): do the i-th of n parts of the corpus."""
    unit_bytes: int | None = None
    """Input bytes per piece of work; None: chosen by the size of the corpus."""


@dataclass
class Progress:
    """What `preprocess` tells while it works."""

    total: int
    """Bytes of input in all."""
    before: int = 0
    """Of these done by earlier runs."""
    bytes: int = 0
    """Input bytes done."""
    documents: int = 0
    tokens: int = 0


@dataclass
class Piece:
    """What a process reports of its piece of work."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token: int = -1
    dropped: dict[str, int] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    """Characters without a token, by how often they were lost."""
    lost_documents: int = 0
    """Documents with such characters."""
    unknown: int = 0
    """Tokens that stand for what the vocabulary lacks."""
    bad: dict[str, int] = field(default_factory=dict)
    unread: int = 0
    """Input bytes of files that could not be read to their end."""
    stop: str | None = None
    """The line to stop with."""

    def add(self, part: Piece) -> None:
        """Count another piece of work, which did not stop."""
        self.documents += part.documents
        self.tokens += part.tokens
        self.text_bytes += part.text_bytes
        self.max_token = max(self.max_token, part.max_token)
        self.dropped = dict(Counter(self.dropped) + Counter(part.dropped))
        self.paths = dict(Counter(self.paths) + Counter(part.paths))
        self.lost = dict(Counter(self.lost) + Counter(part.lost))
        self.lost_documents += part.lost_documents
        self.unknown += part.unknown
        self.bad = dict(Counter(self.bad) + Counter(part.bad))
        self.unread += part.unread


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A full or failing disk as one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; run again to resume") from error


def ends_itself(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts the end of a document after every text: one is enough."""
    return tokenizer.after[-1:] == (tokenizer.eod_id,)


def skipped_line(fields: dict[str, Any]) -> bytes:
    """A line of PREFIX.skipped.jsonl."""
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def part_file(folder: Path, number: int, end: str) -> Path:
    return folder / "parts" / f"{number:08d}.{end}"


class _InProcess:
    """Does the work when it is asked for."""

    def __init__(self, job: Job, units: list[tuple[Segment, ...]], folder: Path, todo: list[int]) -> None:
        self.work = _Worker(job, folder, np.zeros(3, np.int64))
        self.units, self.todo = units, set(todo)

    def finished(self, number: int, _: float) -> bool:
        if number in self.todo:
            self.work(number, self.units[number])
        return True

    def counts(self) -> tuple[int, int, int]:
        return tuple(int(count) for count in self.work.counts)  # type: ignore[return-value]


class _Pool:
    """Does the work in processes."""

    def __init__(
        self,
        pool: concurrent.futures.ProcessPoolExecutor,
        units: list[tuple[Segment, ...]],
        todo: list[int],
        shared: Any,
    ) -> None:
        self.shared = shared
        self.units = units
        self.futures = {number: pool.submit(_in_worker, number, units[number]) for number in todo}

    def finished(self, number: int, seconds: float) -> bool:
        future = self.futures.get(number)
        if future is None:
            return True
        try:
            future.result(timeout=seconds)
        except concurrent.futures.TimeoutError:
            return False
        except BrokenProcessPool as error:
            first = self.units[number][0].path
            raise DataError(
                f"a process died at or after {first}, perhaps out of memory; run the same command "
                "again to resume, with fewer --processes"
            ) from error
        del self.futures[number]
        return True

    def counts(self) -> tuple[int, int, int]:
        table = np.frombuffer(self.shared, np.int64).reshape(-1, 3).sum(0)
        return int(table[0]), int(table[1]), int(table[2])


@contextlib.contextmanager
def workers(
    job: Job, units: list[tuple[Segment, ...]], folder: Path, todo: list[int], processes: int | None
) -> Iterator[_InProcess | _Pool]:
    if processes is None:
        yield _InProcess(job, units, folder, todo)
        return
    # A fresh interpreter each: fork would copy threads and locks of the libraries.
    context = multiprocessing.get_context("spawn")
    shared = context.RawArray("q", 3 * processes)
    slot = context.Value("i", 0)
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, (job, folder, shared, slot))
    try:
        yield _Pool(pool, units, todo, shared)
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


_worker: _Worker


def _start_worker(job: Job, folder: Path, shared: Any, slot: Any) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with slot.get_lock():
        mine = slot.value
        slot.value += 1
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    _worker = _Worker(job, folder, np.frombuffer(shared, np.int64).reshape(-1, 3)[mine])


def _follow_parent(parent: int) -> None:
    """A killed main process must not leave workers waiting for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _in_worker(number: int, unit: tuple[Segment, ...]) -> None:
    _worker(number, unit)


class _Worker:
    """Tokenizes pieces of work into files of their own."""

    def __init__(self, job: Job, folder: Path, counts: np.ndarray) -> None:
        self.job, self.folder = job, folder
        self.counts = counts
        """Input bytes, documents and tokens so far, where the main process sees them."""
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.encoder = Encoder(self.tokenizer, fast=job.fast, verify_fraction=job.verify_fraction)
        self.lost = LostCharacters(self.tokenizer) if self.tokenizer.leaves_out else None
        self.dtype = np.dtype(token_dtype(self.tokenizer.vocab_size))

    def __call__(self, number: int, unit: tuple[Segment, ...]) -> None:
        part, self.encoder.counts = Piece(), Counter()
        reading, base = Reading(), int(self.counts[0])
        files = {end: part_file(self.folder, number, end) for end in ("bin", "len", "bad")}
        with (
            writing(self.folder),
            open(files["bin"], "wb", buffering=1 << 20) as bin_,
            open(files["len"], "wb") as len_,
            open(files["bad"], "wb") as bad,
        ):
            open_length = 0  # tokens of a document of which more parts follow
            for batch in self._batches(unit, reading, part, bad):
                open_length = self._write(batch, part, bin_, len_, open_length)
                self.counts[0] = base + reading.done + reading.position()
                self.counts[1] += sum(text.last for text in batch)
            for file in (bin_, len_, bad):
                file.flush()
                os.fsync(file.fileno())
            part.dropped = dict(reading.dropped)
            part.paths = dict(self.encoder.counts)
            self.counts[0] = base + sum(segment.size for segment in unit)
            write_json(part_file(self.folder, number, "json"), asdict(part))

    def _batches(self, unit: Sequence[Segment], reading: Reading, part: Piece, log: Any) -> Iterator[list[Text]]:
        """Documents in batches of about BATCH_BYTES; what is bad is counted, logged, or stops the piece of work."""
        batch: list[Text] = []
        size = 0
        for item in read(unit, self.job.read, reading):
            if isinstance(item, Bad):
                if self.job.on_error == "stop" and not may_skip(item, self.job.inputs):
                    part.stop = f"{describe(item)}; --on-error skip leaves such input out"
                    return
                part.bad[item.reason] = part.bad.get(item.reason, 0) + 1
                part.unread += item.unread
                log.write(skipped_line(item.record()))
                continue
            batch.append(item)
            size += len(item.data)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _write(self, batch: list[Text], part: Piece, bin_: Any, len_: Any, open_length: int) -> int:
        tokens, lengths = self.encoder.encode(batch)
        if self.lost is not None:
            characters, documents = self.lost.count(batch)
            part.lost = dict(characters + Counter(part.lost))
            part.lost_documents += documents
        ends = np.array([text.last for text in batch])
        totals = np.add.reduceat(lengths, np.flatnonzero(np.concatenate([[True], ends[:-1]])))
        if not batch[0].first:
            totals[0] += open_length
        if self.job.append_eod and not ends_itself(self.tokenizer):
            # As megatron's tool: nothing, not even an end, for a document without tokens.
            document = np.cumsum(np.concatenate([[0], ends[:-1]]))
            marked = ends & (totals[document] > 0)
            tokens = np.insert(tokens, np.cumsum(lengths)[marked], self.tokenizer.eod_id)
            totals[document[marked]] += 1
        if tokens.size:
            part.max_token = max(part.max_token, int(tokens.max()))
            if part.max_token >= self.tokenizer.vocab_size:
                raise DataError(f"{batch[0].place}: token {part.max_token} is outside the vocabulary")
        bin_.write(tokens.astype(self.dtype).tobytes())
        left = 0
        if not ends[-1]:
            left, totals = int(totals[-1]), totals[:-1]
        len_.write(totals.astype("<i8").tobytes())
        part.documents += len(totals)
        part.tokens += len(tokens)
        if self.tokenizer.unknown_id is not None:
            part.unknown += int(np.count_nonzero(tokens == self.tokenizer.unknown_id))
        part.text_bytes += sum(len(text.data) for text in batch)
        self.counts[2] += len(tokens)
        return left
