"""Encoding documents fast, with exactly the ids of the tokenizer's own library.

`gigatoken` (Rust) encodes byte-level BPE and SentencePiece BPE with byte fallback 5 to 50 times faster than the
libraries those tokenizers come from. It is used only where its ids are theirs, by construction:

BPE itself. Let a vocabulary give every merged piece its own priority. Take any moment of any run at which two
neighbouring symbols x, y spell the piece P. No merge has crossed x's or y's outer borders, so a run over P alone
passes through the state [x][y] as well; that run is deterministic and passes through one state of two symbols. So a
piece is only ever made from one pair. SentencePiece, which ranks by the piece, and gigatoken, which ranks by the pair,
therefore do the same merges in the same order. Two pieces of equal score would break this: they are refused.

What is not BPE decides where the libraries part, and each cause is either refused for the whole tokenizer
(`fast_path`) or sends single documents to the original library (`Encoder`):
- SentencePiece never reads `<s>`, `</s>`, `<unk>` or `<0x0A>` in a text as the control, unknown or byte piece of that
  name. gigatoken's own loader makes added tokens and merges of them (documents with such literals differ; in Python
  sources, those about markup). The model built here has neither.
- Tokens with a meaning of their own (added tokens, user-defined pieces) are found by different rules.
- Pre-tokenisation by regular expression knows letters and digits from Unicode tables: gigatoken's are of Unicode 17,
  those in `tokenizers` of Unicode 16. Compared on every code point; the letters and digits that differ are UNICODE_17.
- An old form of cl100k's pattern ends in `|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+`. gigatoken reads it as tiktoken does, with
  `\\s++$` before: a text that ends in a line break and then spaces is divided elsewhere.
- Normalisation: only texts that NFC leaves as they are, in every version of Unicode that knows their characters.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from oryx_megatron.data.bounds import TooSlow
from oryx_megatron.data.corpus import Text
from oryx_megatron.data.tokenizer import (
    CL100K,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    flatten,
    knows_pre_tokenizer,
)
from oryx_megatron.errors import DataError

if TYPE_CHECKING:
    import gigatoken

COMPARED = {"gigatoken": "0.10.0", "tokenizers": "0.23.3"}
"""Versions whose pre-tokenisers were compared on every code point (tests/unit/test_data_fast.py)."""
UNICODE_17 = (
    *((0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x1ACF, 0x1ADD), (0x1AE0, 0x1AEB), (0xA7CE, 0xA7CF)),
    *((0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7)),
    *((0x10EFA, 0x10EFB), (0x11B60, 0x11B67), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8)),
    *((0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2)),
    *((0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD)),
    (0x323B0, 0x33479),
)
"""First and last of the letters, digits and marks that Unicode 17 added, of which Unicode 16 knows nothing."""
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class FastPath:
    """What gigatoken needs to stand in for a tokenizer, and which documents it must not see."""

    model: str
    """tokenizer.json for gigatoken."""
    reserved: tuple[str, ...] = ()
    """Texts that the tokenizer's own library treats as tokens of their own."""
    regex: bool = False
    """Pre-tokenisation depends on Unicode tables."""
    nfc: bool = False
    """The tokenizer normalises to NFC."""
    last_spaces: bool = False
    """Spaces after the last line break: the tokenizer's pattern parts them from it, gigatoken does not."""


class Encoder:
    """Encodes documents, each on the fastest path that is exact for it; counts which path did what."""

    def __init__(self, tokenizer: Tokenizer, *, fast: bool = True, verify_fraction: float = 0.0) -> None:
        """`verify_fraction` of the fast documents, chosen by their contents, are encoded by both libraries."""
        self.tokenizer = tokenizer
        self.verify_fraction = verify_fraction
        self.counts: Counter[str] = Counter()
        """Documents per path: `gigatoken`, the library's name, `verified`, and `because: …` for each cause."""
        self.refusal: str | None = "switched off"
        self._giga: gigatoken.Tokenizer | None = None
        if not fast:
            return
        path = fast_path(tokenizer)
        if isinstance(path, str):
            self.refusal = path
            return
        if importlib.util.find_spec("gigatoken") is None:
            self.refusal = "gigatoken is not installed"
            return
        import gigatoken

        self.refusal = None
        self._path = path
        self._giga = gigatoken.Tokenizer.from_json(path.model)
        self._reserved = _finder(path.reserved)
        self._same_tables = all(importlib.metadata.version(name) == found for name, found in COMPARED.items())

    def encode(self, texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts, int64 or uint32 [sum of lengths], and the number of each, int64 [texts].

        Raises DataError when a verified document differs between the two libraries.
        """
        library = self.tokenizer.kind
        causes = [self._cause(text) for text in texts]
        slow = [i for i, cause in enumerate(causes) if cause is not None]
        quick = [i for i, cause in enumerate(causes) if cause is None]
        self.counts["gigatoken"] += sum(texts[i].first for i in quick)
        self.counts[library] += sum(texts[i].first for i in slow)
        for i in slow:
            if texts[i].first:
                self.counts[f"because: {causes[i]}"] += 1
        rows: list[np.ndarray] = [np.zeros(0, np.uint32)] * len(texts)
        for i, ids in zip(slow, self._original([texts[i] for i in slow]), strict=True):
            rows[i] = np.array(ids, np.int64)
        if self._giga is not None and quick:
            flat, lengths = self._quick([texts[i] for i in quick])
            self._verify([texts[i] for i in quick], flat, lengths)
            if not slow and not self._wraps:
                return flat, lengths
            for i, row in zip(quick, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
                rows[i] = row
        before, after = self.tokenizer.before, self.tokenizer.after
        if self._wraps:
            rows = [
                np.concatenate([before if text.first else (), row, after if text.last else ()]).astype(np.int64)
                for text, row in zip(texts, rows, strict=True)
            ]
        return np.concatenate([np.zeros(0, np.int64), *rows]), np.array([len(row) for row in rows], np.int64)

    @property
    def _wraps(self) -> bool:
        return bool(self.tokenizer.before or self.tokenizer.after)

    def _cause(self, text: Text) -> str | None:
        """Why a text needs the original library; None when gigatoken is exact for it."""
        if self._giga is None:
            return self.refusal
        if self._reserved is not None and self._reserved(text):
            return "holds the text of a special token"
        if self._path.last_spaces and text.last and _ends_in_spaces(text.text):
            return "ends in a line break and spaces"
        if text.text.isascii():
            return None
        if self._path.regex:
            if not self._same_tables:
                return "not ASCII, and these versions of the libraries were not compared"
            if _any(text.text, _new_in_17()):
                return "holds letters or digits new in Unicode 17"
        if self._path.nfc and not _stays_in_nfc(text.text):
            return "NFC may change it"
        return None

    def _quick(self, texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
        assert self._giga is not None
        rows = self._giga.encode_batch(
            [text.data if text.first else self._rest(text) for text in texts], parallel=False
        )
        offsets = np.asarray(rows.layout.offsets.data)
        flat = np.asarray(rows.layout.content.data)[offsets[0] : offsets[-1]]
        return flat, np.diff(offsets)

    def _rest(self, text: Text) -> bytes:
        """A later part of a document: it begins with a space, which a dummy prefix would double."""
        return text.data[1:] if self.tokenizer.dummy_prefix else text.data

    def _original(self, texts: Sequence[Text]) -> list[list[int]]:
        if not texts:
            return []
        whole = [text.text if text.first else self._rest(text).decode() for text in texts]
        try:
            return self.tokenizer.encode_plain(whole)
        except TooSlow as error:
            more = f", or one of the {len(texts) - 1:,} after it" if len(texts) > 1 else ""
            raise DataError(f"{texts[0].place}{more}: {error}") from error
        except DataError:
            for text, one in zip(texts, whole, strict=True):
                try:
                    self.tokenizer.encode_plain([one])
                except DataError as error:
                    raise DataError(f"{text.place}: {error}") from error
            raise

    def _verify(self, texts: Sequence[Text], flat: np.ndarray, lengths: np.ndarray) -> None:
        if self.verify_fraction <= 0:
            return
        bound = self.verify_fraction * 2**32
        chosen = [i for i, text in enumerate(texts) if zlib.crc32(text.data) < bound]
        ends = np.cumsum(lengths)
        for i, expected in zip(chosen, self._original([texts[i] for i in chosen]), strict=True):
            if not np.array_equal(flat[ends[i] - lengths[i] : ends[i]], expected):
                raise DataError(
                    f"{texts[i].place}: gigatoken and {self.tokenizer.kind} give different tokens; "
                    "use --fast off, and please report this document"
                )
            self.counts["verified"] += texts[i].first


def _ends_in_spaces(text: str) -> bool:
    """Whether a text ends in a line break and then other white space."""
    if not text[-1:].isspace() or text[-1] in "\r\n":
        return False
    end = text[len(text.rstrip()) :]
    return "\n" in end or "\r" in end


def _stays_in_nfc(text: str) -> bool:
    """Whether NFC leaves a text alone in every version of Unicode since that of the running Python.

    The normal form of characters that are assigned never changes; unassigned ones may still become combining marks.
    """
    known = tuple(map(int, unicodedata.unidata_version.split("."))) <= (16, 0, 0)  # as `tokenizers` and gigatoken know
    return known and unicodedata.is_normalized("NFC", text) and not _any(text, _unassigned())


@functools.cache
def _new_in_17() -> np.ndarray:
    table = np.zeros(0x110000, bool)
    for first, last in UNICODE_17:
        table[first : last + 1] = True
    return table


@functools.cache
def _unassigned() -> np.ndarray:
    return np.array([unicodedata.category(chr(point)) == "Cn" for point in range(0x110000)])


def _any(text: str, table: np.ndarray) -> bool:
    """Whether a text has one of the characters marked in a table of all of them."""
    return bool(table[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any())


def _finder(reserved: Iterable[str]) -> Any:
    """A test whether a text holds one of the given texts; None when there are none."""
    needles = sorted({content.encode() for content in reserved if content}, key=len)
    # Most special tokens begin alike ("<|"): one short search for each beginning rules out nearly every document.
    heads: dict[bytes, list[bytes]] = {}
    for needle in needles:
        heads.setdefault(needle[:2], []).append(needle)
    starts = [(group[0][: _shared(group)], group) for group in heads.values()]
    if not starts:
        return None

    def holds(text: Text) -> bool:
        return any(start in text.data and any(needle in text.data for needle in group) for start, group in starts)

    return holds


def _shared(texts: Sequence[bytes]) -> int:
    """Length of the common beginning."""
    return next((i for i, column in enumerate(zip(*texts)) if len(set(column)) > 1), min(map(len, texts)))


def fast_path(tokenizer: Tokenizer) -> FastPath | str:
    """How gigatoken can stand in for a tokenizer exactly, or one line why it cannot."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _of_sentencepiece(*tokenizer.proto())
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _of_hugging_face(json.loads(tokenizer.backend.to_str()))
    return f"no fast path for {tokenizer.kind}"


def _of_sentencepiece(model: Any, schema: Any) -> FastPath | str:
    kinds = schema.ModelProto.SentencePiece
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    if trainer.model_type != schema.TrainerSpec.BPE:
        return "not a BPE model"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        return "the model normalises text"
    if trainer.treat_whitespace_as_suffix:
        return "spaces are suffixes"
    ids = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type in (kinds.NORMAL, kinds.BYTE)}
    score = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    if sum(piece.type == kinds.BYTE for piece in model.pieces) != 256:
        return "no byte fallback"
    if any(piece.type == kinds.UNUSED for piece in model.pieces):
        return "the vocabulary has unused pieces"
    if any(character not in score for piece in score for character in piece):
        return "a piece has a character that is no piece"
    merged = [value for piece, value in score.items() if len(piece) > 1]
    if len(set(merged)) != len(merged):
        return "two pieces have one score"
    own = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    # A merge for every way to divide a piece into two: SentencePiece looks at the result alone.
    merges = [
        (left, right)
        for piece in sorted(score, key=lambda piece: -score[piece])
        for left, right in ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if left in score and right in score
    ]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if normalizer.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    config: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "model": {"type": "BPE", "byte_fallback": True, "vocab": ids, "merges": merges},
    }
    return FastPath(json.dumps(config), (*own, *(piece.replace("▁", " ") for piece in own)))


def _of_hugging_face(config: dict[str, Any]) -> FastPath | str:
    model, normalizer = config["model"], config["normalizer"]
    if model["type"] != "BPE":
        return f"not a BPE model but {model['type']}"
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            return f"the model has {field}"
    pairs = [tuple(pair) for pair in model["merges"]]
    vocabulary = model["vocab"]
    if len(set(pairs)) != len(pairs):
        return "a merge is listed twice"
    added = tuple(token["content"] for token in config["added_tokens"])
    if any(token["normalized"] and token["content"] != token["content"].strip() for token in config["added_tokens"]):
        return "an added token begins or ends with a space"
    bare = json.dumps(config | {"added_tokens": []})
    if model["byte_fallback"]:
        steps = flatten(normalizer, "normalizers")
        kinds = [step["type"] for step in steps]
        if config["pre_tokenizer"] is not None or kinds not in (["Replace"], ["Prepend", "Replace"]):
            return "an unknown normaliser or pre-tokeniser"
        if (
            steps[-1]["pattern"] != {"String": " "}
            or steps[-1]["content"] != "▁"
            or steps[0].get("prepend", "▁") != "▁"
        ):
            return "an unknown normaliser"
        if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
            return "no token for some bytes"
        if any(BYTE_PIECE.fullmatch(part) for pair in pairs for part in (*pair, "".join(pair))):
            return "a merge spells the name of a byte"
        return FastPath(bare, added)
    # gigatoken ranks byte-level merges by the tokens they make where those rise with the list, as they do when trained.
    made = [vocabulary[left + right] for left, right in pairs]
    if len(set(made)) != len(made) and all(a <= b for a, b in itertools.pairwise(made)):
        return "two merges make one token"
    if normalizer is not None and normalizer["type"] != "NFC":
        return f"an unknown normaliser ({normalizer['type']})"
    if not all(character in vocabulary for character in _byte_alphabet()):
        return "no token for some bytes"
    if not knows_pre_tokenizer(config["pre_tokenizer"]):
        return "an unknown pre-tokeniser"
    pattern = flatten(config["pre_tokenizer"], "pretokenizers")[0].get("pattern", {}).get("Regex")
    return FastPath(bare, added, regex=True, nfc=normalizer is not None, last_spaces=pattern == CL100K)


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()
