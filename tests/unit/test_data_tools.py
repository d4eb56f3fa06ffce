"""Merging, splitting, inspecting datasets; training tokenizers; the documented clean-up pipeline."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from oryx_megatron.data.datasets import compare, document_lengths, merge, split, verify
from oryx_megatron.data.indexed import IndexedWriter, open_dataset
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.data.train_tokenizer import measure, train_byte_level, train_sentencepiece
from oryx_megatron.errors import DataError

ROOT = Path(__file__).parents[2]
TOKENIZER = load_tokenizer(ROOT / "tokenizers" / "stdlib-8k")
TEXTS = [f"def function_{i}(x):\n    return x + {i}\n" * (1 + i % 5) for i in range(60)]


PROSE = [
    f"{' '.join(words[i % 7 :: 1 + i % 3])} {1990 + i} {7 * i}.\n"
    for words in [(__doc__ or "").split()]
    for i in range(60)
]


def tool(name: str) -> ModuleType:
    """A file of tools/ as a module: its `main(argv)` is what the command line runs."""
    return importlib.import_module(f"oryx_megatron.tools.{name}")


def dataset(prefix: Path, documents: list[list[int]], **more: object) -> Path:
    with IndexedWriter(prefix, TOKENIZER.vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)]))
        writer.finish(TOKENIZER.describe(), 5 * len(documents), append_eod=True, **more)
    return prefix


def documents(count: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[*draw.integers(10, 8000, draw.integers(0, 30)).tolist(), TOKENIZER.eod_id] for _ in range(count)]


def test_merging_appends(tmp_path: Path) -> None:
    a, b = documents(20), documents(9, seed=1)
    manifest = merge([dataset(tmp_path / "a", a), dataset(tmp_path / "b", b)], tmp_path / "c")
    whole = dataset(tmp_path / "whole", a + b)
    for end in ("bin", "idx"):
        assert (tmp_path / f"c.{end}").read_bytes() == whole.with_suffix(f".{end}").read_bytes()
    assert (manifest["documents"], manifest["bytes"]) == (29, 145)
    assert compare(tmp_path / "c", whole) == []


def test_merging_datasets_of_megatrons_tool(tmp_path: Path) -> None:
    """Several sequences per document, empty documents, no manifest."""
    for name in ("a", "b"):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        builder.add_document([1, 2, 3, 4, 5], [2, 3])
        builder.add_document([], [])
        builder.add_document([6], [1])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for name in ("a", "b"):
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ours")
    for end in ("bin", "idx"):
        assert (tmp_path / f"ours.{end}").read_bytes() == (tmp_path / f"theirs.{end}").read_bytes()
    assert open_dataset(tmp_path / "ours", vocab_size=10).documents == 6


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    a = dataset(tmp_path / "a", documents(3), shard=[1, 2])
    b = dataset(tmp_path / "b", documents(3), shard=[2, 2])
    for prefixes, message in (
        ([b, a], "the shards are 2/2, 1/2; merging needs each of them once and in order"),
        ([a], "at least two"),
        ([a, a], "is given twice"),
        ([a, tmp_path / "none"], r"none\.idx is missing"),
        ([a, "."], r"dataset '\.' is a folder; name a dataset in it: \./NAME"),
        (["/", a], "dataset '/' is a folder; name a dataset in it: /NAME"),
        (["..", a], r"dataset '\.\.' is a folder"),
    ):
        with pytest.raises(DataError, match=message):
            merge(prefixes, tmp_path / "c")
    with pytest.raises(DataError, match="is one of the inputs"):
        merge([a, b], a, overwrite=True)
    manifest = json.loads(b.with_suffix(".json").read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    b.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="was made with another tokenizer than"):
        merge([a, b], tmp_path / "c")
    assert not list(tmp_path.glob("c.*"))


def test_a_merged_copy_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under another name the same documents are there twice; equal shards are told apart by their numbers."""
    a, other = dataset(tmp_path / "a", documents(3)), dataset(tmp_path / "other", documents(3, seed=1))
    for end in ("bin", "idx", "json"):
        shutil.copy(a.with_suffix(f".{end}"), tmp_path / f"copy.{end}")
    for name in ("bare", "bare2"):  # of another tool: without a manifest
        for end in ("bin", "idx"):
            shutil.copy(a.with_suffix(f".{end}"), tmp_path / f"{name}.{end}")
    cases = [([a, other, tmp_path / "copy"], 9), ([tmp_path / "bare", tmp_path / "bare2"], 6)]
    for number, (prefixes, count) in enumerate(cases):
        caplog.clear()
        assert merge(prefixes, tmp_path / f"m{number}")["documents"] == count
        assert f"{prefixes[-1]} holds the same documents as {prefixes[0]}: the output has them twice" in caplog.text
    caplog.clear()
    shards = [dataset(tmp_path / f"shard{number}", documents(3), shard=[number, 2]) for number in (1, 2)]
    assert merge(shards, tmp_path / "c")["documents"] == 6
    assert merge([a, other], tmp_path / "d")["documents"] == 6
    assert "twice" not in caplog.text


@pytest.mark.parametrize("seed", [None, 3])
def test_splitting_divides_documents(tmp_path: Path, seed: int | None) -> None:
    rows = documents(50)
    prefix = dataset(tmp_path / "a", rows)
    manifests = split(prefix, {"train": 8, "valid": 2}, tmp_path / "p", seed=seed)
    parts = {name: open_dataset(tmp_path / f"p_{name}") for name in manifests}
    found = {name: [part.document(i).tolist() for i in range(part.documents)] for name, part in parts.items()}
    assert [len(part) for part in found.values()] == [40, 10]
    assert sorted(found["train"] + found["valid"]) == sorted(rows)
    assert (found["train"] + found["valid"] == rows) == (seed is None)
    assert sum(manifest["bytes"] for manifest in manifests.values()) == pytest.approx(250, abs=1)
    with pytest.raises(DataError, match=r"part b of .* would be empty: the dataset has 50 documents"):
        split(prefix, {"a": 1000, "b": 1}, tmp_path / "q")


def test_verification_finds_what_opening_does_not(tmp_path: Path) -> None:
    prefix = dataset(tmp_path / "a", documents(20))
    assert verify(prefix).problems == ()
    raw = bytearray(prefix.with_suffix(".bin").read_bytes())
    raw[-2:] = (9000).to_bytes(2, "little")
    prefix.with_suffix(".bin").write_bytes(raw)
    problems = "\n".join(verify(prefix).problems)
    assert "token 9000 of document 19 is outside the vocabulary of 8192" in problems
    assert "a.bin is not the file its manifest describes (sha256)" in problems
    assert "1 documents do not end with the end-of-document token 1" in problems
    assert "the manifest says max_token" in problems


def test_comparing_names_the_first_difference(tmp_path: Path) -> None:
    rows = documents(20)
    a = dataset(tmp_path / "a", rows)
    changed = [list(row) for row in rows]
    changed[7][0] += 1
    b = dataset(tmp_path / "b", changed)
    assert compare(a, b) == [f"document 7 differs first at token 0: {rows[7][0]} and {changed[7][0]}"]
    c = dataset(tmp_path / "c", [*rows[:5], [9, 9, 1, 1, 1] * 9, *rows[6:]])
    assert compare(a, c)[-1] == f"document 5 has {len(rows[5])} and 45 tokens"
    assert compare(a, dataset(tmp_path / "d", rows[:5]))[0] == "documents: 20 and 5"


def test_tools_print_what_they_did_within_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[*TOKENIZER.encode(text), TOKENIZER.eod_id] for text in TEXTS]
    a, b = dataset(tmp_path / "a", rows), dataset(tmp_path / "b", rows)
    inspect = tool("inspect_dataset").main
    folder = str(TOKENIZER.folder)
    assert inspect([str(a), "--documents", "3", "--tokenizer", folder]) == 0
    assert "  | def function_3(x):\n  |     return x + 3\n" in capsys.readouterr().out
    assert inspect([str(a), "--verify", "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert f"documents   {len(rows)}" in out
    assert re.search(r"verified: highest token .*; no problem", out)
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert inspect([str(a), "--compare", str(b)]) == 0
    assert tool("merge_datasets").main(["--output", str(tmp_path / "c"), f"{a}.idx", str(b)]) == 0
    assert inspect([str(a), "--compare", str(tmp_path / "c")]) == 1
    assert tool("split_dataset").main([str(a), "train=9", "valid=1"]) == 0
    assert open_dataset(tmp_path / "a_valid").documents == 6
    out += capsys.readouterr().out
    assert max(len(line.replace(str(tmp_path), "data")) for line in out.splitlines()) <= 80
    for arguments, message in (
        ([str(a), "--documents", "99"], "error: there is no document 99"),
        ([str(tmp_path / "none")], "none.idx is missing"),
        ([str(a), "--plot", "lengths.xyz"], "error: --plot lengths.xyz: the name must end in one of avif, "),
        ([str(a), "--plot", str(tmp_path / "a.json" / "x.png")], "error: cannot write "),
    ):
        assert inspect(arguments) == 2
        assert message in capsys.readouterr().err
    assert tool("split_dataset").main([str(a), "train"]) == 2
    assert "error: part 'train' is not NAME=SHARE, as in train=98" in capsys.readouterr().err


def test_lengths_of_documents(tmp_path: Path) -> None:
    rows = documents(30)
    assert document_lengths(open_dataset(dataset(tmp_path / "a", rows))).tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("split_digits", [True, False])
def test_byte_level_training(tmp_path: Path, split_digits: bool) -> None:
    tokenizer = train_byte_level(PROSE, tmp_path / "t", 300, source="a test", split_digits=split_digits)
    assert load_tokenizer(tmp_path / "t").fingerprint == tokenizer.fingerprint
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    assert any(len(piece) > 1 and piece.isdigit() for piece in pieces) != split_digits
    found = measure(tokenizer, [*PROSE, "é 🙂"])
    assert found["inexact"] == 0
    assert found["documents"] == 61
    assert found["bytes_per_token"] > 1.5
    assert found["divided"] == ["🙂 U+1F642", "é U+00E9"]
    with pytest.raises(DataError, match="holds a tokenizer already; choose another folder or pass --overwrite"):
        train_byte_level(PROSE, tmp_path / "t", 300, source="a test", overwrite=False)
    with pytest.raises(DataError, match="cannot train 9000 tokens on a test"):
        train_byte_level(PROSE, tmp_path / "u", 9000, source="a test")
    with pytest.raises(DataError, match="needs more than 257 tokens"):
        train_byte_level(PROSE, tmp_path / "u", 100, source="a test")
    assert not (tmp_path / "u").exists()


def test_sentencepiece_training_options(tmp_path: Path) -> None:
    bpe = train_sentencepiece(PROSE, tmp_path / "bpe", 320, source="a test")
    joined = train_sentencepiece(PROSE, tmp_path / "joined", 380, source="a test", split_digits=False)
    assert any(joined.piece(i).isdigit() and len(joined.piece(i)) > 1 for i in range(380))
    assert not any(bpe.piece(i).isdigit() and len(bpe.piece(i)) > 1 for i in range(320))
    unigram = train_sentencepiece(PROSE, tmp_path / "unigram", 300, source="a test", model_type="unigram")
    assert measure(unigram, PROSE)["inexact"] == 0
    assert not unigram.splittable
    bare = train_sentencepiece(PROSE, tmp_path / "bare", 60, source="a test", byte_fallback=False)
    found = measure(bare, ["é", "x\ny"])
    assert found["unknown"] == 2
    assert found["inexact"] == 2
    with pytest.raises(DataError, match=r"cannot train 9000 pieces on a test: .*Vocabulary size too high") as caught:
        train_sentencepiece(PROSE, tmp_path / "x", 9000, source="a test")
    assert "\n" not in str(caught.value)
    manifest = json.loads((tmp_path / "unigram" / "manifest.json").read_text())
    assert manifest["training"]["model_type"] == "unigram"


def test_training_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
    main = tool("train_tokenizer").main
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--vocab-size", "300", "--output", str(tmp_path / "t")]
    for kind in ("bpe", "byte-level"):
        assert main([*arguments, "--kind", kind, "--overwrite"]) == 0
        out = capsys.readouterr().out
        assert "held out           6 documents" in out
        assert "decoded exactly    6 of 6 documents" in out
    assert main(arguments) == 2
    assert "holds a tokenizer already" in capsys.readouterr().err
    (tmp_path / "t" / "manifest.json").unlink()
    assert main(["--adopt", str(tmp_path / "t"), "--eod", "<|endoftext|>"]) in (0, 2)


def test_tiktoken(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    import base64

    ranks = [bytes([i]) for i in range(256)] + [b"de", b"def", b" x"]
    lines = (f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(ranks))
    (tmp_path / "tokenizer.tiktoken").write_text("\n".join(lines))
    from oryx_megatron.data.files import sha256_of

    manifest = {
        "source": "a test",
        "kind": "tiktoken",
        "vocab_size": 260,
        "eod": "<|end|>",
        "pattern": r" ?\w+|[^\w]+",
        "special_tokens": {"<|end|>": 259},
        "files": {"tokenizer.tiktoken": sha256_of(tmp_path / "tokenizer.tiktoken")},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("def x é <|end|>")
    assert ids[:2] == [257, 258]
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == "def x é <|end|>"
    assert tokenizer.token_bytes()[ids].sum() == len("def x é <|end|>".encode())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"eod": "x"}))
    with pytest.raises(DataError, match="`eod` must name one of special_tokens, it is 'x'"):
        load_tokenizer(tmp_path)


def test_the_documented_clean_up_pipeline_runs(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    pytest.importorskip("orjson")
    blocks = re.findall(r"```python\n(# clean\.py\n.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "clean.py").write_text(blocks[0])
    (tmp_path / "in").mkdir()
    texts = [f"document number {i % 30} " * 5 for i in range(50)] + ["short"]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = subprocess.run(
        [sys.executable, "clean.py", "in", "work", "out"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    kept = [json.loads(line)["text"] for path in (tmp_path / "out").iterdir() for line in path.open()]
    assert sorted(kept) == sorted(set(texts) - {"short"})
