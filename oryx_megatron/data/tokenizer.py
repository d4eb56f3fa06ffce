"""Tokenizers: one folder each, with manifest.json that names its files and their sha256.

A folder holds `tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging Face `tokenizers`). `load_tokenizer`
refuses a folder whose files are not those of the manifest, so that a dataset, a checkpoint and a tokenizer that claim
to belong together do. The objects are what megatron-core's GPTDatasetConfig asks for: `vocab_size`, `eod` and
`unique_identifiers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from oryx_megatron.data.files import read_json, sha256_of, write_json
from oryx_megatron.errors import DataError

MANIFEST = "manifest.json"
MODEL_FILES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}


class Tokenizer(ABC):
    """Text to token ids and back. Made by `load_tokenizer`."""

    kind: str
    """`sentencepiece` or `huggingface`."""
    vocab_size: int
    """Number of ids; every id lies in [0, vocab_size)."""
    eod_id: int
    """Id that ends a document."""
    fingerprint: str
    """sha256 (hex) of the model file: the same tokenizer has the same fingerprint wherever its folder lies."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.name = folder.name
        self.fingerprint = fingerprint

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of one text, with those special tokens the tokenizer itself puts around every text (if any)."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, by the library's own batch call."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Special tokens such as the end of a document have no text."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """Name of a token in the vocabulary."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text each token stands for, int32 [vocab_size]; special tokens 0.

        Summed over the tokens of a text this gives its length in bytes: exact bits per byte for any set of tokens.
        """

    @property
    def eod(self) -> int:
        """megatron-core's name for `eod_id`."""
        return self.eod_id

    @property
    def unique_identifiers(self) -> OrderedDict[str, str | int]:
        """What megatron-core keys its sample-index caches by."""
        return OrderedDict(kind=self.kind, fingerprint=self.fingerprint, eod=self.eod_id)

    def describe(self) -> dict[str, str | int]:
        """The part of a dataset's or checkpoint's manifest that names its tokenizer."""
        return {
            "name": self.name,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eod": self.eod_id,
        }


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file."""

    kind = "sentencepiece"

    def __init__(self, folder: Path, fingerprint: str, eod: str | None) -> None:
        super().__init__(folder, fingerprint)
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{folder / 'tokenizer.model'} is no SentencePiece model: {_line(error)}") from error
        self.vocab_size = self.processor.get_piece_size()
        self.eod_id = self.processor.eos_id() if eod is None else self.processor.piece_to_id(eod)
        if self.eod_id < 0 or (eod is not None and self.processor.id_to_piece(self.eod_id) != eod):
            wanted = "an end-of-sequence piece" if eod is None else f"the piece {eod!r}"
            raise DataError(f"{folder}: the vocabulary lacks {wanted} to end documents; set `eod` in {MANIFEST}")

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        return self.processor.id_to_piece(int(token))

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        for token in range(self.vocab_size):
            if self.processor.is_byte(token):
                sizes[token] = 1
            elif not (self.processor.is_control(token) or self.processor.is_unknown(token)):
                sizes[token] = len(self.processor.id_to_piece(token).replace("▁", " ").encode())
        return sizes


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's `tokenizers`."""

    kind = "huggingface"

    def __init__(self, folder: Path, fingerprint: str, eod: str | None) -> None:
        super().__init__(folder, fingerprint)
        import tokenizers

        path = folder / "tokenizer.json"
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust binding raises no narrower class
            raise DataError(f"{path} is no tokenizer of Hugging Face's `tokenizers`: {_line(error)}") from error
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        # Ids may have holes; the embedding needs a row for the highest.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        name = eod if eod is not None else _eos_of_config(folder)
        if name is None:
            raise DataError(f"{folder}: no token ends documents; set `eod` in {MANIFEST} to a piece of the vocabulary")
        if name not in vocabulary:
            raise DataError(f"{folder}: the vocabulary lacks the end-of-document piece {name!r} named in {MANIFEST}")
        self.eod_id = vocabulary[name]

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self.backend.id_to_token(int(token)) or ""

    def token_bytes(self) -> np.ndarray:
        special = {i for i, added in self.backend.get_added_tokens_decoder().items() if added.special}
        plain = {i: added.content for i, added in self.backend.get_added_tokens_decoder().items() if not added.special}
        sizes = np.zeros(self.vocab_size, np.int32)
        byte_level = "ByteLevel" in (self.backend.to_str() if self.backend.decoder is not None else "")
        for piece, token in self.backend.get_vocab(with_added_tokens=True).items():
            if token in special:
                continue
            if token in plain:
                sizes[token] = len(plain[token].encode())
            elif byte_level:
                sizes[token] = len(piece)  # one character of the byte-level alphabet per byte
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                sizes[token] = 1
            else:
                sizes[token] = len(piece.replace("▁", " ").encode())
        return sizes


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load and verify the tokenizer of a folder.

    Raises DataError when the folder or a file is missing, when a file is not the one the manifest names (sha256), or
    when the vocabulary has another size than the manifest says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"tokenizer folder {folder} does not exist; make one with tools/train_tokenizer.py")
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{folder} has no {MANIFEST}; write one with `python tools/train_tokenizer.py --adopt {folder}`"
        )
    manifest = read_json(folder / MANIFEST)
    kind = manifest.get("kind")
    if kind not in MODEL_FILES:
        raise DataError(f"{folder / MANIFEST}: kind is {kind!r}; known: {', '.join(MODEL_FILES)}")
    files = manifest.get("files")
    if not isinstance(files, dict) or MODEL_FILES[kind] not in files:
        raise DataError(f"{folder / MANIFEST}: `files` does not name {MODEL_FILES[kind]} and its sha256")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; {MANIFEST} names it")
        if (found := sha256_of(path)) != digest:
            raise DataError(f"{path} is not the file of {MANIFEST}: sha256 {found[:12]}…, expected {str(digest)[:12]}…")
    return _open(folder, kind, files[MODEL_FILES[kind]], manifest.get("eod"), manifest.get("vocab_size"))


def write_manifest(folder: str | Path, *, source: str, eod: str | None = None, **more: object) -> Tokenizer:
    """Write manifest.json for the tokenizer files of a folder and load the result.

    Arguments: `source` says where the tokenizer comes from; `eod` is the piece that ends documents (default: the
    SentencePiece end of sequence, or the eos_token of tokenizer_config.json); `more` is kept in the manifest.
    Raises DataError when the folder holds no tokenizer or the piece is not in the vocabulary.
    """
    folder = Path(folder)
    kinds = [kind for kind, name in MODEL_FILES.items() if (folder / name).is_file()]
    if not kinds:
        raise DataError(f"{folder} holds neither {' nor '.join(MODEL_FILES.values())}")
    kind = kinds[0]
    names = [MODEL_FILES[kind], *(n for n in ("tokenizer_config.json",) if (folder / n).is_file())]
    files = {name: sha256_of(folder / name) for name in names}
    tokenizer = _open(folder, kind, files[MODEL_FILES[kind]], eod, None)
    write_json(
        folder / MANIFEST,
        {
            "source": source,
            "kind": kind,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.piece(tokenizer.eod_id),
            "files": files,
            **more,
        },
    )
    return tokenizer


def _open(folder: Path, kind: str, fingerprint: str, eod: str | None, vocab_size: int | None) -> Tokenizer:
    loader = SentencePieceTokenizer if kind == "sentencepiece" else HuggingFaceTokenizer
    tokenizer = loader(folder, fingerprint, eod)
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise DataError(f"{folder}: the vocabulary has {tokenizer.vocab_size} pieces, {MANIFEST} says {vocab_size}")
    return tokenizer


def _eos_of_config(folder: Path) -> str | None:
    """eos_token of tokenizer_config.json, which is a string or an AddedToken object."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    token = read_json(path).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _line(error: Exception) -> str:
    """First line of a library's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
