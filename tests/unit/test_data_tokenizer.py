"""Tokenizers: exact round trips, manifests, and what megatron-core asks of the object."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from oryx_megatron.data.corpus import read_documents
from oryx_megatron.data.tokenizer import load_tokenizer, write_manifest
from oryx_megatron.errors import DataError

STDLIB_8K = Path(__file__).parents[2] / "tokenizers" / "stdlib-8k"
HARD = [
    "def f(x):\n\treturn x  # tab\r\n",
    "   \n\n\n    indented\n  ",
    " leading and trailing ",
    "\x00\x0c\x7f\u200b\ufeff",
    "é e\u0301 漢字 🙂 𝒳 ﬁ Ⅷ",
    "</s> <unk> <0x0A> <s>",
    "",
]


def byte_level(folder: Path, eod: str = "<|end|>") -> Path:
    """A small byte-level BPE folder."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[eod],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def f(x): return x + 1\n"] * 4, trainer)
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    write_manifest(folder, source="a test", eod=eod)
    return folder


def test_sentencepiece_gives_back_every_text() -> None:
    tokenizer = load_tokenizer(STDLIB_8K)
    assert tokenizer.vocab_size == 8192
    sizes = tokenizer.token_bytes()
    for text in HARD + [document.text for document, _ in zip(read_documents("stdlib"), range(40), strict=False)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert tokenizer.eod_id not in ids


def test_hugging_face_gives_back_every_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "hf"))
    sizes = tokenizer.token_bytes()
    for text in HARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]
    assert tokenizer.piece(tokenizer.eod_id) == "<|end|>"
    assert sizes[tokenizer.eod_id] == 0


def test_indentation_is_one_piece() -> None:
    tokenizer = load_tokenizer(STDLIB_8K)
    assert [tokenizer.piece(i) for i in tokenizer.encode("        x")] == ["▁▁▁▁▁▁▁▁", "x"]


def test_megatron_core_takes_it() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    tokenizer = load_tokenizer(STDLIB_8K)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=(["x"], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    assert config.token_dtype_code == 8  # uint16
    assert json.loads(json.dumps(tokenizer.unique_identifiers))["fingerprint"] == tokenizer.fingerprint
    assert not hasattr(tokenizer, "pad")  # else megatron-core would mask that token


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json; write one with"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model is missing"),
        (lambda folder: (folder / "tokenizer.model").open("ab").write(b"x"), "is not the file of manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda folder: edit(folder, kind="bpe"), "kind is 'bpe'; known: sentencepiece, huggingface, tiktoken"),
        (lambda folder: edit(folder, vocab_size=9), "has 8192 pieces, manifest.json says 9"),
        (lambda folder: edit(folder, eod="<none>"), "lacks the piece '<none>'"),
        (lambda folder: edit(folder, files={}), "does not name tokenizer.model"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: object, message: str) -> None:
    folder = Path(shutil.copytree(STDLIB_8K, tmp_path / "t"))
    damage(folder)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def edit(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def test_missing_folder_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds neither tokenizer.model nor tokenizer.json nor tokenizer.tiktoken"):
        write_manifest(tmp_path, source="x")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="is no SentencePiece model"):
        write_manifest(tmp_path, source="x")


def test_fingerprint_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(STDLIB_8K, tmp_path / "other"))
    assert load_tokenizer(copy).fingerprint == load_tokenizer(STDLIB_8K).fingerprint
    assert load_tokenizer(copy).token_bytes().dtype == np.int32


def test_a_tokenizer_without_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"stdlib-8k does not exist; did you mean tokenizers/stdlib-8k\?$"):
        load_tokenizer("stdlib-8k")
    with pytest.raises(DataError, match=r"mine does not exist; make one with `oryx tokenizer`$"):
        load_tokenizer(tmp_path / "mine")
