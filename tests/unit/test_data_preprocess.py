"""The whole pipeline: equal bytes whatever the processes, kills and shards; bad input; nothing half-written."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from oryx_megatron.data import corpus
from oryx_megatron.data import preprocess as preprocess_module
from oryx_megatron.data.corpus import ReadOptions
from oryx_megatron.data.datasets import merge
from oryx_megatron.data.files import shard_prefix
from oryx_megatron.data.indexed import open_dataset
from oryx_megatron.data.preprocess import Job, preprocess
from oryx_megatron.data.tokenizer import load_tokenizer, write_manifest
from oryx_megatron.errors import DataError

ROOT = Path(__file__).parents[2]
STDLIB_8K = ROOT / "tokenizers" / "stdlib-8k"
GOLDEN = {
    "sentencepiece": [
        "1193aaf2a37913903d6d2fae30791d4407b25a82466ee021694b932acb47a50a",
        "944c56a6d082c97b231a3b25ac4e7f58a0d02ce5d76b7bee5945ba879c0545da",
    ],
    "huggingface": [
        "2db2192d83ed28f30dad74da52169f94da9e20f54771a0f859b251700a5a4f4c",
        "e93569609b585c55d0de5568fcee98f4e61873021bec80b1f2f93a8b2e3f3d91",
    ],
}
"""sha256 of .bin and .idx that Megatron-LM's tools/preprocess_data.py (core_v0.16.1) makes of `golden_lines`; see
`test_megatron_makes_the_same_bytes`."""


def golden_lines() -> str:
    """The same few documents on every machine, some of them odd."""
    texts = [
        *("def f(x):\n    return x + 1\n", "  two  spaces  ", "é 漢字 🙂", "", "</s> <unk> <0x0A>", "\ttab\r\n"),
        *("=" * 77, "a b " * 50, "x", "\u2581 low line", "'quotes' \"and\" \\backslash"),
    ]
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts * 3))


def golden_tokenizer(kind: str, folder: Path) -> Path:
    """The committed SentencePiece tokenizer, or byte-level BPE with a few merges, as Megatron-LM reads it too."""
    if kind == "sentencepiece":
        return STDLIB_8K
    pairs = [
        ("Ġ", "Ġ"),
        ("e", "r"),
        ("Ġ", "a"),
        ("Ġ", "x"),
        ("=", "="),
        ("==", "=="),
        ("r", "e"),
        ("Ã", "©"),
        ("Ġa", "Ġ"),
    ]
    pieces = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in pairs)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_manifest(folder, source="a test")
    return folder


def write_corpus(folder: Path, documents: int = 60) -> Path:
    folder.mkdir(exist_ok=True)
    with open(folder / "a.jsonl", "w") as file:
        for i in range(documents):
            file.write(json.dumps({"text": f"def function_{i}(x):\n    return x + {i}\n" * (1 + i % 7)}) + "\n")
    (folder / "b.txt").write_text("the last document\n")
    return folder


def job(*inputs: Path | str, tokenizer: Path = STDLIB_8K, **options: Any) -> Job:
    return Job(inputs=tuple(map(str, inputs)), tokenizer=str(tokenizer), **options)


def digests(prefix: Path) -> list[str]:
    return [hashlib.sha256(Path(f"{prefix}.{end}").read_bytes()).hexdigest() for end in ("bin", "idx")]


def test_documents_come_out_as_they_went_in(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in")
    manifest = preprocess(job(source), tmp_path / "out")
    tokenizer = load_tokenizer(STDLIB_8K)
    dataset = open_dataset(tmp_path / "out", vocab_size=8192, fingerprint=tokenizer.fingerprint)
    texts = [json.loads(line)["text"] for line in (source / "a.jsonl").read_text().splitlines()]
    texts.append("the last document\n")
    assert dataset.documents == len(texts) == manifest["documents"]
    for number, text in enumerate(texts):
        tokens = dataset.document(number).tolist()
        assert tokens[-1] == tokenizer.eod_id
        assert tokenizer.decode(tokens[:-1]) == text
    assert manifest["bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["paths"]["gigatoken"] == len(texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.bin", "out.idx", "out.json"]


def test_bytes_do_not_depend_on_processes_or_pieces_of_work(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in")
    preprocess(job(source), tmp_path / "one")
    for name, processes, unit in (("many", 1, 100), ("two", 2, 500)):
        preprocess(job(source, unit_bytes=unit), tmp_path / name, processes=processes)
        assert digests(tmp_path / name) == digests(tmp_path / "one")
    preprocess(job(source, fast=False), tmp_path / "slow")
    assert digests(tmp_path / "slow") == digests(tmp_path / "one")


@pytest.mark.parametrize("kind", GOLDEN)
@pytest.mark.parametrize("fast", [True, False])
def test_golden_bytes_of_megatrons_tool(tmp_path: Path, kind: str, fast: bool) -> None:
    (tmp_path / "golden.jsonl").write_text(golden_lines())
    tokenizer = golden_tokenizer(kind, tmp_path / "tokenizer")
    options = ReadOptions(keep_empty=True)
    preprocess(job(tmp_path / "golden.jsonl", tokenizer=tokenizer, read=options, fast=fast), tmp_path / "golden")
    assert digests(tmp_path / "golden") == GOLDEN[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOLDEN)
def test_megatron_makes_the_same_bytes(tmp_path: Path, kind: str) -> None:
    """Needs a checkout of Megatron-LM and a Python that can run its tool: MEGATRON_LM and MEGATRON_PYTHON."""
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip(
            "set MEGATRON_LM to a checkout of Megatron-LM (and MEGATRON_PYTHON to a Python that runs its tools)"
        )
    (tmp_path / "golden.jsonl").write_text(golden_lines())
    folder = golden_tokenizer(kind, tmp_path / "tokenizer")
    options = ReadOptions(keep_empty=True)
    preprocess(job(tmp_path / "golden.jsonl", tokenizer=folder, read=options), tmp_path / "ours")
    theirs = {
        "sentencepiece": ("SentencePieceTokenizer", folder / "tokenizer.model"),
        "huggingface": ("HuggingFaceTokenizer", folder),
    }[kind]
    command = [
        *(os.environ.get("MEGATRON_PYTHON", sys.executable), "tools/preprocess_data.py", "--workers", "1"),
        *("--input", str(tmp_path / "golden.jsonl"), "--output-prefix", str(tmp_path / "theirs"), "--append-eod"),
        *("--tokenizer-type", theirs[0], "--tokenizer-model", str(theirs[1])),
    ]
    subprocess.run(command, cwd=checkout, check=True, timeout=280)
    assert digests(tmp_path / "ours") == digests(tmp_path / "theirs_text_document")


def test_long_documents_in_parts_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some words and (numbers) 123\n" * 500)
    (tmp_path / "in" / "b.txt").write_text("short")
    preprocess(job(tmp_path / "in"), tmp_path / "whole")
    monkeypatch.setattr(corpus, "PIECE", 300)
    monkeypatch.setattr(corpus, "BLOCK", 128)
    monkeypatch.setattr("oryx_megatron.data.preprocess_work.BATCH_BYTES", 1000)
    manifest = preprocess(job(tmp_path / "in"), tmp_path / "parts")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert manifest["documents"] == 2
    assert manifest["paths"]["gigatoken"] == 2


def command(source: Path, prefix: Path, *options: str) -> list[str]:
    tool = ROOT / "tools" / "preprocess_data.py"
    fixed = ("--input", str(source), "--tokenizer", str(STDLIB_8K), "--output", str(prefix))
    return [sys.executable, str(tool), *fixed, *options]


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", documents=6000)
    options = {"unit_bytes": 4000, "verify_fraction": 0.0}
    preprocess(job(source, **options), tmp_path / "whole")
    script = (
        "import sys; from oryx_megatron.data.preprocess import Job, preprocess\n"
        f"preprocess(Job(inputs=({str(source)!r},), tokenizer={str(STDLIB_8K)!r}, **{options!r}), sys.argv[1])"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], cwd=ROOT)
    parts = tmp_path / "out.work" / "parts"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None and len(list(parts.glob("*.json"))) < 20:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out.idx").exists()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert done
    kept = next(iter(sorted(done)))
    (parts / kept.replace(".json", ".bin")).touch()
    with pytest.raises(DataError, match=r"out.work is of a run with other append_eod; pass --restart"):
        preprocess(job(source, append_eod=False, **options), tmp_path / "out")
    reports = []
    preprocess(job(source, **options), tmp_path / "out", report=lambda progress: reports.append(progress.before))
    assert reports[0] > 0  # bytes of input that were not read again
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()


def test_a_changed_corpus_is_not_gone_on_with(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in")
    (source / "c.jsonl").write_text("{")
    with pytest.raises(DataError, match="invalid JSON"):
        preprocess(job(source), tmp_path / "out")
    (source / "c.jsonl").write_text('{"text": "repaired"}')
    with pytest.raises(DataError, match="input files were others; pass --restart to begin again"):
        preprocess(job(source), tmp_path / "out")
    assert preprocess(job(source), tmp_path / "out", restart=True)["documents"] == 62


def test_shards_are_contiguous_and_cover_everything(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in")
    preprocess(job(source, unit_bytes=500), tmp_path / "whole")
    data = b""
    for number in (1, 2, 3):
        prefix = shard_prefix(tmp_path / "part", (number, 3))
        assert prefix.name == f"part-0000{number}-of-00003"
        preprocess(job(source, unit_bytes=500, shard=(number, 3)), prefix)
        data += Path(f"{prefix}.bin").read_bytes()
    assert data == (tmp_path / "whole.bin").read_bytes()
    merged = merge([shard_prefix(tmp_path / "part", (number, 3)) for number in (1, 2, 3)], tmp_path / "merged")
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert {name for name in whole if merged.get(name) != whole[name]} == {"source"}
    (Path(source) / "zz.txt").write_text("A file that came while the shards were made.")
    third = shard_prefix(tmp_path / "part", (3, 3))
    preprocess(job(source, unit_bytes=500, shard=(3, 3)), third, overwrite=True)
    with pytest.raises(
        DataError,
        match=r"part-00003-of-00003 is no shard of what .*part-00001-of-00003 is of: its input files",
    ):
        merge([shard_prefix(tmp_path / "part", (number, 3)) for number in (1, 2, 3)], tmp_path / "mixed")
    assert not (tmp_path / "mixed.idx").exists()
    with pytest.raises(DataError, match="shard 4/3: count shards from 1 to 3"):
        preprocess(job(source, shard=(4, 3)), tmp_path / "x")
    with pytest.raises(DataError, match="900 shards are too many: the corpus has"):
        preprocess(job(source, shard=(1, 900)), tmp_path / "x")


def test_bad_input_stops_or_is_counted(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in")
    with open(source / "a.jsonl", "a") as file:
        file.write('{"text": ""}\n{\n{"body": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:62: invalid JSON .*; --on-error skip leaves such input out"):
        preprocess(job(source), tmp_path / "out")
    with pytest.raises(
        DataError, match=r"2 of 63 documents are bad \(3\.17%, mostly: .*\), more than --max-bad 1\.00%"
    ) as raised:
        preprocess(job(source, on_error="skip"), tmp_path / "out")
    assert not (tmp_path / "out.bin").exists()
    listed = Path(re.search(r"written\. (\S+) lists them", str(raised.value))[1])
    assert [json.loads(line)["reason"] for line in listed.read_text().splitlines()][-2:] == [
        "invalid JSON",
        "missing key",
    ]
    manifest = preprocess(job(source, on_error="skip", max_bad=0.1), tmp_path / "out")
    assert manifest["skipped"] == {"empty": 1, "invalid JSON": 1, "missing key": 1}
    assert manifest["documents"] == 61
    listed = [json.loads(line) for line in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert [(item["place"].rpartition(":")[2], item["reason"]) for item in listed] == [
        ("61", "empty"),
        ("62", "invalid JSON"),
        ("63", "missing key"),
    ]


def test_the_bound_holds_for_what_could_not_be_read(tmp_path: Path) -> None:
    """A truncated archive is one piece of bad input, however much it held."""
    source = write_corpus(tmp_path / "in", documents=400)
    whole = gzip.compress((source / "a.jsonl").read_bytes())
    (source / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    share = len(whole) // 2 / sum(path.stat().st_size for path in source.iterdir())
    with pytest.raises(DataError, match=rf"files with {share:.2%} of the input cannot be read to their end, more than"):
        preprocess(job(source, on_error="skip"), tmp_path / "out")
    assert not (tmp_path / "out.bin").exists()
    manifest = preprocess(job(source, on_error="skip", max_bad=share + 0.01), tmp_path / "out")
    assert manifest["skipped"] == {"unreadable file": 1}
    assert json.loads((tmp_path / "out.skipped.jsonl").read_text())["unread"] == len(whole) // 2


def test_killed_after_the_last_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(tmp_path / "in")

    def killed(folder: Path, but: Sequence[str]) -> None:
        if "key.json" in but:
            raise KeyboardInterrupt
        clear(folder, but)

    clear = preprocess_module._clear
    with monkeypatch.context() as patch:
        patch.setattr(preprocess_module, "_clear", killed)
        with pytest.raises(KeyboardInterrupt):
            preprocess(job(source), tmp_path / "out")
    assert (tmp_path / "out.work").exists()
    before = (tmp_path / "out.idx").stat().st_mtime_ns
    with pytest.raises(DataError, match="exists already"):
        preprocess(job(source, append_eod=False), tmp_path / "out")
    assert preprocess(job(source), tmp_path / "out")["documents"] == 61  # the same command, and nothing is done again
    assert (tmp_path / "out.idx").stat().st_mtime_ns == before
    assert not (tmp_path / "out.work").exists()
    with pytest.raises(DataError, match="exists already"):
        preprocess(job(source), tmp_path / "out")


def test_nothing_to_read_and_datasets_that_exist(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(DataError, match="the corpus has no tokens"):
        preprocess(job(tmp_path / "a.jsonl"), tmp_path / "out")
    source = write_corpus(tmp_path / "in")
    preprocess(job(source), tmp_path / "out", restart=True)
    with pytest.raises(DataError, match="exists already; choose another name or pass --overwrite"):
        preprocess(job(source), tmp_path / "out")


def test_two_runs_do_not_write_one_dataset(tmp_path: Path) -> None:
    from oryx_megatron.data.preprocess import _locked

    source = write_corpus(tmp_path / "in")
    with _locked(tmp_path / "out.work"), pytest.raises(DataError, match="another process is writing to "):
        preprocess(job(source), tmp_path / "out")


def test_a_disk_that_fills_leaves_no_dataset(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails half-way with an OSError."""
    source = write_corpus(tmp_path / "in", documents=2000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    run = subprocess.run(
        command(source, tmp_path / "out", "--processes", "1"),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: cannot write ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out.bin").exists()
    assert not (tmp_path / "out.idx").exists()
    assert preprocess(job(source), tmp_path / "out", restart=True)["documents"] == 2001


def test_a_disk_that_fills_while_finished_parts_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(tmp_path / "in")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(preprocess_module, "_log", full)
        with pytest.raises(DataError, match=r"cannot write .*out\.work: No space left on"):
            preprocess(job(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.work"]
    assert preprocess(job(source), tmp_path / "out")["documents"] == 61


def test_command_line(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in")
    run = subprocess.run(command(source, tmp_path / "out", "--json"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout)
    assert summary["documents"] == 61
    assert summary["seconds"] > 0
    assert summary["bytes_per_token"] == summary["bytes"] / summary["tokens"]
    run = subprocess.run(command(tmp_path / "none", tmp_path / "other"), capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"error: input {tmp_path}/none is neither a file, a folder, a URL nor `stdlib`\n"
