"""Indexed datasets: the same bytes as megatron-core's builder, readable by it, and refused when damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from oryx_megatron.data.indexed import IndexedWriter, bytes_per_token, open_dataset
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import DataError

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "tokenizers" / "stdlib-8k")
DOCUMENTS = [[5, 6, 7, 1], [8, 1], [*range(100), 1], [1]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 8192) -> Path:
    with IndexedWriter(prefix, vocab_size) as writer:
        for part in (documents[:1], documents[1:]):
            writer.add(np.concatenate([*map(np.array, part), []]).astype(np.int64), np.array([len(d) for d in part]))
        writer.finish(TOKENIZER.describe(), text_bytes=321)
    return prefix


@pytest.mark.parametrize("vocab_size", [8192, 70000])
def test_same_bytes_as_megatron_core(tmp_path: Path, vocab_size: int) -> None:
    dtype = np.uint16 if vocab_size < 65500 else np.int32
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    documents = [*DOCUMENTS, []]  # megatron-core's tool keeps empty documents, as documents without a sequence
    for document in documents:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", documents, vocab_size)
    for end in (".bin", ".idx"):
        assert (tmp_path / f"ours{end}").read_bytes() == (tmp_path / f"theirs{end}").read_bytes()


def test_megatron_core_reads_it_and_the_manifest_is_right(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    theirs = IndexedDataset(str(prefix))
    assert [document.tolist() for document in theirs] == DOCUMENTS
    ours = open_dataset(prefix, vocab_size=8192, fingerprint=TOKENIZER.fingerprint)
    assert [ours.document(i).tolist() for i in range(ours.documents)] == DOCUMENTS
    manifest = json.loads(prefix.with_suffix(".json").read_text())
    assert (manifest["documents"], manifest["tokens"], manifest["bytes"]) == (4, 108, 321)
    assert (manifest["longest"], manifest["max_token"], manifest["dtype"]) == (101, 99, "uint16")
    assert bytes_per_token(prefix) == 321 / 108
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside"), IndexedWriter(tmp_path / "a", 100) as writer:
        writer.add(np.array([1, 100]), np.array([2]))
    with pytest.raises(DataError, match="the corpus has no tokens"), IndexedWriter(tmp_path / "a", 100) as writer:
        writer.finish(TOKENIZER.describe(), 0)
    assert not list(tmp_path.iterdir())


def test_existing_datasets_are_kept_unless_told(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    with pytest.raises(DataError, match="exists already"):
        IndexedWriter(prefix, 100)
    with IndexedWriter(prefix, 100, overwrite=True) as writer:
        writer.add(np.array([1, 2]), np.array([2]))
        writer.finish(TOKENIZER.describe(), 2)
    assert open_dataset(prefix).tokens == 2


def test_tokens_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 100) as writer:
        for bad in (100, -1):
            with pytest.raises(DataError, match=rf"token {bad} is outside the vocabulary \[0, 100\)"):
                writer.add(np.array([1, bad]), np.array([2]))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def patch(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


BASE = 34 + 4 * 4  # offsets of the four sequences begin here
DAMAGE = [
    (lambda p: p.with_suffix(".bin").unlink(), r"a\.bin is missing"),
    (lambda p: p.with_suffix(".idx").unlink(), r"a\.idx is missing"),
    (lambda p: cut(p.with_suffix(".bin"), 10), r"a\.bin is truncated: 10 bytes, not 216"),
    (lambda p: p.with_suffix(".bin").open("ab").write(b"12"), r"a\.bin is longer than its index says"),
    (lambda p: cut(p.with_suffix(".idx"), 60), r"a\.idx is truncated: 60 bytes, not 122"),
    (lambda p: cut(p.with_suffix(".idx"), 20), r"a\.idx is truncated: 20 bytes, the header alone has 34"),
    (lambda p: p.with_suffix(".idx").write_bytes(b""), r"a\.idx is not a megatron-core index"),
    (lambda p: patch(p.with_suffix(".idx"), 0, b"X"), r"a\.idx is not a megatron-core index \(wrong magic number\)"),
    (lambda p: patch(p.with_suffix(".idx"), 9, b"\2"), "index version 2"),
    (lambda p: patch(p.with_suffix(".idx"), 17, b"\7"), "dtype code 7, which is no token type"),
    (lambda p: patch(p.with_suffix(".idx"), 17, b"\4"), "says int32, but sequence 1 begins at byte 8 rather than 16"),
    (lambda p: patch(p.with_suffix(".idx"), 34, struct.pack("<i", -4)), "sequence 0 has a negative length"),
    (lambda p: patch(p.with_suffix(".idx"), BASE + 8, struct.pack("<q", 6)), "offset of sequence 1 does not follow"),
    (lambda p: patch(p.with_suffix(".idx"), BASE + 40, struct.pack("<q", 9)), "bounds of document 1 run backwards"),
    (lambda p: patch(p.with_suffix(".idx"), BASE + 64, struct.pack("<q", 3)), "document bounds go from 0 to 3, not"),
    (lambda p: p.with_suffix(".json").write_text("[]"), "holds a JSON list"),
    (lambda p: p.with_suffix(".json").write_text("{}"), "is not the manifest of a dataset"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_gives_one_line(tmp_path: Path, damage: object, message: str) -> None:
    prefix = write(tmp_path / "a")
    damage(prefix)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(prefix)
    assert "\n" not in str(caught.value)


def test_vocabulary_mismatches(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    with pytest.raises(DataError, match="holds token 99, outside the vocabulary of 99 tokens"):
        open_dataset(prefix, vocab_size=99)
    with pytest.raises(DataError, match="was made with tokenizer stdlib-8k"):
        open_dataset(prefix, fingerprint="0" * 64)
    prefix.with_suffix(".json").unlink()  # as another tool leaves it: the tokens themselves are read
    open_dataset(prefix, vocab_size=100)
    with pytest.raises(DataError, match="holds token 99"):
        open_dataset(prefix, vocab_size=99)
    with pytest.raises(DataError, match=r"a\.json is missing, so the bytes per token"):
        bytes_per_token(prefix)


def test_a_dataset_of_megatron_core_with_many_sequences_per_document(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_item(torch.tensor([1, 2, 3]))
    builder.add_item(torch.tensor([4]))
    builder.end_document()
    builder.add_item(torch.tensor([5, 6]))
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    dataset = open_dataset(tmp_path / "a")
    assert [dataset.document(i).tolist() for i in range(2)] == [[1, 2, 3, 4], [5, 6]]
    assert dataset.manifest is None


def test_prefix_with_ending_is_explained(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(DataError, match="give the prefix without ending"):
        open_dataset(tmp_path / "a.bin")
