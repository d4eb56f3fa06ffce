"""Tokenizers: one folder each, with manifest.json that names its files and their sha256.

A folder holds `tokenizer.model` (SentencePiece), `tokenizer.json` (Hugging Face `tokenizers`) or `tokenizer.tiktoken`
(ranks of tiktoken; the pattern and the special tokens are in the manifest, see docs/data.md). `load_tokenizer` refuses
a folder whose files are not those of the manifest, so that a dataset, a checkpoint and a tokenizer that claim to belong
together do. The objects are what megatron-core's GPTDatasetConfig asks for: `vocab_size`, `eod`, `unique_identifiers`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oryx_megatron.data.bounds import bounded, check_charsmap, check_config, check_ids, one_line
from oryx_megatron.data.files import read_json, sha256_of, write_json
from oryx_megatron.errors import DataError
from oryx_megatron.reading import open_regular, parse_json
from oryx_megatron.resources import shipped

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MODEL_FILES = {
    "sentencepiece": "tokenizer.model",
    "huggingface": "tokenizer.json",
    "tiktoken": "tokenizer.tiktoken",
}
KINDS = ", ".join(MODEL_FILES)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = (
    # GPT-2
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    CL100K,
    # Qwen 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # Qwen 3.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # o200k
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Nemotron 3
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # Llama 3, OLMo 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
"""Regular expressions of `Split` pre-tokenisers known here: a space between two ASCII letters begins a new part."""


class Tokenizer(ABC):
    """Text to token ids and back. Made by `load_tokenizer`."""

    kind: str
    """`sentencepiece`, `huggingface` or `tiktoken`."""
    vocab_size: int
    """Number of ids; every id lies in [0, vocab_size)."""
    eod_id: int
    """Id that ends a document."""
    fingerprint: str
    """sha256 (hex) of what makes text tokens, the model file and tiktoken's `pattern` and `special_tokens`: the same
    tokenizer has the same fingerprint wherever its folder lies. The token that ends documents is `eod_id`."""
    before: tuple[int, ...] = ()
    """Special tokens the tokenizer puts before every text (a begin of sequence, say)."""
    after: tuple[int, ...] = ()
    """Special tokens it puts after every text; where the end of a document is the last of them, none is added."""
    dummy_prefix: bool = False
    """It reads every text as if a space stood before it."""
    leaves_out: bool = False
    """Characters that its vocabulary lacks get no token, and nothing says so."""
    unknown_id: int | None = None
    """Id that stands for whatever its vocabulary lacks; None: there is none."""
    splittable: bool = False
    """A text may be cut in `letter space letter` before the space: the parts' tokens are the whole's."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.name = folder.name
        self.fingerprint = fingerprint

    @abstractmethod
    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without `before` and `after`, by the library's own batch call on one thread."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, between the special tokens the tokenizer puts around every text (if any)."""
        return self.encode_batch([text])[0]

    def encode_open(self, text: str) -> list[int]:
        """Token ids of one text that continues: after the tokens before every text, without those after it."""
        return [*self.before, *self.encode_plain([text])[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [[*self.before, *ids, *self.after] for ids in self.encode_plain(texts)]

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

        path = folder / "tokenizer.model"
        with one_line(f"{path} is no SentencePiece model"):
            # As bytes: the library takes no names that are not UTF-8.
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=_read(path))
            model, _ = self.proto()
            for number, piece in enumerate(model.pieces):
                if not isinstance(piece.piece, str):
                    raise DataError(f"{path} is no SentencePiece model: piece {number} is not UTF-8")
                if not math.isfinite(piece.score):
                    raise DataError(f"{path}: the score of piece {piece.piece!r} is not a number")
            check_charsmap(model.normalizer_spec.precompiled_charsmap, path)
        self.vocab_size = self.processor.get_piece_size()
        self.eod_id = self.processor.eos_id() if eod is None else self.processor.piece_to_id(eod)
        if self.eod_id < 0 or (eod is not None and self.processor.id_to_piece(self.eod_id) != eod):
            wanted = "an end-of-sequence piece" if eod is None else f"the piece {eod!r}"
            raise DataError(f"{folder}: the vocabulary lacks {wanted} to end documents; set `eod` in {MANIFEST}")
        self.dummy_prefix, self.splittable = self._spaces()
        self.unknown_id = self.processor.unk_id() if self.processor.unk_id() >= 0 else None

    def proto(self) -> tuple[Any, Any]:
        """The model as its protocol buffer message, and the module with the schema."""
        schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        model = schema.ModelProto()
        model.ParseFromString(self.processor.serialized_model_proto())
        return model, schema

    def _spaces(self) -> tuple[bool, bool]:
        """Whether there is a dummy prefix, and whether no token can reach from a letter over a space."""
        model, schema = self.proto()
        normalizer = model.normalizer_spec
        plain = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
        crossing = any("▁" in piece.piece.lstrip("▁") for piece in model.pieces)
        bpe = model.trainer_spec.model_type == schema.TrainerSpec.BPE
        escaped = normalizer.escape_whitespaces and not model.trainer_spec.treat_whitespace_as_suffix
        return normalizer.add_dummy_prefix, bpe and plain and escaped and not crossing

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts), num_threads=1) if texts else []

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        return self.processor.id_to_piece(int(token))

    def token_bytes(self) -> np.ndarray:
        import numpy as np

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
        data = _read(path)
        with one_line(f"{path} is no tokenizer of Hugging Face's `tokenizers`"):
            check_config(parse_json(data), path)
            self.backend = tokenizers.Tokenizer.from_buffer(data)
        config = json.loads(self.backend.to_str())
        self.known = _is_known(config)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        # Ids may have holes; the embedding needs a row for the highest.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        name = eod if eod is not None else _eos_of_config(folder)
        if name is None:
            raise DataError(f"{folder}: no token ends documents; set `eod` in {MANIFEST} to a piece of the vocabulary")
        if name not in vocabulary:
            raise DataError(f"{folder}: the vocabulary lacks the end-of-document piece {name!r} named in {MANIFEST}")
        self.eod_id = vocabulary[name]
        # What a file says of truncation and padding is for batches of a model, not for a corpus.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.before, self.after = self._template(path)
        self.splittable = self.known and _is_splittable(config)
        self.leaves_out = _leaves_out(config, vocabulary)
        model = config["model"]
        self.unknown_id = model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token"))

    def _template(self, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens the post-processor puts around a text."""
        plain, whole = (self._encode(["a"], special=special)[0] for special in (False, True))
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
        raise DataError(f"{path}: its post-processor does more than add tokens around a text")

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        def call() -> list[list[int]]:
            return [row.ids for row in self.backend.encode_batch_fast(list(texts), add_special_tokens=special)]

        what = f"tokenizer {self.folder} fails on a text"
        if not self.known:
            return bounded(call, sum(map(len, texts)), what)
        with one_line(what):
            return call()

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, special=False)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self.backend.id_to_token(int(token)) or ""

    def token_bytes(self) -> np.ndarray:
        import numpy as np

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


def _is_known(config: dict[str, Any]) -> bool:
    """Whether a tokenizer.json divides and normalises texts in a way that is known here, and known to be quick."""
    normalizer = config["normalizer"]
    return (normalizer is None or normalizer["type"] == "NFC") and knows_pre_tokenizer(config["pre_tokenizer"])


def _is_splittable(config: dict[str, Any]) -> bool:
    """Byte-level BPE, and no added token that reaches over a space; the pre-tokeniser is a known one."""
    return (
        config["model"]["type"] == "BPE"
        and not config["model"]["dropout"]
        and not config["model"]["byte_fallback"]
        and not any(token["lstrip"] or token["rstrip"] or " " in token["content"] for token in config["added_tokens"])
    )


class TiktokenTokenizer(Tokenizer):
    """A rank file of tiktoken; `pattern` and `special_tokens` come from the manifest. Specials in a text are text."""

    kind = "tiktoken"

    def __init__(self, folder: Path, fingerprint: str, eod: str | None) -> None:
        super().__init__(folder, fingerprint)
        if importlib.util.find_spec("tiktoken") is None:
            raise DataError(f"tokenizer {folder} needs the package tiktoken: pip install tiktoken")
        import tiktoken

        path = folder / MODEL_FILES[self.kind]
        if not (folder / MANIFEST).is_file():
            raise DataError(
                f"{folder}: tokenizer.tiktoken needs a {MANIFEST} written by hand, with `pattern`, `special_tokens` "
                "and `eod` (docs/data.md)"
            )
        manifest = read_json(folder / MANIFEST)
        pattern, special = manifest.get("pattern"), manifest.get("special_tokens")
        if not isinstance(pattern, str) or not isinstance(special, dict) or not all(map(_is_id, special.values())):
            raise DataError(f"{folder / MANIFEST}: kind tiktoken needs `pattern` and `special_tokens` (name: id)")
        self.file_digest = fingerprint
        rules = json.dumps([fingerprint, pattern, sorted(special.items())])
        self.fingerprint = hashlib.sha256(rules.encode()).hexdigest()
        with one_line(f"{path} is no rank file of tiktoken"):
            lines = (line.split() for line in _read(path).splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            check_ids((*ranks.values(), *special.values()), path)
            self.encoding = tiktoken.Encoding(
                folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        if eod is None or eod not in special:
            raise DataError(f"{folder / MANIFEST}: `eod` must name one of special_tokens, it is {eod!r}")
        self.vocab_size = self.encoding.n_vocab
        self.eod_id = special[eod]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        def call() -> list[list[int]]:
            return [self.encoding.encode_ordinary(text) for text in texts]

        return bounded(call, sum(map(len, texts)), f"tokenizer {self.folder} fails on a text")

    def decode(self, ids: Iterable[int]) -> str:
        special = self.encoding._special_tokens.values()
        return self.encoding.decode([int(i) for i in ids if int(i) not in special])

    def piece(self, token: int) -> str:
        return self.encoding.decode_single_token_bytes(int(token)).decode("utf-8", "backslashreplace")

    def token_bytes(self) -> np.ndarray:
        import numpy as np

        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, token in self.encoding._mergeable_ranks.items():
            sizes[token] = len(piece)
        return sizes

    def describe(self) -> dict[str, str | int]:
        return super().describe() | {"file": self.file_digest}


def difference(made: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why the tokens of one tokenizer are not another's, by what `describe` gave of each; None when they are the same.

    Before its fingerprint held pattern and special tokens, tiktoken's was that of the rank file alone: where nothing
    else was written down, that decides, with a note in the log.
    """
    if made["fingerprint"] != now["fingerprint"]:
        alike = made["fingerprint"] == now.get("file") or made.get("file") == now["fingerprint"]
        if not alike:
            return f"tokenizer {_named(made)}, not {_named(now)}"
        logger.warning(
            "tokenizer %s: its pattern and special tokens were not written down by that version; they are not compared",
            made["name"],
        )
    if made["eod"] != now["eod"]:
        return f"token {made['eod']} as the end of documents, not {now['eod']} (`eod` in {MANIFEST} of {now['name']})"
    return None


def check_tokenizer(tokenizer: Tokenizer, made: Mapping[str, Any], whose: str) -> None:
    """Raise DataError unless `tokenizer` is the one that a checkpoint's manifest describes; `whose` names that."""
    if (why := difference(made, tokenizer.describe())) is not None:
        raise DataError(f"{tokenizer.folder} is not the tokenizer of {whose}: that has {why}; give the right one")


def _named(made: Mapping[str, Any]) -> str:
    return f"{made['name']} ({made['vocab_size']} tokens, {made['fingerprint'][:12]}…)"


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load and verify the tokenizer of a folder.

    Raises DataError when the folder or a file is missing, when a file is not the one the manifest names (sha256), or
    when the vocabulary has another size than the manifest says. A `tokenizers/…` that is not under the working folder
    is the one that ships with the package.
    """
    folder = shipped(folder)
    if folder.is_file():
        raise DataError(f"tokenizer {folder} is a file; give its folder {folder.parent}")
    if not folder.is_dir():
        near = Path("tokenizers", folder)
        instead = f"did you mean {near}?" if shipped(near).is_dir() else "make one with `oryx tokenizer`"
        raise DataError(f"tokenizer folder {folder} does not exist; {instead}")
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} has no {MANIFEST}; write one with `oryx tokenizer --adopt {folder}`")
    manifest = _read_manifest(folder)
    kind, files = manifest["kind"], manifest["files"]
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; {MANIFEST} names it")
        if (found := sha256_of(path)) != digest:
            raise DataError(f"{path} is not the file of {MANIFEST}: sha256 {found[:12]}…, expected {digest[:12]}…")
    return _open(folder, kind, files[MODEL_FILES[kind]], manifest.get("eod"), manifest.get("vocab_size"))


def _read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, its fields of the right types. Raises DataError."""
    path = folder / MANIFEST
    manifest = read_json(path)
    kind, files = manifest.get("kind"), manifest.get("files")
    if not isinstance(kind, str) or kind not in MODEL_FILES:
        raise DataError(f"{path}: kind is {kind!r}; known: {KINDS}")
    if not isinstance(files, dict) or MODEL_FILES[kind] not in files:
        raise DataError(f"{path}: `files` does not name {MODEL_FILES[kind]} and its sha256")
    for name, digest in files.items():
        if name != Path(name).name or not isinstance(digest, str):
            raise DataError(f"{path}: `files` must hold names of files of this folder and their sha256, not {name!r}")
    for field, kinds in (("eod", str), ("vocab_size", int)):
        value = manifest.get(field)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise DataError(f"{path}: `{field}` is {value!r}; it must be {'text' if kinds is str else 'a number'}")
    return manifest


def write_manifest(
    folder: str | Path, *, source: str, eod: str | None = None, kind: str | None = None, **more: object
) -> Tokenizer:
    """Write manifest.json for the tokenizer files of a folder and load the result.

    Arguments: `source` says where the tokenizer comes from; `eod` is the piece that ends documents (default: the one
    of the manifest that is there, else the SentencePiece end of sequence or the eos_token of tokenizer_config.json);
    `kind` chooses among several tokenizer files (default: that of the manifest there is); `more` is kept in the
    manifest. What else a manifest that is there holds (tiktoken's pattern and special tokens, files it names, notes)
    stays; `source` and `training` stay while the model file does.
    Raises DataError when the folder holds no tokenizer, or several and no choice, when the piece is not in the
    vocabulary, for a manifest.json that is not a tokenizer's, and for one that names a file that is missing.
    """
    folder = Path(folder)
    before = _manifest_of(folder)
    kind = _choose(folder, kind, before)
    named = before.get("files", {})
    if not isinstance(named, dict):
        raise DataError(f"{folder / MANIFEST}: `files` is {named!r}; it must name files and their sha256")
    names = [MODEL_FILES[kind], *(n for n in ("tokenizer_config.json",) if (folder / n).is_file())]
    names += [n for n in named if n not in (*names, *MODEL_FILES.values(), "tokenizer_config.json")]
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing; {MANIFEST} names it: restore it or take it out there")
    files = {name: sha256_of(folder / name) for name in names}
    if eod is None and before.get("kind") == kind:
        eod = before.get("eod")
    if named.get(MODEL_FILES[kind]) == files[MODEL_FILES[kind]]:
        source = before.get("source", source)
    else:
        before.pop("training", None)
    if eod is not None and not isinstance(eod, str):
        raise DataError(f"{folder / MANIFEST}: `eod` is {eod!r}; it must be text")
    tokenizer = _open(folder, kind, files[MODEL_FILES[kind]], eod, None)
    ours = {
        "source": source,
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.piece(tokenizer.eod_id),
        "files": files,
    }
    write_json(folder / MANIFEST, before | ours | more)
    return tokenizer


def _manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest.json of a folder that may be replaced; {} when there is none. Raises DataError for another file."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}
    manifest = read_json(path) if path.is_file() else {}
    if not ("kind" in manifest and "files" in manifest) and manifest.get("kind") != "tiktoken":
        raise DataError(f"{path} exists and is not the manifest of a tokenizer; move it away")
    return manifest


def _choose(folder: Path, kind: str | None, manifest: dict[str, Any]) -> str:
    """Kind of the tokenizer file to take."""
    kinds = [kind for kind, name in MODEL_FILES.items() if (folder / name).is_file()]
    if not kinds:
        raise DataError(f"{folder} holds neither {' nor '.join(MODEL_FILES.values())}")
    if kind is not None:
        if kind not in kinds:
            raise DataError(f"{folder / MODEL_FILES[kind]} is missing")
        return kind
    if manifest.get("kind") in kinds:
        return manifest["kind"]
    if len(kinds) > 1:
        names = " and ".join(MODEL_FILES[kind] for kind in kinds)
        raise DataError(f"{folder} holds {names}, which may differ; choose one with --file NAME")
    return kinds[0]


def _open(folder: Path, kind: str, fingerprint: str, eod: str | None, vocab_size: int | None) -> Tokenizer:
    loaders: dict[str, type[SentencePieceTokenizer | HuggingFaceTokenizer | TiktokenTokenizer]] = {
        "sentencepiece": SentencePieceTokenizer,
        "huggingface": HuggingFaceTokenizer,
        "tiktoken": TiktokenTokenizer,
    }
    tokenizer = loaders[kind](folder, fingerprint, eod)
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise DataError(f"{folder}: the vocabulary has {tokenizer.vocab_size} pieces, {MANIFEST} says {vocab_size}")
    return tokenizer


def knows_pre_tokenizer(config: dict[str, Any] | None) -> bool:
    """Whether a pre-tokeniser of tokenizer.json is byte-level with one of the known ways to divide a text."""
    steps = flatten(config, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if len(steps) == 1:
        return steps[0]["use_regex"]
    return (
        len(steps) == 2
        and steps[0]["type"] == "Split"
        and steps[0]["pattern"].get("Regex") in PRE_TOKENIZERS
        and steps[0]["behavior"] == "Isolated"
        and not steps[0]["invert"]
        and not steps[1]["use_regex"]
    )


def flatten(step: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokeniser that may be a sequence."""
    if step is None:
        return []
    return step[children] if step["type"] == "Sequence" else [step]


def _eos_of_config(folder: Path) -> str | None:
    """eos_token of tokenizer_config.json, which is a string or an AddedToken object."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    token = read_json(path).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise DataError(f"{path}: eos_token is {token!r}, not the text of a token")
    return token


def _leaves_out(config: dict[str, Any], vocabulary: Mapping[str, int]) -> bool:
    """Whether a tokenizer.json leaves out what its vocabulary lacks; others have an unknown token, or fail."""
    from tokenizers.pre_tokenizers import ByteLevel

    model, steps = config["model"], flatten(config["pre_tokenizer"], "pretokenizers")
    if model["type"] != "BPE" or model["unk_token"] is not None:
        return False
    if model["byte_fallback"]:
        return not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return all(step["type"] != "ByteLevel" for step in steps) or not set(ByteLevel.alphabet()) <= vocabulary.keys()


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
