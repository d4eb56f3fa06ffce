"""Tokenizer files that are damaged or made to harm end in one line, soon."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import os
import random
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from test_data_tools import PROSE, ROOT, tool

from oryx_megatron.data import bounds
from oryx_megatron.data.corpus import Text
from oryx_megatron.data.fast import Encoder, fast_path
from oryx_megatron.data.indexed import open_dataset
from oryx_megatron.data.preprocess import Job, preprocess
from oryx_megatron.data.tokenizer import load_tokenizer, write_manifest
from oryx_megatron.data.train_tokenizer import train_byte_level
from oryx_megatron.errors import DataError

STDLIB_8K = ROOT / "tokenizers" / "stdlib-8k"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trained")
    train_byte_level(PROSE, folder, 300, source="a test")
    return json.loads((folder / "tokenizer.json").read_text())


def made(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(copy.deepcopy(config) | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def charsmap(*texts: bytes) -> str:
    return base64.b64encode(struct.pack("<I", 4) + bytes(4) + b"\0".join(texts)).decode()


@pytest.mark.parametrize(
    "normalizer",
    [
        sequence(*[replace("a", "aa")] * 40),
        sequence(*[replace("q", "qq")] * 10),
        sequence(*[replace("", "x")] * 10),
        sequence(*[replace("[b-y]", "zzb", "Regex")] * 7),
        sequence(*[replace("b*", "x", "Regex")] * 10),
        sequence(sequence(*[replace("é", "éé")] * 5), sequence(*[replace("é", "éé")] * 5)),
        replace("a", "b" * 1001),
        {"type": "Precompiled", "precompiled_charsmap": charsmap(b"a", b"b" * 1001)},
    ],
)
def test_normalisers_that_multiply_are_refused(
    tmp_path: Path, config: dict[str, Any], normalizer: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: its normaliser can make a text .* times as long, more than"):
        write_manifest(made(tmp_path / "t", config, normalizer=normalizer), source="a test")
    assert not (tmp_path / "t" / "manifest.json").exists()


@pytest.mark.parametrize(
    "normalizer",
    [
        sequence({"type": "NFKC"}, {"type": "Lowercase"}, {"type": "NFKC"}, {"type": "NFKD"}),
        sequence({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
        sequence(*[replace("…", "...")] * 3, replace(" {2,}", " ", "Regex"), replace("\\s+", " ", "Regex")),
        sequence(*[replace(" {2,}", " ", "Regex")] * 30),
        {"type": "NFC"},
        None,
    ],
)
def test_normalisers_in_use_are_not(tmp_path: Path, config: dict[str, Any], normalizer: dict[str, Any] | None) -> None:
    assert write_manifest(made(tmp_path / "t", config, normalizer=normalizer), source="a test").vocab_size == 300


def split(pattern: str) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, level]}


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_pattern_that_explodes_is_one_line_with_the_document(
    tmp_path: Path, config: dict[str, Any], processes: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "t", config, pre_tokenizer=split(r"(x+x+)+y|."))
    write_manifest(folder, source="a test")
    rows = ["fine", "also fine", "x" * 40, "fine again"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    command = ["--quiet", "--processes", processes, "--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(folder)]
    assert tool("preprocess_data").main([*command, "--output", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err == (
        f"error: {tmp_path}/a.jsonl:3: tokenizer {folder} fails on a text: Onig: Regex search error: "
        "retry-limit-in-match over\n"
    )
    assert not (tmp_path / "out.idx").exists()


def test_a_pattern_that_takes_for_ever_is_given_up(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "SECONDS", 0.5)
    monkeypatch.setattr(bounds, "BYTES_PER_SECOND", 1_000_000)
    folder = made(tmp_path / "t", config, pre_tokenizer=split(r"\w*\d"))
    encoder = Encoder(write_manifest(folder, source="a test"), fast=False)
    begun = time.monotonic()
    slow = [Text(text, text.encode(), f"a.jsonl:{n}") for n, text in enumerate(["b", "a" * 30_000])]
    with pytest.raises(
        DataError, match=r"a\.jsonl:0, or one of the 1 after it: .*no result after 1 s for 30,001 bytes"
    ):
        encoder.encode(slow)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("where", ["vocabulary", "added token", "below 0"])
def test_ids_beyond_bounds(tmp_path: Path, config: dict[str, Any], where: str) -> None:
    changed = copy.deepcopy(config)
    number = -1 if where == "below 0" else 4_000_000_000
    if where == "added token":
        changed["added_tokens"].append(changed["added_tokens"][0] | {"id": number, "content": "<x>"})
    else:
        changed["model"]["vocab"]["a"] = number
    with pytest.raises(DataError, match=rf"token id {number} is not between 0 and 16,777,215"):
        write_manifest(made(tmp_path / "t", changed), source="a test")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', "[" * 100_000, '{"model": {"type": "BPE"}}', "\0\1"])
def test_files_that_are_no_tokenizers(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="is no tokenizer of Hugging Face's `tokenizers`: "):
        write_manifest(tmp_path, source="a test")


def refusals(folder: Path) -> list[str]:
    """The message with which a tokenizer is refused when it is adopted or first used; [] when it works."""
    (folder / "manifest.json").unlink(missing_ok=True)
    try:
        tokenizer = write_manifest(folder, source="a test")
        tokenizer.encode("def f(x):\n    return é")
        fast_path(tokenizer)
        tokenizer.token_bytes()
    except DataError as error:
        return [str(error)]
    return []


def test_damaged_tokenizer_json(tmp_path: Path, config: dict[str, Any]) -> None:
    """Whatever single value is another one: one line, or a tokenizer that works."""
    draw = random.Random(5)
    values: list[Any] = [None, 7, -1, 1e400, "", "x" * 99, [], {}, True, [[]], {"type": "Sequence"}]

    def places(value: Any) -> list[tuple[Any, Any]]:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        few = draw.sample(list(keys), min(len(keys), 12))
        return [(value, key) for key in few] + [place for key in few for place in places(value[key])]

    folder, messages = tmp_path / "t", list[str]()
    for _ in range(60):
        changed = copy.deepcopy(config)
        holder, key = draw.choice(places(changed))
        holder[key] = draw.choice(values)
        made(folder, changed)
        messages += refusals(folder)
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)


def variants(raw: bytes, count: int, seed: int) -> list[bytes]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        data = bytearray(raw)
        kind = draw.randrange(4)
        start = draw.randrange(len(data))
        if kind == 0:
            data = data[:start]
        elif kind == 1:
            data[start : start + draw.choice([1, 4, 100])] = draw.randbytes(draw.choice([0, 1, 50]))
        else:
            # The end holds the trainer's and the normaliser's settings.
            for _ in range(draw.choice([1, 8, 64])):
                data[draw.randrange(0 if kind == 2 else max(len(data) - 3000, 0), len(data))] = draw.randrange(256)
        found.append(bytes(data))
    return found


def test_damaged_sentencepiece_models(tmp_path: Path) -> None:
    messages: list[str] = []
    shutil.copy(STDLIB_8K / "tokenizer.model", tmp_path)
    for data in variants((tmp_path / "tokenizer.model").read_bytes(), 60, seed=3):
        (tmp_path / "tokenizer.model").write_bytes(data)
        messages += refusals(tmp_path)
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)


def test_maps_of_characters_in_sentencepiece_models(tmp_path: Path) -> None:
    schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = schema.ModelProto()
    model.ParseFromString((STDLIB_8K / "tokenizer.model").read_bytes())
    for blob, message in (
        (base64.b64decode(charsmap(b"a" * 2000)), "can make a text 2e\\+03 times as long"),
        (struct.pack("<I", 1 << 20) + b"short", "map of characters for the normaliser is damaged"),
        (b"\1", "map of characters for the normaliser is damaged"),
    ):
        model.normalizer_spec.precompiled_charsmap = blob
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        with pytest.raises(DataError, match=f"{message}|is no SentencePiece model"):
            write_manifest(tmp_path, source="a test")


def test_folders_whose_names_are_not_utf8(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(STDLIB_8K, folder)
    assert load_tokenizer(folder).encode("a b") == load_tokenizer(STDLIB_8K).encode("a b")
    other = made(Path(f"{folder}2"), config)
    assert write_manifest(other, source="a test").vocab_size == 300


def test_two_tokenizer_files_in_a_folder(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "t", config)
    shutil.copy(STDLIB_8K / "tokenizer.model", folder)
    main = tool("train_tokenizer").main
    assert main(["--adopt", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder} holds tokenizer.model and tokenizer.json, which may differ; choose one with --file NAME\n"
    )
    assert main(["--adopt", str(folder), "--file", "tokenizer.json"]) == 0
    assert load_tokenizer(folder).kind == "huggingface"
    assert main(["--adopt", str(folder)]) == 0  # as chosen before
    assert load_tokenizer(folder).kind == "huggingface"
    assert main(["--adopt", str(folder), "--file", "tokenizer.model"]) == 0
    assert load_tokenizer(folder).kind == "sentencepiece"
    assert main(["--adopt", str(folder), "--file", "tokenizer.tiktoken"]) == 2
    assert "tokenizer.tiktoken is missing" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["$A <|endoftext|>", "<|endoftext|> $A", "$A"])
@pytest.mark.parametrize("fast", [True, False])
def test_documents_end_once(tmp_path: Path, config: dict[str, Any], template: str, fast: bool) -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(config))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=[(END, 0)])
    tokenizer = write_manifest(made(tmp_path / "t", json.loads(backend.to_str())), source="a test")
    (tmp_path / "a.jsonl").write_text('{"text": "alpha"}\n{"text": "beta gamma"}\n')
    preprocess(Job(inputs=(str(tmp_path / "a.jsonl"),), tokenizer=str(tmp_path / "t"), fast=fast), tmp_path / "d")
    found = open_dataset(tmp_path / "d")
    for number, text in enumerate(("alpha", "beta gamma")):
        wanted = [*tokenizer.before, *tokenizer.encode_plain([text])[0], tokenizer.eod_id]
        assert found.document(number).tolist() == wanted
