"""The data pipeline, as a user calls it, over generated corpora and options, against an oracle that shares no code."""

from __future__ import annotations

import gzip
import importlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from oryx_megatron.config.schema import BlendEntry, DataConfig, ModelConfig, RunConfig, TrainConfig
from oryx_megatron.data.loader import build_datasets
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.data.train_tokenizer import train_sentencepiece
from oryx_megatron.testing.project import synthetic_texts

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(name="x", mixer="gdn", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_heads=1, vocab_size=320)
EOD = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one, which loads at once."""
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_sentencepiece(synthetic_texts(), folder, MODEL.vocab_size, source="synthetic")
    return folder


def command(name: str) -> Callable[[list[str]], int]:
    """`main` of a file of tools/."""
    return importlib.import_module(f"oryx_megatron.tools.{name}").main


PREPROCESS, MERGE = (command(name) for name in ("preprocess_data", "merge_datasets"))


@dataclass(frozen=True)
class Options:
    key: str
    separator: str | None
    eod: bool
    keep_empty: bool
    keep_nul: bool
    skip: bool

    def arguments(self) -> list[str]:
        return [
            *("--text-key", self.key),
            *(() if self.separator is None else ("--separator", self.separator.replace("\n", "\\n"))),
            *(() if self.eod else ("--no-eod",)),
            *(("--keep-empty",) if self.keep_empty else ()),
            *(("--keep-nul",) if self.keep_nul else ()),
            *(("--on-error", "skip", "--max-bad", "1") if self.skip else ()),
        ]


def oracle(
    files: list[tuple[str, str]], options: Options, encode: Callable[[str], list[int]]
) -> tuple[list[list[int]], int]:
    """Tokens of the documents, and how many documents are bad."""
    documents, bad = [], 0
    for name, content in files:
        texts: list[Any] = content.split(options.separator) if options.separator else [content]
        if options.separator and not texts[-1]:
            texts.pop()  # the separator may end the last document, too
        if "jsonl" in name:
            texts = []
            for line in filter(str.strip, content.split("\n")):
                try:
                    texts.append(json.loads(line)[options.key])
                except (ValueError, KeyError, TypeError):
                    texts.append(None)
        for text in texts:
            if not isinstance(text, str) or "\ud800" in text or ("\0" in text and not options.keep_nul):
                bad += 1
            elif text or options.keep_empty:
                tokens = encode(text)
                documents.append(tokens + [EOD] * (options.eod and bool(tokens)))
    return documents, bad


PIECES = [
    "a",
    "b",
    " ",
    "  ",
    "\t",
    "\n",
    "|",
    "def f(x):\n    return x",
    "é",
    "漢字",
    "🙂",
    "\0",
    "</s>",
    '"',
    "\\",
    "1",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
RECORDS = st.one_of(
    st.fixed_dictionaries({"text": TEXTS, "body": TEXTS}).map(json.dumps),
    st.fixed_dictionaries({"text": TEXTS, "body": TEXTS}).map(lambda record: json.dumps(record, ensure_ascii=False)),
    st.sampled_from(["", "  ", "{", "[]", '{"text": 3}', '{"body": null}', '{"text": "\\ud800", "body": "x"}', "null"]),
)
LINES = st.lists(RECORDS, max_size=6).map("\n".join)
FILES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["jsonl", "jsonl.gz"]), LINES), st.tuples(st.sampled_from(["txt", "py.gz"]), TEXTS)
    ),
    min_size=1,
    max_size=4,
).map(lambda files: [(f"{i}.{ending}", content) for i, (ending, content) in enumerate(files)])
OPTIONS = st.builds(
    Options,
    key=st.sampled_from(["text", "body"]),
    separator=st.sampled_from([None, "|", "\n", "\n\n", "</s>"]),
    eod=st.booleans(),
    keep_empty=st.booleans(),
    keep_nul=st.booleans(),
    skip=st.booleans(),
)


def check(files: list[tuple[str, str]], options: Options, tokenizer: Path, as_folder: bool) -> None:
    encode = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model")).encode
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place), Path(place) / "corpus"
        corpus.mkdir()
        for name, content in files:
            data = content.encode()
            (corpus / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        call = ["--quiet", "--processes", "1", "--tokenizer", str(tokenizer), *options.arguments(), "--input"]
        paths = [str(corpus / name) for name, _ in files]
        code = PREPROCESS([*call, *([str(corpus)] if as_folder else paths), "--output", str(folder / "whole")])
        documents, bad = oracle(files, options, encode)
        tokens = [token for document in documents for token in document]
        if not tokens or (bad and not options.skip):
            assert code == 2
            assert not list(folder.glob("whole.[bij]*"))
            return
        assert code == 0
        data = IndexedDataset(str(folder / "whole"))  # megatron-core's own reader
        assert [data[i].tolist() for i in range(len(data))] == [document for document in documents if document]
        assert np.diff(data.document_indices).tolist() == [int(bool(document)) for document in documents]
        skipped = json.loads((folder / "whole.json").read_text())["skipped"]
        assert sum(number for reason, number in skipped.items() if reason != "empty") == bad
        check_samples(folder / "whole", tokens, tokenizer)
        parts = [oracle([file], options, encode)[0] for file in files]
        if len(parts) > 1 and all(map(any, parts)):  # made file by file and merged, it is the same
            for i, path in enumerate(paths):
                assert PREPROCESS([*call, path, "--output", str(folder / f"part{i}")]) == 0
            assert (
                MERGE(["--output", str(folder / "merged"), *(str(folder / f"part{i}") for i in range(len(parts)))]) == 0
            )
            for end in ("bin", "idx"):
                assert (folder / f"merged.{end}").read_bytes() == (folder / f"whole.{end}").read_bytes()


def check_samples(prefix: Path, tokens: list[int], tokenizer: Path, length: int = 4) -> None:
    """One epoch of training reads every token once, but for what is left at the end of a document order."""
    count = (len(tokens) - 1) // length
    if not count:
        return
    run = RunConfig(
        model=MODEL,
        data=DataConfig(blend=(BlendEntry(path=str(prefix)),), sequence_length=length, tokenizer="x", split=(1, 0, 0)),
        train=TrainConfig(iterations=count, global_batch_size=1),
        output_dir="x",
    )
    blend = build_datasets(run, load_tokenizer(tokenizer))["train"]
    assert len(blend) == count
    read = Counter(token for i in range(count) for token in blend[i]["tokens"].tolist())
    left = Counter(tokens)
    left.subtract(read)
    assert min(left.values()) >= 0
    assert left.total() == len(tokens) - count * length


COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
}


@settings(max_examples=60, **COMMON)
@given(files=FILES, options=OPTIONS, as_folder=st.booleans())
def test_what_is_written_is_what_the_oracle_says(
    files: list[tuple[str, str]], options: Options, as_folder: bool, tokenizer: Path
) -> None:
    check(files, options, tokenizer, as_folder)


@pytest.mark.slow
@settings(max_examples=600, **COMMON)
@given(files=FILES, options=OPTIONS, as_folder=st.booleans())
def test_what_is_written_is_what_the_oracle_says_at_length(
    files: list[tuple[str, str]], options: Options, as_folder: bool, tokenizer: Path
) -> None:
    check(files, options, tokenizer, as_folder)
