"""Corpus to indexed dataset: by several processes, in order, resumable, with bounded memory.

The corpus is cut into pieces of work that depend on nothing but the corpus (`corpus.plan`). Processes tokenize pieces
into files in PREFIX.work/; the main process appends them in order and now and then writes down how far it got. What
is in that folder after a kill is used by the next run with the same arguments. The bytes of the dataset are the same
for any number of processes and any number of kills.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from oryx_megatron.data.corpus import (
    Bad,
    LeftOut,
    Reading,
    ReadOptions,
    Segment,
    Text,
    check_share,
    describe,
    may_skip,
    plan,
    read,
    summarize_left_out,
)
from oryx_megatron.data.fast import Encoder
from oryx_megatron.data.files import read_json, replacing, write_json
from oryx_megatron.data.indexed import IndexedWriter, check_outputs, file_of, output_prefix, token_dtype
from oryx_megatron.data.tokenizer import Tokenizer, load_tokenizer
from oryx_megatron.errors import DataError

BATCH_BYTES = 1 << 21
"""Text encoded in one call of a library."""
CHECKPOINT_SECONDS = 10.0
"""At most so much merging is done again after a kill; finished pieces are kept anyhow."""
NAMED_FILES = 10_000
"""Of so many input files an unfinished run notes size and time one by one, to tell later which changed."""
LIBRARIES = ("sentencepiece", "tokenizers", "tiktoken", "gigatoken")


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
class _Part:
    """What a process reports of its piece of work."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token: int = -1
    dropped: dict[str, int] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    unread: int = 0
    """Input bytes of files that could not be read to their end."""
    stop: str | None = None
    """The line to stop with."""


def preprocess(
    job: Job,
    prefix: str | Path,
    *,
    processes: int = 1,
    overwrite: bool = False,
    restart: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Tokenize a corpus into PREFIX.bin/.idx/.json; gives the manifest.

    Arguments: `restart` forgets what an unfinished run left; `report` is called a few times per second.
    Raises DataError for bad input (see Job.on_error), an existing dataset, a full disk, or a process that died.
    """
    prefix = output_prefix(prefix)
    tokenizer = load_tokenizer(job.tokenizer)
    job = replace(job, read=replace(job.read, splittable=tokenizer.splittable))
    folder = file_of(prefix, "work")
    _check_work(folder)
    begun = (folder / "key.json").is_file()
    _check_outputs(prefix, job, overwrite or begun)
    left_out: list[LeftOut] = []
    outputs = [file_of(prefix, end) for end in ("bin", "idx", "json", "skipped.jsonl", "work")]
    units = plan(job.inputs, job.read, job.unit_bytes, job.shard[1], left_out=left_out, outputs=outputs)
    units = _shard(units, job.shard)
    if job.shard[0] != 1:
        left_out = []  # the first shard tells of them
    key = _key(job, units, tokenizer)
    with _locked(folder), _writing(folder):
        if file_of(prefix, "idx").exists() and not restart and _finished(folder, key):
            manifest = read_json(file_of(prefix, "json"))
        else:
            _check_outputs(prefix, job, overwrite, resuming=begun)
            state = _resume(folder, key, restart)
            workers = min(processes, len(units)) if processes > 1 else None
            manifest = _run(job, units, left_out, prefix, folder, state, workers, report)
        with contextlib.suppress(OSError):
            _clear(folder, but=("lock", "key.json"))
    shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _check_outputs(prefix: Path, job: Job, overwrite: bool, *, resuming: bool = False) -> None:
    """Refuse to replace what is no dataset of ours, or what the user named as input."""
    inputs = [source.removeprefix("file://") for source in job.inputs]
    check_outputs(prefix, overwrite=overwrite, inputs=inputs, more=("skipped.jsonl",), resuming=resuming)


def _check_work(folder: Path) -> None:
    """Refuse a PREFIX.work that no unfinished run left: what is in there is deleted in the end."""
    if not os.path.lexists(folder):
        return
    known = {"lock", "key.json", "state.json", "parts", "tokens", "lengths", "counts", "index", "skipped.jsonl"}
    try:
        found = [] if folder.is_symlink() else [path.name for path in folder.iterdir()]
        other = [name for name in found if name not in known and not name.startswith((".key.json.", ".state.json."))]
        left = "key.json" in found and {"options", "versions", "input"} <= set(read_json(folder / "key.json"))
        # Killed before it noted what it is about.
        empty = set(found) <= {"lock", "parts"} and not any(folder.glob("parts/*"))
        empty = empty and not ("lock" in found and (folder / "lock").stat().st_size)
        ours = not folder.is_symlink() and not other and (left or empty)
    except (OSError, DataError):
        ours = False
    if not ours:
        raise DataError(f"{folder} exists and is not of an unfinished run; choose another name or move it away")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full or failing disk as one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; run again to resume") from error


def _finished(folder: Path, key: dict[str, Any]) -> bool:
    """Whether the run that `folder` is of was killed after its dataset had got its name."""
    return (folder / "key.json").exists() and read_json(folder / "key.json") == key and _renamed(folder)


def _renamed(folder: Path) -> bool:
    """Whether the finished files have left the folder."""
    return not (folder / "parts").exists() or ((folder / "state.json").exists() and not (folder / "tokens").exists())


def _clear(folder: Path, but: Sequence[str]) -> None:
    """Empty the folder, parts first (see `_renamed`), and last what tells that the folder is ours."""
    if (folder / "parts").exists():
        shutil.rmtree(folder / "parts")
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "key.json"):
        if path.name not in but:
            path.unlink()


def _shard(units: list[tuple[Segment, ...]], shard: tuple[int, int]) -> list[tuple[Segment, ...]]:
    """The pieces of work of one shard: contiguous, and about equal in input bytes."""
    number, count = shard
    if not 1 <= number <= count:
        raise DataError(f"shard {number}/{count}: count shards from 1 to {count}")
    if len(units) < count:
        raise DataError(f"{count} shards are too many: the corpus has {len(units)} pieces of work")
    sizes = np.array([sum(segment.size for segment in unit) for unit in units])
    middles = np.cumsum(sizes) - sizes / 2
    edges = [0]
    for k in range(1, count + 1):
        edge = int(np.searchsorted(middles, sizes.sum() * k / count))
        edges.append(min(max(edge, edges[-1] + 1), len(units) - count + k))  # none without input
    edges[-1] = len(units)
    return units[edges[number - 1] : edges[number]]


def shard_prefix(prefix: str | Path, shard: tuple[int, int]) -> Path:
    """Name of a shard's dataset."""
    number, count = shard
    return Path(prefix) if count == 1 else Path(f"{prefix}-{number:05d}-of-{count:05d}")


def _key(job: Job, units: list[tuple[Segment, ...]], tokenizer: Tokenizer) -> dict[str, Any]:
    """What must be the same for an unfinished run to be gone on with."""
    times = {
        segment.path: os.stat(segment.path).st_mtime_ns
        for unit in units
        for segment in unit
        if "://" not in segment.path and os.path.exists(segment.path)
    }
    pieces = json.dumps([[asdict(segment) for segment in unit] for unit in units]) + json.dumps(times)
    sizes: dict[str, int] = {}
    for unit in units:
        for segment in unit:
            sizes[segment.path] = sizes.get(segment.path, 0) + segment.size
    named = [[path, size, times.get(path)] for path, size in sizes.items()] if len(sizes) <= NAMED_FILES else None
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if _installed(name)}
    options = asdict(job) | {"max_bad": None, "tokenizer": tokenizer.fingerprint, "eod": tokenizer.eod_id}
    if _ends_itself(tokenizer):
        options["ends_itself"] = True  # an earlier version added another end
    if job.on_error == "skip":
        del options["on_error"]  # whoever stopped at bad input may continue and leave it out
    return {
        "options": json.loads(json.dumps(options)),
        "versions": versions,
        "input": hashlib.sha256(pieces.encode()).hexdigest(),
        "files": named,
    }


def _changed_input(before: list[list[Any]] | None, now: list[list[Any]] | None) -> str:
    """What became of the input since an unfinished run read it."""
    if before is None or now is None:
        return "names, sizes or times differ"
    old, new = ({file[0]: file[1:] for file in files} for files in (before, now))
    for path in [*new, *old]:
        if path not in old:
            return f"{path} is new"
        if path not in new:
            return f"{path} is not among them any more"
        if old[path] != new[path]:
            return f"{path} was changed since"
    return "their order"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold PREFIX.work for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is writing to {folder}") from error
        yield


def _resume(folder: Path, key: dict[str, Any], restart: bool) -> dict[str, Any]:
    """State of an unfinished run in `folder`; a fresh one when there is none."""
    fresh: dict[str, Any] = {"merged": 0, "writer": None, "log": 0, "totals": asdict(_Part())}
    begun = (folder / "key.json").exists() and not _renamed(folder)  # else killed while finished files were renamed
    if begun and not restart:
        found = read_json(folder / "key.json")
        if found["input"] != key["input"]:
            what = _changed_input(found.get("files"), key["files"])
            raise DataError(
                f"{folder} is of a run whose input files were others; pass --restart to begin again ({what})"
            )
        for name in ("options", "versions"):
            changed = [field for field, value in key[name].items() if found[name].get(field) != value]
            if changed:
                raise DataError(f"{folder} is of a run with other {', '.join(changed)}; pass --restart to begin again")
        return read_json(folder / "state.json") if (folder / "state.json").exists() else fresh
    _clear(folder, but=("lock",))
    (folder / "parts").mkdir()
    write_json(folder / "key.json", key)
    return fresh


def _run(
    job: Job,
    units: list[tuple[Segment, ...]],
    left_out: list[LeftOut],
    prefix: Path,
    folder: Path,
    state: dict[str, Any],
    processes: int | None,
    report: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.tokenizer)
    sizes = [sum(segment.size for segment in unit) for unit in units]
    done = [number < state["merged"] or _part_file(folder, number, "json").exists() for number in range(len(units))]
    progress = Progress(sum(sizes), before=sum(size for size, finished in zip(sizes, done, strict=True) if finished))
    totals = _Part(**state["totals"])
    todo = [number for number, finished in enumerate(done) if not finished]
    merged, saved = state["merged"], time.monotonic()
    with (
        IndexedWriter(prefix, tokenizer.vocab_size, overwrite=True, folder=folder, state=state["writer"]) as writer,
        _log(folder, state["log"]) as log,
        _workers(job, units, folder, todo, processes) as workers,
    ):

        def save() -> None:
            nonlocal saved
            log.flush()
            os.fsync(log.fileno())
            fields = {"merged": merged, "writer": writer.checkpoint(), "log": log.tell(), "totals": asdict(totals)}
            write_json(folder / "state.json", fields)
            for number in range(state["merged"], merged):
                for end in ("bin", "len", "bad", "json"):
                    _part_file(folder, number, end).unlink(missing_ok=True)
            state["merged"], saved = merged, time.monotonic()

        def tell() -> None:
            if report is not None:
                bytes_, documents, tokens = workers.counts()
                progress.bytes = progress.before + bytes_
                progress.documents, progress.tokens = documents, tokens
                report(progress)

        for number in range(merged, len(units)):
            while not workers.finished(number, 0.2):
                tell()
            part = _Part(**read_json(_part_file(folder, number, "json")))
            if part.stop is not None:
                _part_file(folder, number, "json").unlink()
                raise DataError(part.stop)
            writer.add_file(
                _part_file(folder, number, "bin"),
                np.fromfile(_part_file(folder, number, "len"), "<i8"),
                part.max_token,
            )
            log.write(_part_file(folder, number, "bad").read_bytes())
            _add(totals, part)
            merged += 1
            _check_share(job, totals, progress.total)
            tell()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
        _check_share(job, totals, progress.total, final=True)
        save()
        skipped = dict(sorted(totals.bad.items()))
        more: dict[str, Any] = {
            "append_eod": job.append_eod,
            "source": list(job.inputs),
            "skipped": skipped,
            "left_out": summarize_left_out(left_out),
            "dropped": dict(sorted(totals.dropped.items())),
            "paths": dict(sorted(totals.paths.items())),
            "reading": _reading(job, units),
        }
        if job.shard[1] > 1:
            more["shard"] = list(job.shard)
        writer.check_tokens()
        bad_file = file_of(prefix, "skipped.jsonl")
        if log.tell() or left_out:
            with replacing(bad_file) as temporary:
                shutil.copyfile(folder / "skipped.jsonl", temporary)
                with open(temporary, "ab") as file:
                    file.writelines(_line(item.record()) for item in left_out)
        else:
            bad_file.unlink(missing_ok=True)
        return writer.finish(tokenizer.describe(), totals.text_bytes, **more)


def _reading(job: Job, units: list[tuple[Segment, ...]]) -> dict[str, Any]:
    """How files became documents, for the manifest: datasets for which it differs are not shards of one corpus."""
    options = asdict(job.read) | {"endings": list(job.read.endings)}
    del options["splittable"]  # of the tokenizer
    return {
        "formats": sorted({segment.format for unit in units for segment in unit if segment.problem is None}),
        **options,
    }


def _ends_itself(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts the end of a document after every text: one is enough."""
    return tokenizer.after[-1:] == (tokenizer.eod_id,)


def _add(totals: _Part, part: _Part) -> None:
    totals.documents += part.documents
    totals.tokens += part.tokens
    totals.text_bytes += part.text_bytes
    totals.dropped = dict(Counter(totals.dropped) + Counter(part.dropped))
    totals.unread += part.unread
    totals.max_token = max(totals.max_token, part.max_token)
    totals.paths = dict(Counter(totals.paths) + Counter(part.paths))
    totals.bad = dict(Counter(totals.bad) + Counter(part.bad))


def _check_share(job: Job, totals: _Part, input_bytes: int, *, final: bool = False) -> None:
    if job.on_error == "stop":
        return
    seen = totals.documents + sum(number for reason, number in totals.bad.items() if reason != "empty")
    counts = totals.bad if final or seen >= 100_000 else {}
    check_share(counts, totals.documents, totals.unread, input_bytes, job.max_bad)


def _log(folder: Path, size: int) -> Any:
    """The list of what was left out, cut to its length at the last checkpoint."""
    path = folder / "skipped.jsonl"
    path.touch()
    os.truncate(path, size)
    return open(path, "ab")


def _line(fields: dict[str, Any]) -> bytes:
    """A line of PREFIX.skipped.jsonl."""
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _part_file(folder: Path, number: int, end: str) -> Path:
    return folder / "parts" / f"{number:08d}.{end}"


# Processes


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
                f"a process died at or after {first}, perhaps for want of memory; run the same command "
                "again to resume, with fewer --processes"
            ) from error
        del self.futures[number]
        return True

    def counts(self) -> tuple[int, int, int]:
        table = np.frombuffer(self.shared, np.int64).reshape(-1, 3).sum(0)
        return int(table[0]), int(table[1]), int(table[2])


@contextlib.contextmanager
def _workers(
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
        self.dtype = np.dtype(token_dtype(self.tokenizer.vocab_size))

    def __call__(self, number: int, unit: tuple[Segment, ...]) -> None:
        part, self.encoder.counts = _Part(), Counter()
        reading, base = Reading(), int(self.counts[0])
        files = {end: _part_file(self.folder, number, end) for end in ("bin", "len", "bad")}
        with (
            _writing(self.folder),
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
            write_json(_part_file(self.folder, number, "json"), asdict(part))

    def _batches(self, unit: Sequence[Segment], reading: Reading, part: _Part, log: Any) -> Iterator[list[Text]]:
        """Documents in batches of about BATCH_BYTES; what is bad is counted, logged, or stops the piece of work."""
        batch: list[Text] = []
        size = 0
        for item in read(unit, self.job.read, reading):
            if isinstance(item, Bad):
                skippable = item.reason == "empty" or may_skip(item, self.job.inputs)
                if self.job.on_error == "stop" and not skippable:
                    part.stop = f"{describe(item)}; --on-error skip leaves such input out"
                    return
                part.bad[item.reason] = part.bad.get(item.reason, 0) + 1
                part.unread += item.unread
                log.write(_line(item.record()))
                continue
            batch.append(item)
            size += len(item.data)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _write(self, batch: list[Text], part: _Part, bin_: Any, len_: Any, open_length: int) -> int:
        tokens, lengths = self.encoder.encode(batch)
        ends = np.array([text.last for text in batch])
        totals = np.add.reduceat(lengths, np.flatnonzero(np.concatenate([[True], ends[:-1]])))
        if not batch[0].first:
            totals[0] += open_length
        if self.job.append_eod and not _ends_itself(self.tokenizer):
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
        part.text_bytes += sum(len(text.data) for text in batch)
        self.counts[2] += len(tokens)
        return left
