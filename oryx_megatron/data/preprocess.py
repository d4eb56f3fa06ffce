"""Corpus to indexed dataset: by several processes, in order, resumable, with bounded memory.

The corpus is cut into pieces of work that depend on nothing but the corpus (`corpus.plan`). Processes tokenize pieces
into files in PREFIX.work/; the main process appends them in order and now and then writes down how far it got. What
is in that folder after a kill is used by the next run with the same arguments. The bytes of the dataset are the same
for any number of processes and any number of kills.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from oryx_megatron.data.corpus import (
    LeftOut,
    Segment,
    check_share,
    plan,
    summarize_left_out,
)
from oryx_megatron.data.files import read_json, replacing, write_json
from oryx_megatron.data.indexed import IndexedWriter, check_outputs, file_of, output_prefix
from oryx_megatron.data.lost import summarize_lost
from oryx_megatron.data.preprocess_work import (
    Job,
    Piece,
    Progress,
    ends_itself,
    part_file,
    skipped_line,
    workers,
    writing,
)
from oryx_megatron.data.tokenizer import Tokenizer, load_tokenizer
from oryx_megatron.errors import DataError

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 10.0
"""At most so much merging is done again after a kill; finished pieces are kept in any case."""
NAMED_FILES = 10_000
"""Of so many input files an unfinished run notes size and time one by one, to tell later which changed."""
LIBRARIES = ("sentencepiece", "tokenizers", "tiktoken", "gigatoken")


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
    if tokenizer.leaves_out:
        log.warning(
            "tokenizer %s: characters that its vocabulary lacks get no token and are lost (a BPE without unk_token and "
            "without all bytes); they are counted",
            job.tokenizer,
        )
    job = replace(job, read=replace(job.read, splittable=tokenizer.splittable))
    folder = file_of(prefix, "work")
    _check_work(folder)
    begun = (folder / "key.json").is_file()
    _check_outputs(prefix, job, overwrite or begun)
    left_out: list[LeftOut] = []
    outputs = [file_of(prefix, end) for end in ("bin", "idx", "json", "skipped.jsonl", "work")]
    units = plan(job.inputs, job.read, job.unit_bytes, job.shard[1], left_out=left_out, outputs=outputs)
    corpus = _corpus(units) if job.shard[1] > 1 else ""
    units = _shard(units, job.shard)
    if job.shard[0] != 1:
        left_out = []  # the first shard tells of them
    key = _key(job, units, tokenizer)
    with _locked(folder), writing(folder):
        if file_of(prefix, "idx").exists() and not restart and _finished(folder, key):
            manifest = read_json(file_of(prefix, "json"))
        else:
            _check_outputs(prefix, job, overwrite, resuming=begun)
            state = _resume(folder, key, restart)
            count = min(processes, len(units)) if processes > 1 else None
            manifest = _run(job, units, corpus, left_out, prefix, folder, state, count, report)
        with contextlib.suppress(OSError):
            _clear(folder, but=("lock", "key.json"))
    shutil.rmtree(folder, ignore_errors=True)
    if (lost := manifest.get("lost", {})).get("characters"):
        most = ", ".join(f"{character!a} × {count:,}" for character, count in list(lost["most"].items())[:5])
        log.warning(
            "tokenizer %s: %s characters of %s documents got no token and are lost (%s); train one with byte fallback",
            job.tokenizer, f"{lost['characters']:,}", f"{lost['documents']:,}", most,
        )  # fmt: skip
    if unknown := manifest.get("unknown"):
        log.warning(
            "tokenizer %s: %s of %s tokens are the unknown token, which stands for what its vocabulary lacks",
            job.tokenizer, f"{unknown:,}", f"{manifest['tokens']:,}",
        )  # fmt: skip
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


def _corpus(units: list[tuple[Segment, ...]]) -> str:
    """What is the same for all shards of a corpus: its pieces, by names of files that hold wherever it is mounted."""
    pieces = [[asdict(segment) | {"path": segment.path.rpartition("/")[2]} for segment in unit] for unit in units]
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def _key(job: Job, units: list[tuple[Segment, ...]], tokenizer: Tokenizer) -> dict[str, Any]:
    """What must be the same to resume an unfinished run."""
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
    if ends_itself(tokenizer):
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
    fresh: dict[str, Any] = {"merged": 0, "writer": None, "log": 0, "totals": asdict(Piece())}
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
    corpus: str,
    left_out: list[LeftOut],
    prefix: Path,
    folder: Path,
    state: dict[str, Any],
    processes: int | None,
    report: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.tokenizer)
    sizes = [sum(segment.size for segment in unit) for unit in units]
    done = [number < state["merged"] or part_file(folder, number, "json").exists() for number in range(len(units))]
    progress = Progress(sum(sizes), before=sum(size for size, finished in zip(sizes, done, strict=True) if finished))
    totals = Piece(**state["totals"])
    todo = [number for number, finished in enumerate(done) if not finished]
    merged, saved = state["merged"], time.monotonic()
    with (
        IndexedWriter(prefix, tokenizer.vocab_size, overwrite=True, folder=folder, state=state["writer"]) as writer,
        _log(folder, state["log"]) as log,
        workers(job, units, folder, todo, processes) as at_work,
    ):

        def save() -> None:
            nonlocal saved
            log.flush()
            os.fsync(log.fileno())
            fields = {"merged": merged, "writer": writer.checkpoint(), "log": log.tell(), "totals": asdict(totals)}
            write_json(folder / "state.json", fields)
            for number in range(state["merged"], merged):
                for end in ("bin", "len", "bad", "json"):
                    part_file(folder, number, end).unlink(missing_ok=True)
            state["merged"], saved = merged, time.monotonic()

        def tell() -> None:
            if report is not None:
                bytes_, documents, tokens = at_work.counts()
                progress.bytes = progress.before + bytes_
                progress.documents, progress.tokens = documents, tokens
                report(progress)

        for number in range(merged, len(units)):
            while not at_work.finished(number, 0.2):
                tell()
            part = Piece(**read_json(part_file(folder, number, "json")))
            if part.stop is not None:
                part_file(folder, number, "json").unlink()
                raise DataError(part.stop)
            writer.add_file(
                part_file(folder, number, "bin"),
                np.fromfile(part_file(folder, number, "len"), "<i8"),
                part.max_token,
            )
            log.write(part_file(folder, number, "bad").read_bytes())
            totals.add(part)
            merged += 1
            _check_share(job, totals, progress.total, folder)
            tell()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
        _check_share(job, totals, progress.total, folder, final=True)
        save()
        writer.check_tokens()
        _write_skipped(prefix, folder, left_out, logged=log.tell() > 0)
        return writer.finish(
            tokenizer.describe(), totals.text_bytes, **_manifest_fields(job, units, corpus, left_out, totals, tokenizer)
        )


def _manifest_fields(
    job: Job,
    units: list[tuple[Segment, ...]],
    corpus: str,
    left_out: list[LeftOut],
    totals: Piece,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """How a dataset was made and what was left out of it, for its manifest."""
    fields: dict[str, Any] = {
        "append_eod": job.append_eod,
        "source": list(job.inputs),
        "skipped": dict(sorted(totals.bad.items())),
        "left_out": summarize_left_out(left_out),
        "dropped": dict(sorted(totals.dropped.items())),
        "paths": dict(sorted(totals.paths.items())),
        "reading": _reading(job, units),
    }
    if tokenizer.leaves_out:
        fields["lost"] = summarize_lost(totals.lost, totals.lost_documents)
    if totals.unknown:
        fields["unknown"] = totals.unknown
    if job.shard[1] > 1:
        fields |= {"shard": list(job.shard), "corpus": corpus}
    return fields


def _write_skipped(prefix: Path, folder: Path, left_out: list[LeftOut], *, logged: bool) -> None:
    """Write PREFIX.skipped.jsonl: the documents `logged` in the work folder, then files left out; none: no file."""
    skipped = file_of(prefix, "skipped.jsonl")
    if not logged and not left_out:
        skipped.unlink(missing_ok=True)
        return
    with replacing(skipped) as temporary:
        shutil.copyfile(folder / "skipped.jsonl", temporary)
        with open(temporary, "ab") as file:
            file.writelines(skipped_line(item.record()) for item in left_out)


def _reading(job: Job, units: list[tuple[Segment, ...]]) -> dict[str, Any]:
    """How files became documents, for the manifest: datasets for which it differs are not shards of one corpus."""
    options = asdict(job.read) | {"endings": list(job.read.endings)}
    del options["splittable"]  # of the tokenizer
    return {
        "formats": sorted({segment.format for unit in units for segment in unit if segment.problem is None}),
        **options,
    }


def _check_share(job: Job, totals: Piece, input_bytes: int, folder: Path, *, final: bool = False) -> None:
    if job.on_error == "stop":
        return
    seen = totals.documents + sum(number for reason, number in totals.bad.items() if reason != "empty")
    hint = f"{folder}/skipped.jsonl lists them. Raise --max-bad and run again to resume"
    counts = totals.bad if final or seen >= 100_000 else {}
    check_share(counts, totals.documents, totals.unread, input_bytes, job.max_bad, hint)


def _log(folder: Path, size: int) -> Any:
    """The list of what was left out, cut to its length at the last checkpoint."""
    path = folder / "skipped.jsonl"
    path.touch()
    os.truncate(path, size)
    return open(path, "ab")
