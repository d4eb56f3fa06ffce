"""Merging, splitting, verifying and comparing indexed datasets."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oryx_megatron.data.corpus import NAMED
from oryx_megatron.data.files import same_file, sha256_of
from oryx_megatron.data.indexed import (
    BLOCK,
    Dataset,
    IndexedWriter,
    check_outputs,
    file_of,
    open_dataset,
    output_prefix,
)
from oryx_megatron.data.lost import add_lost
from oryx_megatron.data.tokenizer import difference
from oryx_megatron.errors import DataError
from oryx_megatron.storage import Remote

log = logging.getLogger(__name__)

UNKNOWN = object()
TOKENIZER_FACTS = (("tokenizer", "fingerprint"), ("end-of-document token", "eod"))


def merge(prefixes: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the documents of several datasets, one after the other, as one; gives its manifest.

    Merged shards are, byte for byte, the dataset made without sharding. Raises DataError for a damaged dataset, shards
    that do not belong together, other token formats or other tokenizers, a dataset given twice. Warns of a copy.
    """
    output = output_prefix(output)
    parts = [open_dataset(prefix) for prefix in prefixes]
    if len(parts) < 2:
        raise DataError("merging needs at least two datasets")
    for i, part in enumerate(parts):
        if _shares_files(output, part.prefix):
            raise DataError(f"the output {output} is one of the inputs ({part.prefix})")
        for other in parts[:i]:
            if _shares_files(part.prefix, other.prefix):
                raise DataError(f"dataset {part.prefix} is given twice")
    check_outputs(output, overwrite=overwrite)
    first = parts[0]
    for part in parts[1:]:
        if part.index.dtype != first.index.dtype:
            raise DataError(f"{part.prefix} holds {part.index.dtype}, {first.prefix} holds {first.index.dtype}")
        _check_alike(first, part)
    _check_shards(parts)
    for i, part in enumerate(parts):
        if (same := next((other for other in parts[:i] if _is_copy(part, other)), None)) is not None:
            log.warning("%s holds the same documents as %s: the output has them twice", part.prefix, same.prefix)
    known = all(part.manifest is not None and part.manifest["bytes"] is not None for part in parts)
    size = sum(part.manifest["bytes"] for part in parts) if known else None  # type: ignore[index]
    counts: dict[str, Any] = {field: _sums(parts, field) for field in ("skipped", "dropped", "paths")}
    left_out = _left_out(parts)
    if (lost := add_lost([part.facts.get("lost") for part in parts])) is not None:
        counts["lost"] = lost
    if unknown := sum(part.facts.get("unknown", 0) for part in parts):
        counts["unknown"] = unknown
    with IndexedWriter(output, _vocabulary(first), overwrite=overwrite, dtype=first.index.dtype) as writer:
        for part in parts:
            _copy(part, writer, 0, part.documents)
        sources = [str(prefix) for prefix in prefixes]
        return _finish(writer, first, size, merged=sources, left_out=left_out, **counts, **_common(parts))


def split(
    prefix: str | Path,
    shares: dict[str, float],
    output: str | Path,
    *,
    seed: int | None = None,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Divide a dataset by documents into OUTPUT_NAME for each name; gives their manifests.

    Arguments: `shares` are relative sizes; the parts follow each other in the dataset, or, with `seed`, documents are
    assigned at random, each part keeping their order. Every document is in one part.
    Raises DataError when a part would be empty.
    """
    for name in shares:
        if not name or "/" in name:
            raise DataError(f"part {name!r}: the name becomes the end of a file name and cannot hold `/`")
    outputs = {name: output_prefix(f"{output}_{name}") for name in shares}
    dataset = open_dataset(prefix)
    for out in outputs.values():
        if _shares_files(out, dataset.prefix):
            raise DataError(f"the output {out} is the input ({dataset.prefix})")
        check_outputs(out, overwrite=overwrite)
    for name, share in shares.items():
        if not 0 < share < np.inf:
            raise DataError(f"part {name}={share:g}: shares must be above 0, and finite")
    edges = np.round(np.cumsum([0.0, *shares.values()]) / sum(shares.values()) * dataset.documents).astype(int)
    order = np.arange(dataset.documents) if seed is None else np.random.default_rng(seed).permutation(dataset.documents)
    chosen = {name: np.sort(order[a:b]) for name, a, b in zip(shares, edges, edges[1:])}
    for name, numbers in chosen.items():
        if not len(numbers):
            raise DataError(f"part {name} of {prefix} would be empty: the dataset has {dataset.documents} documents")
    manifests = {}
    for name, numbers in chosen.items():
        vocabulary, dtype = _vocabulary(dataset), dataset.index.dtype
        with IndexedWriter(outputs[name], vocabulary, overwrite=overwrite, dtype=dtype) as writer:
            # Runs of neighbours are copied at once.
            breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
            for run in np.split(numbers, breaks):
                _copy(dataset, writer, int(run[0]), int(run[-1]) + 1)
            size = dataset.facts.get("bytes")
            if size is not None:
                size = round(size * writer.tokens / dataset.tokens)
            more = {"split_from": str(prefix), "seed": seed, "bytes_estimated": True}
            manifests[name] = _finish(writer, dataset, size, **more)
    return manifests


def _copy(dataset: Dataset, writer: IndexedWriter, start: int, stop: int) -> None:
    """Append documents [start, stop)."""
    data = dataset.data()
    index = dataset.index
    step = 1 << 16
    for begin in range(start, stop, step):
        bounds = np.asarray(index.documents[begin : min(begin + step, stop) + 1])
        lengths = np.asarray(index.lengths[bounds[0] : bounds[-1]])
        if not len(lengths):
            writer.add(np.zeros(0, index.dtype), lengths, np.diff(bounds))
            continue
        first = int(index.offsets[bounds[0]]) // index.dtype.itemsize
        last = first + int(lengths.sum(dtype=np.int64))
        for position in range(first, last - BLOCK, BLOCK):
            writer.add_tokens(data[position : position + BLOCK])
            first = position + BLOCK
        writer.add(data[first:last], lengths, np.diff(bounds))


def _sums(parts: Sequence[Dataset], field: str) -> dict[str, int]:
    """What the manifests count under `field`, added up by name."""
    sums: Counter[str] = Counter()
    for part in parts:
        sums.update(part.facts.get(field, {}))
    return dict(sorted(sums.items()))


def _tokenizer(dataset: Dataset) -> dict[str, Any] | None:
    return dataset.facts.get("tokenizer")


def _check_alike(first: Dataset, part: Dataset) -> None:
    """Refuse datasets of which one text would be other tokens in each."""
    made, wanted = _tokenizer(part), _tokenizer(first)
    if (made is None) != (wanted is None):
        unknown, known = (part, first) if made is None else (first, part)
        raise DataError(
            f"{part.prefix} was made with another tokenizer than {first.prefix}, as far as known: {unknown.prefix} "
            f"names none, {known.prefix} does; tokenize it again, or name both in a blend"
        )
    if made is not None and wanted is not None and (why := difference(made, wanted)) is not None:
        raise DataError(f"{part.prefix} was made with another tokenizer than {first.prefix}: {why}; tokenize it again")
    for name, option in (("append_eod", "--no-eod"), ("separator", "--separator")):
        left, right = (_option(dataset, name) for dataset in (first, part))
        if UNKNOWN not in (left, right) and left != right:
            raise DataError(
                f"{part.prefix} was made with another {option} than {first.prefix} ({name} {right!r}, not {left!r}); "
                "tokenize it again, or name both in a blend"
            )


def _option(dataset: Dataset, name: str) -> object:
    """With what option a dataset was made; UNKNOWN when that is not written down or made no difference."""
    reading = dataset.facts.get("reading", {})
    if name == "separator" and "text" not in reading.get("formats", ()):
        return UNKNOWN
    return dataset.facts.get(name, reading.get(name, UNKNOWN))


def _common(parts: Sequence[Dataset]) -> dict[str, Any]:
    """How the files of all parts became documents: what is the same in all, and the formats of any."""
    readings = [part.facts.get("reading", {}) for part in parts]
    same = {name: value for name, value in readings[0].items() if all(r.get(name, value) == value for r in readings)}
    formats = sorted({name for reading in readings for name in reading.get("formats", ())})
    return {"reading": same | {"formats": formats}} if formats else {}


def _left_out(parts: Sequence[Dataset]) -> dict[str, dict[str, Any]]:
    """What `summarize_left_out` gave for each of the datasets, together."""
    total: dict[str, dict[str, Any]] = {}
    for part in parts:
        for reason, found in part.facts.get("left_out", {}).items():
            into = total.setdefault(reason, {"files": 0, "bytes": 0, "first": []})
            into["files"] += found["files"]
            into["bytes"] += found["bytes"]
            into["first"] = [*into["first"], *found["first"]][:NAMED]
    return dict(sorted(total.items()))


def _vocabulary(dataset: Dataset) -> int:
    """The vocabulary of a dataset; for one of another tool, the largest its token format allows."""
    made = _tokenizer(dataset)
    return made["vocab_size"] if made is not None else int(np.iinfo(dataset.index.dtype).max) + 1


def _shares_files(left: Path | Remote, right: Path | Remote) -> bool:
    """Whether two prefixes are one dataset, or share a file by a link."""
    if isinstance(left, Remote) or isinstance(right, Remote):
        return left == right
    return any(same_file(file_of(left, end), file_of(right, end)) for end in ("bin", "idx", "json"))


def _is_copy(left: Dataset, right: Dataset) -> bool:
    """Whether two datasets hold the same documents. Shards are told apart by their numbers: any may be alike."""
    if left.tokens == 0 or any("shard" in dataset.facts for dataset in (left, right)):
        return False
    if left.manifest is not None and right.manifest is not None:
        return left.identity() == right.identity()
    return left.digests == right.digests


def _finish(writer: IndexedWriter, source: Dataset, size: int | None, **more: Any) -> dict[str, Any]:
    manifest = source.facts
    kept = {name: manifest[name] for name in ("append_eod", "reading") if name in manifest}
    return writer.finish(manifest.get("tokenizer"), size, **kept | more)


def _check_shards(parts: Sequence[Dataset]) -> None:
    shards = [part.facts.get("shard") for part in parts]
    if not any(shards):
        return
    wanted = [[number, len(parts)] for number in range(1, len(parts) + 1)]
    if shards != wanted:
        found = ", ".join(f"{shard[0]}/{shard[1]}" if shard else "none" for shard in shards)
        raise DataError(f"the shards are {found}; merging needs each of them once and in order")
    readings = [part.facts.get("reading") for part in parts]
    for part, reading in zip(parts, readings, strict=True):
        if reading is None or readings[0] is None:
            continue
        changed = [name for name in reading if name != "formats" and reading[name] != readings[0].get(name)]
        if changed:
            raise DataError(
                f"{part.prefix} is no shard of what {parts[0].prefix} is of: it was made with another "
                f"{', '.join(changed)}; make all shards with one command but for --shard"
            )
    corpora = [part.facts.get("corpus") for part in parts]  # None: of an earlier version
    for part, corpus in zip(parts, corpora, strict=True):
        if None not in (corpus, corpora[0]) and corpus != corpora[0]:
            raise DataError(
                f"{part.prefix} is no shard of what {parts[0].prefix} is of: its input files, or their sizes, "
                "differ; make both again"
            )


@dataclass(frozen=True)
class Findings:
    """What a full reading of a dataset found."""

    problems: tuple[str, ...]
    """One line each; () when the dataset is sound."""
    highest: int
    """Largest token."""
    ended: int | None
    """Documents that end with the end-of-document token; None when that token is not known."""


def verify(prefix: str | Path, *, eod: int | None = None, vocab_size: int | None = None) -> Findings:
    """Read a whole dataset: index against data, every token against the vocabulary, both files against the manifest.

    Raises DataError when it cannot be opened at all.
    """
    dataset = open_dataset(prefix, content=False)
    manifest, problems = dataset.manifest, []
    if manifest is not None and manifest["tokenizer"] is not None:
        vocab_size = manifest["tokenizer"]["vocab_size"] if vocab_size is None else vocab_size
        eod = manifest["tokenizer"]["eod"] if eod is None else eod
    data = dataset.data()
    digest, lowest, highest = hashlib.sha256(), 0, -1
    for start in range(0, len(data), BLOCK):
        block = np.asarray(data[start : start + BLOCK])
        digest.update(block.tobytes())
        low, high = int(block.min()), int(block.max())
        if vocab_size is not None and high >= vocab_size > highest:
            where = start + int(np.argmax(block >= vocab_size))
            number = document_at(dataset, where)
            problems.append(f"token {int(data[where])} of document {number} is outside the vocabulary of {vocab_size}")
        if low < 0 <= lowest:
            problems.append(f"token {low} is below 0 (token {start + int(np.argmin(block))} of the data)")
        lowest, highest = min(lowest, low), max(highest, high)
    if manifest is not None:
        if digest.hexdigest() != manifest["files"]["bin"]["sha256"]:
            problems.append(f"{dataset.place.name('bin')} is not the file its manifest describes (sha256)")
        if sha256_of(dataset.place.local("idx")) != manifest["files"]["idx"]["sha256"]:
            problems.append(f"{dataset.place.name('idx')} is not the file its manifest describes (sha256)")
        for field, found in (("documents", dataset.documents), ("tokens", dataset.tokens), ("max_token", highest)):
            if manifest[field] != found:
                problems.append(f"the manifest says {field} {manifest[field]:,}, the data have {found:,}")
    ended = None
    if eod is not None:
        lengths = document_lengths(dataset)
        ends = np.cumsum(lengths)[lengths > 0] - 1
        ended = int((np.asarray(data[ends]) == eod).sum())
        if manifest is not None and manifest.get("append_eod") and ended != len(ends):
            problems.append(f"{len(ends) - ended:,} documents do not end with the end-of-document token {eod}")
    return Findings(tuple(problems), highest, ended)


def document_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each document, int64 [documents]."""
    ends = np.concatenate([[0], np.cumsum(dataset.index.lengths, dtype=np.int64)])
    return np.diff(ends[np.asarray(dataset.index.documents)])


def document_at(dataset: Dataset, token: int) -> int:
    """Number of the document that holds a token of the data."""
    return int(np.searchsorted(np.cumsum(document_lengths(dataset)), token, side="right"))


def compare(left: str | Path, right: str | Path) -> list[str]:
    """Differences of two datasets, one line each; [] when they hold the same documents."""
    a, b = open_dataset(left), open_dataset(right)
    lines: list[str] = []
    mine, theirs = (_tokenizer(dataset) or {} for dataset in (a, b))
    facts: list[tuple[str, object, object]] = [
        ("documents", a.documents, b.documents),
        ("tokens", a.tokens, b.tokens),
        ("token format", a.index.dtype, b.index.dtype),
        *((what, mine.get(field), theirs.get(field)) for what, field in TOKENIZER_FACTS),
    ]
    lines += [f"{name}: {left} and {right}" for name, left, right in facts if left != right]
    lengths = document_lengths(a), document_lengths(b)
    common = min(map(len, lengths))
    other = np.flatnonzero(lengths[0][:common] != lengths[1][:common])
    limit = int(other[0]) if len(other) else common
    ends = np.cumsum(lengths[0][:limit])
    size = int(ends[-1]) if limit else 0
    x, y = a.data(), b.data()
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        differ = np.flatnonzero(x[start:stop] != y[start:stop])
        if len(differ):
            where = start + int(differ[0])
            number = int(np.searchsorted(ends, where, side="right"))
            within = where - (int(ends[number - 1]) if number else 0)
            lines.append(f"document {number} differs first at token {within}: {int(x[where])} and {int(y[where])}")
            return lines
    if len(other):
        lines.append(f"document {limit} has {lengths[0][limit]:,} and {lengths[1][limit]:,} tokens")
    return lines
