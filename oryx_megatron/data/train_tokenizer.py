"""Train tokenizers that give back every text exactly, and measure them."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from oryx_megatron.data.corpus import SKIPPED
from oryx_megatron.data.files import is_skipped_list, read_json, replacing, sha256_of
from oryx_megatron.data.sampling import TrainingText
from oryx_megatron.data.tokenizer import MANIFEST, MODEL_FILES, PRE_TOKENIZERS, Tokenizer, write_manifest
from oryx_megatron.errors import DataError

EOD = "<|endoftext|>"
"""End-of-document token of the byte-level tokenizers trained here."""
ENDS = {"sentencepiece": "</s>", "huggingface": EOD}
LONGEST_LINE = 1 << 16
"""Bytes; SentencePiece leaves longer lines out."""
RESERVED = "\u2585"
"""SentencePiece leaves out lines that hold it."""
OUTPUTS = (MANIFEST, *MODEL_FILES.values(), "tokenizer_config.json", SKIPPED)
"""Files of a tokenizer's folder that training writes, replaces or removes."""


def train_sentencepiece(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    *,
    source: str,
    model_type: Literal["bpe", "unigram"] = "bpe",
    byte_fallback: bool = True,
    split_digits: bool = True,
    character_coverage: float = 0.9999,
    overwrite: bool = True,
    text: TrainingText | None = None,
) -> Tokenizer:
    """Train a SentencePiece model into `folder`.

    With byte fallback text comes back exactly: no normalisation, no space put before the text, runs of spaces kept and
    learned as pieces, everything else that is not in the vocabulary (newlines too) as bytes. Only U+2581,
    SentencePiece's own sign for a space, comes back as a space. Lines are cut where the trainer would leave long ones
    out; its reserved character U+2585 is left to bytes, and counted in the manifest. `text`: where the texts are from,
    for the manifest. Raises DataError when the text does not suffice for the
    vocabulary, or the folder holds a tokenizer and `overwrite` is off.
    """
    check_folder(folder, overwrite)
    model = io.BytesIO()
    lines = _Lines(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=split_digits,
            max_sentence_length=LONGEST_LINE,
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if lines.failure is not None:
            raise lines.failure from None  # of the text, not of the trainer
        if not lines.bytes:
            raise DataError(f"cannot train a tokenizer on {source}: there is no text") from error
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise DataError(f"cannot train {vocab_size} pieces on {source}: {reason}") from error
    options = {
        "model_type": model_type,
        "byte_fallback": byte_fallback,
        "split_digits": split_digits,
        "character_coverage": character_coverage,
        **({"reserved_characters": lines.reserved} if lines.reserved else {}),
    }
    return _write(folder, {"tokenizer.model": model.getvalue()}, source, "sentencepiece", options, overwrite, text)


def train_byte_level(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    *,
    source: str,
    split_digits: bool = True,
    overwrite: bool = True,
    text: TrainingText | None = None,
) -> Tokenizer:
    """Train byte-level BPE of Hugging Face's `tokenizers` into `folder`; every text comes back exactly.

    Texts are divided by cl100k's regular expression, with single digits when `split_digits`. Raises DataError when the
    vocabulary is too small or the text does not suffice for it, or the folder is taken and `overwrite` is off.
    """
    check_folder(folder, overwrite)
    backend = tokenizers.Tokenizer(models.BPE())
    pattern = PRE_TOKENIZERS[2 if split_digits else 1]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), level]
    )
    backend.decoder = decoders.ByteLevel()
    if vocab_size <= 257:
        raise DataError(f"a byte-level vocabulary needs more than 257 tokens, not {vocab_size}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise DataError(f"cannot train {vocab_size} tokens on {source}: it yields {backend.get_vocab_size()}")
    config = f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{EOD}"}}\n'
    files = {"tokenizer.json": backend.to_str(pretty=True).encode(), "tokenizer_config.json": config.encode()}
    return _write(folder, files, source, "huggingface", {"split_digits": split_digits}, overwrite, text)


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """How a tokenizer does on texts: bytes per token, tokens used, characters left to bytes, exact round trips.

    Returns `documents`, `tokens`, `bytes`, `bytes_per_token`, `used` (share of the vocabulary that occurs),
    `single_bytes` (share of tokens that stand for one byte of a longer character or an unknown character), `unknown`
    tokens, `inexact` documents that decoding does not give back, and `divided`, the commonest characters in several.
    """
    counts: Counter[int] = Counter()
    characters: Counter[str] = Counter()
    documents = size = inexact = 0
    for text in texts:
        ids = tokenizer.encode_plain([text])[0]
        counts.update(ids)
        documents += 1
        size += len(text.encode())
        inexact += tokenizer.decode(ids) != text
        if not text.isascii():
            characters.update(character for character in text if not character.isascii())
    tokens = sum(counts.values())
    if not tokens:
        raise DataError("there is no text to measure a tokenizer on")
    names = {token: tokenizer.piece(token) for token in counts}
    widths = tokenizer.token_bytes()
    single = sum(n for token, n in counts.items() if widths[token] == 1 and _is_byte(names[token]))
    apart = [(n, c) for c, n in characters.items() if len(tokenizer.encode_plain([c])[0]) > 1]
    return {
        "documents": documents,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
        "used": len(counts) / tokenizer.vocab_size,
        "single_bytes": single / tokens,
        "unknown": counts.get(_unknown(tokenizer), 0),
        "inexact": inexact,
        "divided": [f"{c} U+{ord(c):04X}" for _, c in sorted(apart, reverse=True)[:5]],
    }


def _is_byte(piece: str) -> bool:
    """Byte pieces of SentencePiece but the newline, and the upper bytes of byte-level alphabets."""
    return (piece.startswith("<0x") and piece != "<0x0A>") or (
        len(piece) == 1 and not piece.isascii() and piece not in "▁ĠĊ"
    )


def _unknown(tokenizer: Tokenizer) -> int:
    return 0 if tokenizer.kind == "sentencepiece" else -1


def check_folder(folder: str | Path, overwrite: bool) -> None:
    """Refuse to train into a folder with tokenizer files that were not trained here, or, without `overwrite`, any.

    Raises DataError that names the file.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise DataError(f"{folder} exists and is not a folder; choose another --output")
    there = [name for name in OUTPUTS if os.path.lexists(folder / name)]
    if not there:
        return
    try:
        manifest = read_json(folder / MANIFEST)
        files = dict(manifest["files"]) if isinstance(manifest.get("training"), dict) else {}
    except (DataError, KeyError, TypeError, ValueError):
        files = {}
    for name in there:
        path = folder / name
        if name == MANIFEST:
            ours = bool(files)
        elif name == SKIPPED:
            ours = bool(files) and path.is_file() and is_skipped_list(path)
        else:
            ours = path.is_file() and files.get(name) == sha256_of(path)
        if not ours:
            raise DataError(f"{path} exists and was not trained here; choose another folder or move it away")
    if not overwrite:
        raise DataError(f"{folder} holds a tokenizer already; choose another folder or pass --overwrite")


def _write(
    folder: str | Path,
    files: dict[str, bytes],
    source: str,
    kind: str,
    training: dict[str, Any],
    overwrite: bool,
    text: TrainingText | None,
) -> Tokenizer:
    """Write a trained tokenizer, and what was left out of its text; files of an earlier one of another kind go."""
    folder = Path(folder)
    check_folder(folder, overwrite)  # again: training took a while
    if text is not None:
        training = training | {"text": text.facts()}
        if bad := text.list_of_bad():
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in bad]
            files = files | {SKIPPED: "".join(lines).encode("utf-8", "backslashreplace")}
    old = [name for name in OUTPUTS if name != MANIFEST and name not in files and (folder / name).exists()]
    try:
        with contextlib.ExitStack() as stack:
            for name, data in files.items():
                stack.enter_context(replacing(folder / name)).write_bytes(data)
        for name in old:
            (folder / name).unlink()
        return write_manifest(folder, source=source, eod=ENDS[kind], kind=kind, training=training)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}") from error


class _Lines:
    """Lines without their end: SentencePiece's trainer knows no newlines, they stay bytes."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.failure: BaseException | None = None
        """What ended the texts early, and the trainer does not hand on."""
        self.bytes = 0
        self.reserved = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                self.reserved += text.count(RESERVED)
                for line in text.replace(RESERVED, "\n").split("\n"):
                    if line:
                        self.bytes += len(line)
                        yield from _pieces(line)
        except BaseException as error:
            self.failure = error
            raise


def _pieces(line: str) -> Iterator[str]:
    """A line in parts that the trainer takes, cut before a space where there is one."""
    while 4 * len(line) > LONGEST_LINE and len(line.encode()) > LONGEST_LINE:
        part = line.encode()[:LONGEST_LINE].decode(errors="ignore")
        space = part.rfind(" ")
        part = part[:space] if space > 0 else part
        yield part
        line = line[len(part) :]
    yield line
