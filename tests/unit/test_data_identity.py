"""What a dataset is: everything that changes tokens, and its content. Datasets made otherwise do not meet."""

from __future__ import annotations

import base64
import importlib.util
import json
import logging
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from oryx_megatron.config.schema import BlendEntry, DataConfig, ModelConfig, RunConfig, TrainConfig
from oryx_megatron.data import indexed
from oryx_megatron.data.corpus import ReadOptions
from oryx_megatron.data.datasets import merge, split
from oryx_megatron.data.files import sha256_of
from oryx_megatron.data.indexed import open_dataset
from oryx_megatron.data.loader import build_datasets, check_resume
from oryx_megatron.data.preprocess import Job, preprocess
from oryx_megatron.data.tokenizer import Tokenizer, load_tokenizer, write_manifest
from oryx_megatron.errors import DataError

ROOT = Path(__file__).parents[2]
STDLIB_8K = ROOT / "tokenizers" / "stdlib-8k"
MODEL = ModelConfig(name="x", mixer="gdn", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_heads=1, vocab_size=8192)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("|".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(80)))
    return path


def make(
    corpus: Path, name: str, tokenizer: Path = STDLIB_8K, *, eod: bool = True, separator: str | None = "|", **more: Any
) -> Path:
    prefix = corpus.parent / name
    read = ReadOptions(separator=separator, **more)
    preprocess(Job(inputs=(str(corpus),), tokenizer=str(tokenizer), read=read, append_eod=eod), prefix)
    return prefix


def other_eod(folder: Path, piece: str = "▁▁▁▁") -> Path:
    """The shipped tokenizer, but another piece ends documents."""
    shutil.copytree(STDLIB_8K, folder)
    write_manifest(folder, source="a test", eod=piece)
    return folder


def blends(tmp_path: Path, tokenizer: Tokenizer, *prefixes: Path, **data: Any) -> Any:
    fields: dict[str, Any] = {"sequence_length": 16, "tokenizer": "x", "cache_dir": str(tmp_path / "cache")}
    run = RunConfig(
        model=MODEL,
        data=DataConfig(blend=tuple(BlendEntry(path=str(prefix)) for prefix in prefixes), **(fields | data)),
        train=TrainConfig(iterations=4, global_batch_size=4),
        output_dir="x",
    )
    return build_datasets(run, tokenizer, {"train": 16})["train"]


def megatrons(prefix: Path, documents: list[list[int]]) -> Path:
    """A dataset of another tool: no manifest."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def line(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_end_token_belongs_to_the_dataset(corpus: Path, tmp_path: Path) -> None:
    other = other_eod(tmp_path / "other")
    assert load_tokenizer(other).fingerprint == load_tokenizer(STDLIB_8K).fingerprint
    a, b = make(corpus, "a"), make(corpus, "b", other)
    why = line(lambda: merge([a, b], tmp_path / "c"))
    assert "b was made with another tokenizer than" in why
    assert "as the end of documents, not 1 (`eod` in manifest.json of stdlib-8k)" in why
    for documents in ("joined", "isolated"):
        why = line(lambda how=documents: blends(tmp_path, load_tokenizer(other), a, documents=how))
        assert f"dataset {a} was made with token 1 as the end of documents, not " in why
    state = json.loads(json.dumps({"consumed": 4, "identity": blends(tmp_path, load_tokenizer(STDLIB_8K), a).identity}))
    why = line(lambda: check_resume(state, blends(tmp_path, load_tokenizer(other), b)))
    assert "the checkpoint's train data had eod 1, now it is" in why


def test_datasets_made_with_other_options_do_not_merge(corpus: Path, tmp_path: Path) -> None:
    a, b, c = make(corpus, "a"), make(corpus, "b", eod=False), make(corpus, "c", separator="return")
    assert "another --no-eod than" in line(lambda: merge([a, b], tmp_path / "m"))
    assert "another --separator than" in line(lambda: merge([a, c], tmp_path / "m"))
    foreign = megatrons(tmp_path / "foreign", [[5, 6, 1]])
    assert "foreign names none" in line(lambda: merge([a, foreign], tmp_path / "m"))
    assert not list(tmp_path.glob("m.*"))
    merge([a, make(corpus, "d")], tmp_path / "m")
    split(tmp_path / "m", {"x": 1, "y": 1}, tmp_path / "s")
    for name in ("m", "s_x"):  # what they were made with goes along
        assert "another --no-eod than" in line(lambda left=tmp_path / name: merge([left, b], tmp_path / "n"))
        assert "another --separator than" in line(lambda left=tmp_path / name: merge([left, c], tmp_path / "n"))


def test_shards_of_other_options_are_no_shards(corpus: Path, tmp_path: Path) -> None:
    prefixes = []
    for number, keep in ((1, False), (2, True)):
        prefixes.append(tmp_path / f"part{number}")
        read = ReadOptions(separator="|", keep_empty=keep)
        job = Job(inputs=(str(corpus),), tokenizer=str(STDLIB_8K), read=read, shard=(number, 2), unit_bytes=500)
        preprocess(job, prefixes[-1])
    assert "it was made with another keep_empty;" in line(lambda: merge(prefixes, tmp_path / "m"))


def test_an_unfinished_run_is_not_resumed_with_another_end(corpus: Path, tmp_path: Path) -> None:
    tokenizer = Path(shutil.copytree(STDLIB_8K, tmp_path / "t"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{\n')
    job = Job(inputs=(str(bad),), tokenizer=str(tokenizer))
    assert "bad.jsonl" in line(lambda: preprocess(job, tmp_path / "out"))
    write_manifest(tokenizer, source="a test", eod="▁▁▁▁")
    assert "is of a run with other eod; pass --restart" in line(lambda: preprocess(job, tmp_path / "out"))


def test_a_blend_with_and_without_ends_is_refused(corpus: Path, tmp_path: Path) -> None:
    a, b = make(corpus, "a"), make(corpus, "b", eod=False)
    tokenizer = load_tokenizer(STDLIB_8K)
    why = line(lambda: blends(tmp_path, tokenizer, a, b))
    assert f"the documents of {a} end with the end-of-document token 1, those of {b} do not (--no-eod)" in why
    blends(tmp_path, tokenizer, b)


def test_isolated_documents_need_boundaries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(STDLIB_8K)
    rows = [[*range(10 + i, 40 + i), end] for i, end in enumerate([7] * 50)]
    wrong = megatrons(tmp_path / "wrong", rows)
    why = line(lambda: blends(tmp_path, tokenizer, wrong, documents="isolated"))
    assert "none of the documents looked at (50 of 50) ends with token 1, which ends documents for" in why
    blends(tmp_path, tokenizer, wrong)
    joined = megatrons(tmp_path / "joined", [[*range(10, 40), 1] * 30 + [9]])  # documents within one sequence
    some = megatrons(tmp_path / "some", [[*row[:-1], 1] if i % 2 else row for i, row in enumerate(rows)])
    for prefix, share in ((joined, "0 of 1"), (some, "25 of 50")):
        with caplog.at_level(logging.WARNING):
            blends(tmp_path, tokenizer, prefix, documents="isolated")
        assert f"dataset {prefix}: {share} documents looked at end with the end-of-document token 1" in caplog.text


def scramble(prefix: Path) -> None:
    """Other tokens of the same number; size and time stay."""
    path = prefix.with_suffix(".bin")
    before = path.stat()
    data = np.fromfile(path, np.uint16)
    np.roll(data, 101).tofile(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("whole", [True, False])
def test_replaced_tokens_are_noticed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(indexed, "WHOLE", 64)
        monkeypatch.setattr(indexed, "SAMPLE", 16)
    a, tokenizer = make(corpus, "a"), load_tokenizer(STDLIB_8K)
    foreign = megatrons(tmp_path / "f", [[*range(10 + i, 90 + i), 1] for i in range(40)])
    states = [{"consumed": 4, "identity": blends(tmp_path, tokenizer, prefix).identity} for prefix in (a, foreign)]
    states = json.loads(json.dumps(states))
    manifest = json.loads(a.with_suffix(".json").read_text())
    assert ("sampled" in manifest["files"]["bin"]) == (not whole)
    for prefix, state in zip((a, foreign), states, strict=True):
        check_resume(state, blends(tmp_path, tokenizer, prefix))
        scramble(prefix)
    assert "a.bin is not the file that" in line(lambda: blends(tmp_path, tokenizer, a))
    assert "is not the checkpoint's" in line(lambda: check_resume(states[1], blends(tmp_path, tokenizer, foreign)))


def test_a_long_dataset_of_an_earlier_version_is_known_by_the_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, tokenizer = make(corpus, "a"), load_tokenizer(STDLIB_8K)
    monkeypatch.setattr(indexed, "WHOLE", 64)
    monkeypatch.setattr(indexed, "SAMPLE", 16)
    manifest = json.loads(a.with_suffix(".json").read_text())
    a.with_suffix(".json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}))
    state = json.loads(json.dumps({"consumed": 4, "identity": blends(tmp_path, tokenizer, a).identity}))
    scramble(a)
    why = line(lambda: check_resume(state, blends(tmp_path, tokenizer, a)))
    assert "a.bin is not the file that the checkpoint's train data were read from" in why


def test_checkpoints_of_earlier_versions_resume(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(STDLIB_8K)
    a, foreign = make(corpus, "a"), megatrons(tmp_path / "f", [[*range(10 + i, 90 + i), 1] for i in range(40)])
    blend = blends(tmp_path, tokenizer, a, foreign)
    state = json.loads(json.dumps({"consumed": 8, "identity": blend.identity}))
    files = state["identity"].pop("files")
    del state["identity"]["tokenizer"]
    old = {data: file["written"] for data, file in files.items() if data.startswith("content-")}
    text = json.dumps(state)
    for data, written in old.items():
        text = text.replace(data, written)
    with caplog.at_level(logging.INFO):
        check_resume(json.loads(text), blend)
    assert "knows datasets without manifest by size and time alone" in caplog.text
    os.utime(f"{foreign}.bin", ns=(1, 1))
    assert "is not the checkpoint's" in line(
        lambda: check_resume(json.loads(text), blends(tmp_path, tokenizer, a, foreign))
    )


def test_a_manifest_that_was_changed_is_refused(corpus: Path, tmp_path: Path) -> None:
    path = make(corpus, "a").with_suffix(".json")
    written = json.loads(path.read_text())
    for field, value, message in (
        ("max_token", 5, "it is not what was written (checksum)"),
        ("bytes", "many", "it has bytes 'many'"),
        ("files", {"bin": 3}, "it has files {'bin': 3}"),
        ("tokenizer", {"name": "x"}, "it has tokenizer {'name': 'x'}"),
        ("shard", 3, "it has shard 3"),
        ("version", 2, "is of version 2; this version reads version 1"),
    ):
        path.write_text(json.dumps(written | {field: value}))
        assert message in line(lambda: open_dataset(tmp_path / "a"))
    path.write_text(json.dumps(written | {"note": "by hand"}))
    open_dataset(tmp_path / "a")
    del written["checksum"]  # as earlier versions wrote it
    path.write_text(json.dumps(written))
    open_dataset(tmp_path / "a")


def test_one_dataset_under_two_names_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, tokenizer = make(corpus, "a"), load_tokenizer(STDLIB_8K)
    for end in ("bin", "idx", "json"):
        os.symlink(f"{a}.{end}", tmp_path / f"linked.{end}")
        os.link(f"{a}.{end}", tmp_path / f"hard.{end}")
        shutil.copy(f"{a}.{end}", tmp_path / f"copied.{end}")
        if end != "json":
            shutil.copy(f"{a}.{end}", tmp_path / f"bare.{end}")
            os.symlink(f"{a}.{end}", tmp_path / f"naked.{end}")
    monkeypatch.chdir(tmp_path)
    for name in ("linked", "hard", "copied", "bare", "../" + tmp_path.name + "/a"):
        why = line(lambda other=Path(name): blends(tmp_path, tokenizer, a, other))
        assert f"{a} and {name} are one dataset" in why
    assert "bare and naked are one dataset" in line(lambda: blends(tmp_path, tokenizer, Path("bare"), Path("naked")))


# Manifests of tokenizers


def fake_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is not installed, its one class: pieces of one byte, special tokens by name."""
    if importlib.util.find_spec("tiktoken") is not None:
        return

    class Encoding:
        def __init__(self, name: str, *, pat_str: str, mergeable_ranks: dict, special_tokens: dict) -> None:
            self._mergeable_ranks, self._special_tokens = mergeable_ranks, special_tokens
            self.n_vocab = max([*mergeable_ranks.values(), *special_tokens.values()]) + 1

        def encode_ordinary(self, text: str) -> list[int]:
            return list(text.encode())

        def decode_single_token_bytes(self, token: int) -> bytes:
            names = {n: name.encode() for name, n in self._special_tokens.items()}
            return names.get(token, bytes([token % 256]))

    module = types.ModuleType("tiktoken")
    module.Encoding = Encoding  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("tiktoken", loader=None)
    monkeypatch.setitem(sys.modules, "tiktoken", module)


@pytest.fixture
def tiktoken_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_tiktoken(monkeypatch)
    folder = tmp_path / "tk"
    folder.mkdir()
    pieces = (f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256))
    (folder / "tokenizer.tiktoken").write_text("\n".join(pieces))
    manifest = {
        "kind": "tiktoken",
        "vocab_size": 258,
        "eod": "<|a|>",
        "pattern": r"\w+|\W+",
        "special_tokens": {"<|a|>": 256, "<|b|>": 257},
        "note": "by hand",
        "files": {"tokenizer.tiktoken": sha256_of(folder / "tokenizer.tiktoken")},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def edit(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def test_tiktokens_pattern_and_special_tokens_are_in_the_fingerprint(corpus: Path, tiktoken_folder: Path) -> None:
    before = load_tokenizer(tiktoken_folder)
    a = make(corpus, "a", tiktoken_folder)
    for fields in ({"pattern": r"\w|\W+"}, {"special_tokens": {"<|a|>": 256, "<|c|>": 257}}):
        edit(tiktoken_folder, **fields)
        assert load_tokenizer(tiktoken_folder).fingerprint != before.fingerprint
        name = next(iter(fields))
        b = make(corpus, name, tiktoken_folder)
        assert "was made with another tokenizer than" in line(lambda: merge([a, b], corpus.parent / "m"))  # noqa: B023
        tokenizer = load_tokenizer(tiktoken_folder)
        why = line(lambda: open_dataset(a, tokenizer=tokenizer.describe()))  # noqa: B023
        assert "was made with tokenizer tk (258 tokens, " in why


def test_tiktoken_datasets_of_earlier_versions_load(
    corpus: Path, tiktoken_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, tokenizer = make(corpus, "a", tiktoken_folder), load_tokenizer(tiktoken_folder)
    manifest = json.loads(a.with_suffix(".json").read_text())
    manifest["tokenizer"]["fingerprint"] = manifest["tokenizer"].pop("file")  # the rank file alone
    a.with_suffix(".json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING):
        open_dataset(a, tokenizer=tokenizer.describe())
    assert "its pattern and special tokens were not written down" in caplog.text
    state = {"consumed": 4, "identity": dict(blends(corpus.parent, tokenizer, a).identity)}
    for name in ("tokenizer", "files"):
        del state["identity"][name]  # type: ignore[attr-defined]
    state["identity"]["fingerprint"] = manifest["tokenizer"]["fingerprint"]  # type: ignore[index]
    check_resume(state, blends(corpus.parent, tokenizer, a))


def test_adopting_keeps_what_was_written_by_hand(tiktoken_folder: Path) -> None:
    before = json.loads((tiktoken_folder / "manifest.json").read_text())
    write_manifest(tiktoken_folder, source="adopted", eod="<|b|>")
    after = json.loads((tiktoken_folder / "manifest.json").read_text())
    assert after == before | {"eod": "<|b|>", "source": "adopted"}
    write_manifest(tiktoken_folder, source="adopted again")
    assert json.loads((tiktoken_folder / "manifest.json").read_text()) == after
    (tiktoken_folder / "manifest.json").unlink()
    assert "needs a manifest.json written by hand" in line(lambda: write_manifest(tiktoken_folder, source="x"))
    assert not (tiktoken_folder / "manifest.json").exists()


def test_adopting_keeps_the_end_token_and_other_files(tmp_path: Path) -> None:
    folder = other_eod(tmp_path / "t")
    (folder / "chat.jinja").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == json.loads((STDLIB_8K / "manifest.json").read_text())["source"]
    edit(folder, note=[1], files=manifest["files"] | {"chat.jinja": "0"})
    write_manifest(folder, source="again")
    after = json.loads((folder / "manifest.json").read_text())
    assert after == manifest | {
        "note": [1],
        "files": manifest["files"] | {"chat.jinja": sha256_of(folder / "chat.jinja")},
    }
    load_tokenizer(folder)
    (folder / "chat.jinja").unlink()
    assert "chat.jinja is missing; manifest.json names it" in line(lambda: write_manifest(folder, source="again"))
    (folder / "manifest.json").write_text("{")
    assert "is not valid JSON" in line(lambda: write_manifest(folder, source="again"))
    assert (folder / "manifest.json").read_text() == "{"
