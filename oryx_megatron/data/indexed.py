"""megatron-core indexed datasets: PREFIX.bin (tokens), PREFIX.idx (where they are) and PREFIX.json (what they are).

A document written here is one sequence. PREFIX.json is ours: counts, sizes and sha256 of both files, the tokenizer.
megatron-core neither needs nor minds it; datasets without it can be read as well, with fewer checks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from oryx_megatron.data.files import is_skipped_list, read_json, same_file, sha256_of, sync, temporary_name, write_json
from oryx_megatron.data.index_file import BLOCK, Index, read_index, write_index
from oryx_megatron.data.places import Place, file_of, pieces_of, place_of
from oryx_megatron.data.tokenizer import difference
from oryx_megatron.errors import DataError
from oryx_megatron.paths import is_url
from oryx_megatron.storage import Remote, StorageError

FORMAT = "oryx-indexed-dataset"
FACTS = ("documents", "tokens", "bytes", "longest", "max_token", "dtype", "files", "append_eod", "skipped", "reading")
"""Fields of the manifest that its checksum is of."""
WHOLE = 32 << 20
"""Files up to this many bytes are known by all of their content, longer ones by SAMPLES blocks of it."""
SAMPLES, SAMPLE = 256, 16 << 10
"""Number of blocks and bytes of each."""


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Smallest token format megatron-core's own tool would choose: uint16 below 65,500 tokens, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Writes one dataset; its files appear under their final names only when `finish` has verified them.

    Use as a context manager: leaving by an exception removes what was written, unless `folder` is given: that one is
    kept, and a later writer resumes from the last `checkpoint`. Memory does not grow with the number of documents.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocab_size: int,
        *,
        overwrite: bool = False,
        folder: str | Path | None = None,
        state: dict[str, Any] | None = None,
        dtype: np.dtype | None = None,
    ) -> None:
        """Begin, or resume from `state`, what `checkpoint` gave for this `folder`. Raises DataError.

        Arguments: `overwrite` replaces an earlier dataset of ours, never anything else; `dtype` of the tokens, default
        `token_dtype`.
        """
        self.prefix = output_prefix(prefix)
        self.vocab_size = vocab_size
        self.dtype = np.dtype(token_dtype(vocab_size)) if dtype is None else np.dtype(dtype)
        self.overwrite = overwrite
        check_outputs(self.prefix, overwrite=overwrite)
        self.keep = folder is not None
        self.folder = Path(folder) if folder is not None else temporary_name(self.prefix)
        self.documents = self.sequences = self.tokens = self.longest = 0
        self.max_token = -1
        self._digest = hashlib.sha256()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if state is not None:
                self.documents, self.sequences, self.tokens = (state[k] for k in ("documents", "sequences", "tokens"))
                self.longest, self.max_token = state["longest"], state["max_token"]
                self._rewind()
            mode = "wb" if state is None else "ab"
            self._bin, self._lengths, self._counts = (
                open(self.folder / name, mode)  # noqa: SIM115 - closed by __exit__
                for name in ("tokens", "lengths", "counts")
            )
        except OSError as error:
            raise DataError(f"cannot write {self.prefix}: {error.strerror}") from error

    def _rewind(self) -> None:
        """Cut the files to the checkpoint, and hash what stays."""
        sizes = {
            "tokens": self.tokens * self.dtype.itemsize,
            "lengths": 4 * self.sequences,
            "counts": 4 * self.documents,
        }
        for name, size in sizes.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < size:
                raise DataError(f"{path} is damaged; pass --restart to begin again")
            os.truncate(path, size)
        with open(self.folder / "tokens", "rb") as file:
            while block := file.read(1 << 22):
                self._digest.update(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        for file in (self._bin, self._lengths, self._counts):
            with contextlib.suppress(OSError):  # a full disk has been reported already
                file.close()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append documents: `tokens` [sum of lengths] of all, `lengths` [sequences] of each sequence.

        Arguments: `counts` [documents] sequences of each document; None: a document per length, and a length of 0 is a
        document without a sequence, as megatron's tool writes empty documents.
        Raises DataError when the disk is full, a token is out of range or a sequence longer than 2^31 - 1.
        """
        self.add_tokens(tokens)
        self._append(b"", lengths, counts)

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Append tokens of documents whose lengths the next `add` will tell."""
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise DataError(f"token {low if low < 0 else high} is outside the vocabulary [0, {self.vocab_size})")
            self.max_token = max(self.max_token, high)
        self._append(np.ascontiguousarray(tokens, self.dtype).tobytes())

    def add_file(self, path: Path, lengths: np.ndarray, max_token: int) -> None:
        """Append documents whose tokens, in this dataset's format and checked before, are the bytes of a file."""
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                self._append(block)
        self.max_token = max(self.max_token, max_token)
        self._append(b"", lengths)

    def _append(self, data: bytes, lengths: np.ndarray | None = None, counts: np.ndarray | None = None) -> None:
        try:
            self._bin.write(data)
            self._digest.update(data)
            self.tokens += len(data) // self.dtype.itemsize
            if lengths is None:
                return
            counts = (lengths > 0) if counts is None else counts
            lengths = lengths[lengths > 0] if len(lengths) != int(counts.sum()) else lengths
            self.longest = max(self.longest, int(lengths.max(initial=0)))
            if self.longest > np.iinfo(np.int32).max:
                raise DataError(f"a document of {self.longest} tokens is too long for the index (at most 2^31 - 1)")
            self._lengths.write(np.ascontiguousarray(lengths, "<i4").tobytes())
            self._counts.write(np.ascontiguousarray(counts, "<i4").tobytes())
            self.documents += len(counts)
            self.sequences += len(lengths)
        except OSError as error:
            raise DataError(f"cannot write {self.folder}: {error.strerror}") from error

    def checkpoint(self) -> dict[str, Any]:
        """Force what was added to disk; gives what a later writer needs to resume from here."""
        try:
            for file in (self._bin, self._lengths, self._counts):
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self.folder}: {error.strerror}") from error
        fields = ("documents", "sequences", "tokens", "longest", "max_token")
        return {field: getattr(self, field) for field in fields}

    def check_tokens(self) -> None:
        """Raise DataError when nothing was added that makes a dataset."""
        if not self.tokens:
            raise DataError(f"nothing to write to {self.prefix}: the corpus has no tokens")

    def finish(self, tokenizer: dict[str, Any] | None, text_bytes: int | None, **more: Any) -> dict[str, Any]:
        """Write the index, verify, rename into place; gives the manifest.

        Arguments: `tokenizer` is `Tokenizer.describe()`, `text_bytes` counts UTF-8 (None: not known); `more` is added.
        Raises DataError when there are no tokens, the files do not hold what was added, or the disk is full.
        """
        self.check_tokens()
        tokens, index = self.folder / "tokens", self.folder / "index"
        try:
            for file in (self._bin, self._lengths, self._counts):
                file.close()
            lengths = np.memmap(self.folder / "lengths", "<i4", "r")
            counts = np.memmap(self.folder / "counts", "<i4", "r")
            write_index(index, self.dtype, lengths, counts)
            del lengths, counts
            sync(tokens)
            sync(index)
            self._verify(tokens, index)
            manifest = {
                "format": FORMAT,
                "version": 1,
                "documents": self.documents,
                "tokens": self.tokens,
                "bytes": text_bytes,
                "longest": self.longest,
                "max_token": self.max_token,
                "dtype": self.dtype.name,
                "tokenizer": tokenizer,
                "files": {
                    "bin": _record(tokens, self._digest.hexdigest()),
                    "idx": _record(index, sha256_of(index)),
                },
                **more,
            }
            manifest["checksum"] = _checksum(manifest)
            check_outputs(self.prefix, overwrite=self.overwrite)  # again: it took a while
            # The index comes last: a dataset with an index is whole. Until then the manifest tells, should this be
            # killed, that the tokens next to it are ours.
            bin_ = file_of(self.prefix, "bin")
            replaced = bin_.stat().st_size if bin_.is_file() else None
            file_of(self.prefix, "idx").unlink(missing_ok=True)
            write_json(file_of(self.prefix, "json"), manifest | {"unfinished": {"replaced": replaced}})
            os.replace(tokens, bin_)
            write_json(file_of(self.prefix, "json"), manifest)
            os.replace(index, file_of(self.prefix, "idx"))
            sync(self.prefix.absolute().parent)
        except OSError as error:
            raise DataError(f"cannot write {self.prefix}: {error.strerror}") from error
        return manifest

    def _verify(self, tokens: Path, index: Path) -> None:
        """Read back what was written before it gets its name."""
        found, size = read_index(index), tokens.stat().st_size
        if (found.tokens, len(found.documents) - 1, size) != (
            self.tokens,
            self.documents,
            self.tokens * self.dtype.itemsize,
        ):
            raise DataError(
                f"{self.prefix}: wrote {self.documents} documents of {self.tokens} tokens, the files hold "
                f"{len(found.documents) - 1} of {found.tokens} in {size} bytes; is the disk sound?"
            )


@dataclass(frozen=True)
class Dataset:
    """A dataset that passed `open_dataset`."""

    prefix: Path | Remote
    """`Remote`: on object storage."""
    index: Index
    manifest: dict[str, Any] | None
    """Contents of PREFIX.json; None for datasets of other tools."""
    known: str | None = None
    """`identity` as another process found it, which need not be found again; None: not known."""

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of the manifest; none for datasets of other tools."""
        return self.manifest or {}

    @property
    def documents(self) -> int:
        return len(self.index.documents) - 1

    @property
    def tokens(self) -> int:
        return self.index.tokens

    @functools.cached_property
    def place(self) -> Place:
        """Where the dataset's files are."""
        return place_of(self.prefix)

    def data(self) -> Any:
        """All tokens [tokens], memory-mapped, or read from object storage as far as they are asked for."""
        return self.place.tokens(self.index.dtype)

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document."""
        first, last = (int(bound) for bound in self.index.documents[number : number + 2])
        if first == last:
            return np.zeros(0, self.index.dtype)
        start = int(self.index.offsets[first]) // self.index.dtype.itemsize
        stop = int(self.index.offsets[last - 1]) // self.index.dtype.itemsize + int(self.index.lengths[last - 1])
        return self.data()[start:stop]

    def identity(self) -> str:
        """Names the content: by the manifest's digests, which `open_dataset` compares, or by the files' own."""
        if self.manifest is not None:
            return f"{self.manifest['files']['bin']['sha256']}-{self.manifest['files']['idx']['sha256']}"
        return self.known or f"content-{self.digests['bin']}-{self.digests['idx']}"

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """`content_digest` of both files."""
        place = self.place
        return {
            end: _digest(place.size(end), functools.partial(place.sha256, end), functools.partial(place.pieces, end))
            for end in ("bin", "idx")
        }

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: `size` and `content` of .bin, `written`: sizes and times of both files.

        The last is all that earlier versions knew a dataset without manifest by.
        """
        written = "-".join(self.place.written(end) for end in ("bin", "idx"))
        return {"size": self.place.size("bin"), "content": self.known or self.digests["bin"], "written": written}

    def ends(self, eod: int, most: int = 256) -> tuple[int, int]:
        """How many of up to `most` documents, spread over the dataset, end with a token; and of how many."""
        index = self.index
        looked = np.unique(np.linspace(0, self.documents - 1, 4 * most).astype(np.int64))
        bounds = np.asarray(index.documents[looked]), np.asarray(index.documents[looked + 1])
        chosen = bounds[1][bounds[1] > bounds[0]] - 1  # documents without a sequence have no end
        chosen = chosen[np.unique(np.linspace(0, max(len(chosen) - 1, 0), min(most, len(chosen))).astype(np.int64))]
        chosen = chosen[np.asarray(index.lengths[chosen]) > 0]
        last = np.asarray(index.offsets[chosen]) // index.dtype.itemsize + np.asarray(index.lengths[chosen]) - 1
        return int((np.asarray(self.data()[last]) == eod).sum()), len(chosen)

    def holds(self, token: int, most: int = 64) -> bool:
        """Whether a token is found in up to `most` blocks of 16,384 tokens spread over the data."""
        data, size = self.data(), 1 << 14
        starts = np.unique(np.linspace(0, max(len(data) - size, 0), most).astype(int))
        return any(bool((data[start : start + size] == token).any()) for start in starts)


def content_digest(path: Path) -> str:
    """sha256 (hex) of a file, or of its size and blocks spread over it when it is longer than WHOLE."""
    return _digest(path.stat().st_size, lambda: sha256_of(path), functools.partial(pieces_of, path))


def _digest(size: int, whole: Callable[[], str], pieces: Callable[[list[int], int], Iterable[bytes]]) -> str:
    if size <= WHOLE:
        return whole()
    digest = hashlib.sha256(str(size).encode())
    for piece in pieces(np.linspace(0, size - SAMPLE, SAMPLES).astype(np.int64).tolist(), SAMPLE):
        digest.update(piece)
    return digest.hexdigest()


def _record(path: Path, digest: str) -> dict[str, Any]:
    """What the manifest says of a file whose sha256 is known."""
    size = path.stat().st_size
    return {"size": size, "sha256": digest} | ({"sampled": content_digest(path)} if size > WHOLE else {})


def _checksum(manifest: dict[str, Any]) -> str:
    """sha256 of what a manifest says of the data. `tokenizer` is compared with the tokenizer; notes may change."""
    facts = {name: manifest.get(name) for name in FACTS}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_dataset_manifest(place: Place) -> dict[str, Any] | None:
    """PREFIX.json, its fields of the right types; None without one. Raises DataError."""
    if not place.has("json"):
        return None
    path = place.name("json")
    manifest = read_json(place.local("json"))
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a dataset; move it out of the way")
    if manifest.get("version") != 1:
        raise DataError(f"{path} is of version {manifest.get('version')!r}; this version reads version 1")

    def number(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def counts(value: object) -> bool:
        return isinstance(value, dict) and all(map(number, value.values()))

    def file(value: object) -> bool:
        return isinstance(value, dict) and number(value.get("size")) and isinstance(value.get("sha256"), str)

    def tokenizer(value: object) -> bool:
        return isinstance(value, dict) and all(
            isinstance(value.get(name), str) for name in ("name", "kind", "fingerprint")
        ) and all(number(value.get(name)) for name in ("vocab_size", "eod"))  # fmt: skip

    tests: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("documents", "tokens", "longest", "max_token"), number),
        "bytes": lambda value: value is None or number(value),
        "tokenizer": lambda value: value is None or tokenizer(value),
        "files": lambda value: isinstance(value, dict) and file(value.get("bin")) and file(value.get("idx")),
        "append_eod": lambda value: isinstance(value, bool),
        "skipped": counts,
        "paths": counts,
        "shard": lambda value: isinstance(value, list) and len(value) == 2 and all(map(number, value)),
        "reading": lambda value: isinstance(value, dict),
    }
    optional = {"append_eod", "skipped", "paths", "shard", "reading"}
    for name, fits in tests.items():
        if not fits(manifest[name]) if name in manifest else name not in optional:
            what = f"{name} {manifest[name]!r}" if name in manifest else f"no {name}"
            raise DataError(f"{path} is damaged: it has {what:.100}; restore it or tokenize again")
    if manifest.get("checksum", _checksum(manifest)) != _checksum(manifest):
        raise DataError(f"{path} is damaged: it is not what was written (checksum); restore it or tokenize again")
    return manifest


def open_dataset(
    prefix: str | Path,
    *,
    vocab_size: int | None = None,
    fingerprint: str | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    content: bool = True,
    known: str | None = None,
) -> Dataset:
    """Open a dataset and check index against data and manifest; and, when given, against a vocabulary and tokenizer.

    Arguments: `vocab_size`: every token must lie below (taken from the manifest; without one, tokens are read: all of
    them up to 2^28, else blocks spread over the file); `fingerprint` of the tokenizer it must have been made with, or
    all that its `describe` gives as `tokenizer`; `content` compares the files with the digests of the manifest
    (`content_digest`), else only their sizes; `known` is the identity that another process found.
    Raises DataError naming the file and what is wrong.
    """
    try:
        return _open(prefix, vocab_size, fingerprint, tokenizer, content, known)
    except StorageError as error:
        raise DataError(f"dataset {prefix}: {error}") from error


def _open(
    prefix: str | Path,
    vocab_size: int | None,
    fingerprint: str | None,
    tokenizer: Mapping[str, Any] | None,
    content: bool,
    known: str | None,
) -> Dataset:
    place = place_of(prefix)
    for end in ("idx", "bin"):
        if not place.has(end):
            whole = str(prefix).endswith((".bin", ".idx"))
            hint = "give the prefix without ending" if whole else "make it with `oryx data preprocess`"
            raise DataError(f"dataset {prefix}: {place.name(end)} is missing; {hint}")
    index = read_index(place.local("idx"), place.name("idx"))
    size, wanted = place.size("bin"), index.tokens * index.dtype.itemsize
    if size != wanted:
        state = "truncated" if size < wanted else "longer than its index says"
        raise DataError(f"{place.name('bin')} is {state}: {size} bytes, not {wanted}")
    manifest = read_dataset_manifest(place)
    dataset = Dataset(Remote(str(prefix)) if is_url(str(prefix)) else Path(prefix), index, manifest, known)
    if manifest is not None:
        _check_files(dataset, manifest, content)
    made = manifest["tokenizer"] if manifest is not None else None
    if made is not None and fingerprint is not None and made["fingerprint"] != fingerprint:
        raise DataError(
            f"dataset {prefix} was made with tokenizer {made['name']} ({made['vocab_size']} tokens, "
            f"{made['fingerprint'][:12]}…), not with {fingerprint[:12]}…; tokenize it again or change data.tokenizer"
        )
    if made is not None and tokenizer is not None and (why := difference(made, tokenizer)) is not None:
        raise DataError(f"dataset {prefix} was made with {why}; tokenize it again or change data.tokenizer")
    if vocab_size is not None:
        highest = manifest["max_token"] if manifest is not None else _highest_token(dataset)
        if highest >= vocab_size:
            raise DataError(f"dataset {prefix} holds token {highest}, outside the vocabulary of {vocab_size} tokens")
    return dataset


def _check_files(dataset: Dataset, manifest: dict[str, Any], content: bool) -> None:
    """Compare the files of a dataset with their manifest."""
    for end in ("bin", "idx"):
        path, record = dataset.place.name(end), manifest["files"][end]
        if record["size"] != (found := dataset.place.size(end)):
            raise DataError(f"{path} has {found} bytes, its manifest says {record['size']}")
        digest = record["sha256"] if found <= WHOLE else record.get("sampled")
        if content and digest is not None and dataset.digests[end] != digest:
            raise DataError(
                f"{path} is not the file that {dataset.place.name('json')} describes (sha256): it was replaced or "
                "is damaged; restore it or tokenize again"
            )
    for name, count in (("documents", dataset.documents), ("tokens", dataset.tokens)):
        if content and manifest[name] != count:
            path = dataset.place.name("json")
            raise DataError(f"{path} is damaged: it says {name} {manifest[name]}, the index has {count}")


def bytes_per_token(prefix: str | Path) -> float:
    """UTF-8 bytes of text per token of a dataset, end-of-document tokens included in the tokens.

    Bits per byte = nats per token / ln 2 / bytes per token. Raises DataError without PREFIX.json.
    """
    place = place_of(prefix)
    path = place.name("json")
    if (manifest := read_dataset_manifest(place)) is None:
        raise DataError(f"{path} is missing, so the bytes per token of {prefix} are not known")
    if manifest["bytes"] is None:
        raise DataError(f"{path} does not say how many bytes of text the dataset holds")
    return manifest["bytes"] / manifest["tokens"]


def _highest_token(dataset: Dataset) -> int:
    data = dataset.data()
    starts = range(0, len(data), BLOCK)
    if len(data) > 1 << 28:
        starts = [int(start) for start in np.linspace(0, len(data) - BLOCK, 64)]  # type: ignore[assignment]
    return max(int(data[start : start + BLOCK].max()) for start in starts)


def output_prefix(name: str | Path) -> Path:
    """The prefix that `--output` gives. Raises DataError for the name of a folder."""
    text = str(name)
    if Path(text).name in ("", "..") or text.endswith(os.sep):
        folder = text.rstrip(os.sep) or text or "."
        raise DataError(f"the output {text!r} is a folder; name a dataset in it: {folder.rstrip(os.sep)}/NAME")
    return Path(text)


def check_outputs(
    prefix: Path,
    *,
    overwrite: bool,
    inputs: Iterable[str | Path] = (),
    more: tuple[str, ...] = (),
    resuming: bool = False,
) -> None:
    """Refuse to write PREFIX.bin, .idx and .json (and PREFIX.`more`) over inputs, or what is no dataset of ours.

    Arguments: `resuming`: a run that was killed while it gave its files their names may end what it began.
    Raises DataError that names the file.
    """
    there = [path for end in ("bin", "idx", "json", *more) if os.path.lexists(path := file_of(prefix, end))]
    if not there:
        return
    for source in inputs:
        for path in there:
            if same_file(path, source):
                raise DataError(f"the output {path} is the input {source}; choose another name")
    for path in there:
        if not _is_ours(prefix, path):
            raise DataError(f"{path} exists and belongs to no dataset of ours; choose another name or move it away")
    unfinished = resuming and not os.path.lexists(file_of(prefix, "idx"))
    if not overwrite and not unfinished:
        raise DataError(f"dataset {prefix} exists already; choose another name or pass --overwrite")


def _is_ours(prefix: Path, path: Path) -> bool:
    """Whether a file of a prefix is as the manifest there, one of ours, tells."""
    if not path.is_file():
        return False
    if path == file_of(prefix, "skipped.jsonl"):
        return is_skipped_list(path)
    try:
        manifest = read_json(file_of(prefix, "json"))
        if manifest.get("format") != FORMAT:
            return False
        if path == file_of(prefix, "json"):
            return True
        end = path.suffix[1:]
        sizes = [manifest["files"][end]["size"]]
        if end == "bin" and "unfinished" in manifest:
            sizes.append(manifest["unfinished"]["replaced"])
        return path.stat().st_size in sizes
    except (DataError, OSError, KeyError, TypeError):
        return False
