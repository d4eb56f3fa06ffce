"""PREFIX.idx of a megatron-core indexed dataset: where its sequences and documents are.

Layout, little endian (megatron-core, datasets/indexed_dataset.py):
    9 bytes magic, u64 version = 1, u8 dtype code, u64 sequences S, u64 document bounds D + 1,
    int32 [S] tokens per sequence, int64 [S] byte offset in .bin, int64 [D + 1] first sequence of each document, then S
A document written here is one sequence.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oryx_megatron.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
BLOCK = 1 << 22  # tokens or index entries handled at once


def write_index(path: Path, dtype: np.dtype, lengths: np.ndarray, counts: np.ndarray) -> None:
    """Write an .idx block by block. `lengths` [sequences]: tokens of each; `counts` [documents]: sequences of each."""
    code = next(code for code, known in DTYPES.items() if np.dtype(known) == dtype)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(counts) + 1))
        for block in _blocks(lengths):
            file.write(block.tobytes())
        offset = 0
        for block in _blocks(lengths):
            ends = np.cumsum(block, dtype="<i8") * dtype.itemsize + offset
            file.write(np.concatenate([np.array([offset], "<i8"), ends[:-1]]).tobytes())
            offset = int(ends[-1])
        last = 0
        file.write(np.zeros(1, "<i8").tobytes())
        for block in _blocks(counts):
            bounds = np.cumsum(block, dtype="<i8") + last
            file.write(bounds.tobytes())
            last = int(bounds[-1])


@dataclass(frozen=True)
class Index:
    """Contents of an .idx, memory-mapped."""

    dtype: np.dtype
    lengths: np.ndarray
    """int32 [sequences]: tokens."""
    offsets: np.ndarray
    """int64 [sequences]: byte offset in .bin."""
    documents: np.ndarray
    """int64 [documents + 1]: first sequence of each document, then the number of sequences."""
    tokens: int
    """Tokens in all."""


def read_index(file_name: Path, name: str | None = None) -> Index:
    """Map an .idx, which messages call `name`, and check that it is consistent. Raises DataError with what is wrong."""
    path = file_name if name is None else name
    try:
        size = file_name.stat().st_size
        with open(file_name, "rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not head.startswith(MAGIC):
        raise DataError(f"{path} is not a megatron-core index (wrong magic number)")
    if len(head) < HEADER.size:
        raise DataError(f"{path} is truncated: {size} bytes, the header alone has {HEADER.size}")
    _, version, code, sequences, bounds = HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{path} has index version {version}; only version 1 is known")
    if code not in DTYPES or not np.issubdtype(DTYPES[code], np.integer):
        raise DataError(f"{path} has dtype code {code}, which is no token type")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if size != expected and size != expected + sequences:  # one more byte per sequence: modes of multimodal datasets
        raise DataError(f"{path} is {'truncated' if size < expected else 'too long'}: {size} bytes, not {expected}")
    if sequences == 0 or bounds < 2:
        raise DataError(f"{path} describes an empty dataset")
    raw = np.memmap(file_name, np.uint8, "r")
    lengths = raw[HEADER.size : HEADER.size + 4 * sequences].view("<i4")
    offsets = raw[HEADER.size + 4 * sequences : HEADER.size + 12 * sequences].view("<i8")
    documents = raw[HEADER.size + 12 * sequences : expected].view("<i8")
    dtype = np.dtype(DTYPES[code])
    tokens = 0
    for start in range(0, sequences, BLOCK):
        part = lengths[start : start + BLOCK]
        if (part < 0).any():
            raise DataError(f"{path}: sequence {start + int(np.argmax(part < 0))} has a negative length")
        ends = np.cumsum(part, dtype=np.int64) + tokens
        begins = np.concatenate([[tokens], ends[:-1]]) * dtype.itemsize
        if not np.array_equal(begins, offsets[start : start + BLOCK]):
            wrong = start + int(np.argmax(begins != offsets[start : start + BLOCK]))
            if wrong and offsets[wrong] * dtype.itemsize in [begins[wrong - start] * n for n in (1, 2, 4, 8)]:
                raise DataError(
                    f"{path} says {dtype.name}, but sequence {wrong} begins at byte {offsets[wrong]} rather than "
                    f"{begins[wrong - start]}: the dtype code is not that of the data"
                )
            raise DataError(f"{path}: offset of sequence {wrong} does not follow from the lengths before it")
        tokens = int(ends[-1])
    for start in range(0, bounds - 1, BLOCK):
        part = documents[start : start + BLOCK + 1]
        if (np.diff(part) < 0).any():
            raise DataError(f"{path}: bounds of document {start + int(np.argmax(np.diff(part) < 0))} run backwards")
    if documents[0] != 0 or documents[-1] != sequences:
        raise DataError(f"{path}: document bounds go from {documents[0]} to {documents[-1]}, not 0 to {sequences}")
    return Index(dtype, lengths, offsets, documents, tokens)


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), BLOCK):
        yield np.asarray(values[start : start + BLOCK])
