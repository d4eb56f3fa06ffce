"""What tokenizers are trained on: all of it, or a sample of all inputs; bad input with its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from test_data_tools import ROOT, tool

from oryx_megatron.data.corpus import ReadOptions
from oryx_megatron.data.datasets import merge, split
from oryx_megatron.data.files import read_json
from oryx_megatron.data.indexed import is_skipped_list, open_dataset
from oryx_megatron.data.sampling import TrainingText
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.data.train_tokenizer import LONGEST_LINE, RESERVED, _pieces, train_sentencepiece
from oryx_megatron.errors import DataError

WORDS = (ROOT / "docs" / "data.md").read_text().split()
ENGLISH = [" ".join(WORDS[i : i + 9]) for i in range(0, len(WORDS), 9)]
GREEK = "αβγ δεζη θικ λμνξ "


def greek(tokenizer: object) -> int:
    names = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]  # type: ignore[attr-defined]
    return sum(any("α" <= c <= "ω" for c in name) for name in names)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_long_lines_and_reserved_characters_are_trained_on(tmp_path: Path, model_type: str) -> None:
    long = GREEK * 4000
    assert len(long.encode()) > LONGEST_LINE
    texts = ["\n".join(ENGLISH), long]
    whole = train_sentencepiece(texts, tmp_path / "a", 500, source="a test", model_type=model_type)  # type: ignore
    assert greek(whole) > 4
    bars = [*ENGLISH, *[f"{RESERVED} {GREEK}{RESERVED}{RESERVED}"] * 60]
    barred = train_sentencepiece(bars, tmp_path / "b", 500, source="a test", model_type=model_type)  # type: ignore
    assert greek(barred) > 4
    assert read_json(tmp_path / "b" / "manifest.json")["training"]["reserved_characters"] == 180
    assert barred.decode(barred.encode(f"a{RESERVED}b")) == f"a{RESERVED}b"


@pytest.mark.parametrize("line", ["word " * 40_000, "é" * 100_000, " " * 200_000, "x" * LONGEST_LINE, "🙂x " * 30_000])
def test_lines_are_cut_without_loss(line: str) -> None:
    parts = list(_pieces(line))
    assert "".join(parts) == line
    assert max(len(part.encode()) for part in parts) <= LONGEST_LINE
    if "word" in line:
        assert all(part.startswith(" word") for part in parts[1:])


def sample(*inputs: Path, size: int | None, every: int = 0, held_out: bool = False) -> list[str]:
    text = TrainingText([str(path) for path in inputs], ReadOptions(), sample_bytes=size, every=every)
    return [item.text for item in text.texts(held_out=held_out)]


def test_a_sample_is_spread_over_all_inputs(tmp_path: Path) -> None:
    for number, letter in enumerate("abcd"):
        lines = [json.dumps({"text": letter * 90}) + "\n" for _ in range(100 * (number + 1))]
        (tmp_path / f"{letter}.jsonl").write_text("".join(lines))
    inputs = [tmp_path / f"{letter}.jsonl" for letter in "abcd"]
    for taken in (sample(*inputs, size=5000), sample(tmp_path, size=5000)):
        joined = "".join(taken)
        assert len(joined) == 5000
        for number, letter in enumerate("abcd"):
            assert joined.count(letter) == pytest.approx(500 * (number + 1), abs=91)
    # One document above the sample is cut, and the next input has its share nevertheless.
    (tmp_path / "e.txt").write_text("é" * 50_000)
    (tmp_path / "f.txt").write_text("f" * 100_000)
    joined = "".join(sample(tmp_path / "e.txt", tmp_path / "f.txt", size=1001))
    assert joined.count("é") == 250
    assert len(joined.encode()) == 1001 or len(joined.encode()) == 1000
    assert "".join(sample(*inputs, size=10**9)) == "".join(sample(*inputs, size=None))


def test_documents_held_out_are_not_trained_on(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) + "\n" for i in range(95)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    for size in (None, 300):
        trained, held = sample(tmp_path, size=size, every=10), sample(tmp_path, size=size, every=10, held_out=True)
        assert trained
        assert held
        assert not set(trained) & set(held)
    assert len(sample(tmp_path, size=None, every=10)) + len(sample(tmp_path, size=None, every=10, held_out=True)) == 125
    assert len(sample(tmp_path / "a.jsonl", size=None, every=10, held_out=True)) == 9


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": text}) + "\n" for text in ENGLISH]
    rows[70] = '{"text": "a NUL \\u0000 character"}\n'
    rows[80] = "{\n"
    (tmp_path / "a.jsonl").write_text("".join(rows))
    (tmp_path / "picture.png").write_bytes(b"12")
    return tmp_path


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte-level"])
def test_bad_input_is_named_or_left_out(flawed: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = tool("train_tokenizer").main
    command = ["--input", str(flawed), "--kind", kind, "--vocab-size", "400", "--output", str(flawed / "t")]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: {flawed}/a.jsonl:71: NUL character (byte 6); --on-error skip leaves such input out\n"
    )
    assert not (flawed / "t").exists()
    assert main([*command, "--on-error", "skip", "--max-bad", "0.001"]) == 2
    told = capsys.readouterr().err
    assert "documents are bad" in told
    assert f"The first: {flawed}/a.jsonl:71: NUL character (byte 6); {flawed}/" in told
    assert told.count("\n") == 1
    assert not (flawed / "t").exists()
    assert main([*command, "--on-error", "skip", "--max-bad", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "1 NUL character, 1 invalid JSON" in printed
    assert "1 unknown ending" in printed
    text = read_json(flawed / "t" / "manifest.json")["training"]["text"]
    assert text["skipped"] == {"NUL character": 1, "invalid JSON": 1}
    assert text["left_out"]["unknown ending"]["first"] == [str(flawed / "picture.png")]
    assert is_skipped_list(flawed / "t" / "skipped.jsonl")
    listed = [json.loads(row)["place"] for row in (flawed / "t" / "skipped.jsonl").read_text().splitlines()]
    assert listed == [f"{flawed}/a.jsonl:71", f"{flawed}/a.jsonl:81", str(flawed / "picture.png")]
    assert load_tokenizer(flawed / "t").vocab_size == 400
    assert main([*command, "--on-error", "skip", "--max-bad", "0.1", "--overwrite"]) == 0


def test_no_text_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("")
    assert tool("train_tokenizer").main(["--input", str(tmp_path), "--output", str(tmp_path / "t")]) == 2
    assert "there is no text" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # what goes wrong in the texts is not the trainer's fault
        train_sentencepiece((str(1 // (3 - i)) for i in range(9)), tmp_path / "t", 300, source="a test")


def foreign(prefix: Path, dtype: type, documents: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(("dtype", "highest"), [(np.uint16, 65_535), (np.int32, 2**31 - 1), (np.uint8, 255)])
def test_all_tokens_of_a_format_can_be_merged_and_split(tmp_path: Path, dtype: type, highest: int) -> None:
    """Datasets of other tools have vocabularies of their own: up to what the format holds."""
    documents = [[1, highest], [highest - 36], [highest - 1, 2], [3]]
    a, b = foreign(tmp_path / "a", dtype, documents), foreign(tmp_path / "b", dtype, documents)
    merge([a, b], tmp_path / "c")
    split(tmp_path / "c", {"x": 1, "y": 1}, tmp_path / "s")
    for name in ("s_x", "s_y"):
        found = open_dataset(tmp_path / name)
        assert found.index.dtype == dtype
        assert [found.document(i).tolist() for i in range(found.documents)] == documents
        assert (tmp_path / f"{name}.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    with pytest.raises(DataError, match=f"holds token {highest}, outside"):
        open_dataset(tmp_path / "c", vocab_size=highest)
    assert open_dataset(tmp_path / "c", vocab_size=highest + 1).documents == 8
