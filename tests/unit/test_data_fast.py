"""gigatoken gives the ids of the original libraries, or is not asked."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

from oryx_megatron.data import fast
from oryx_megatron.data.corpus import Text, read_documents
from oryx_megatron.data.fast import UNICODE_17, Encoder, FastPath, fast_path
from oryx_megatron.data.tokenizer import CL100K, PRE_TOKENIZERS, Tokenizer, load_tokenizer, write_manifest
from oryx_megatron.errors import DataError

STDLIB_8K = Path(__file__).parents[2] / "tokenizers" / "stdlib-8k"
SAMPLE = [document.text for document in itertools.islice(read_documents("stdlib"), 40)]
LITERALS = ["<s>", "</s>", "<unk>", "<0x0A>", "<0xFF>", "<pad>", "<|end|>", "<|im_start|>", "▁", "▁▁a", "\u2581 b"]


@functools.cache
def hard_texts(count: int = 1200) -> list[str]:
    """Runs, periods, odd spaces, literals of special tokens, rare characters: what tokenizers stumble over."""
    draw = random.Random(7)
    atoms = [*LITERALS, *"=-_ .,;:'\"()[]{}<>/\\#*\n\t\r", "ab", "self", " self", "  ", "    ", "don't", "'S", "'ll"]
    atoms += [
        "é",
        "e\u0301",
        "漢字",
        "🙂",
        "\u200d",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x1c",
        "\x85",
        "0",
        "12345",
        "Ⅷ",
        "ſ",
    ]
    atoms += [chr(draw.randrange(0x20, 0x3000)) for _ in range(60)]
    texts = []
    for _ in range(count):
        parts = draw.choices(atoms, k=draw.randrange(1, 12))
        texts.append("".join(part * draw.choice([1, 1, 1, 2, 3, 5, 9, 17, 40]) for part in parts))
    return texts


def as_texts(texts: list[str]) -> list[Text]:
    return [Text(text, text.encode(), f"text {i}") for i, text in enumerate(texts)]


def assert_exact(tokenizer: Tokenizer, texts: list[str], *, at_least: float) -> Encoder:
    """Ids equal the library's own, and at least this share of the texts took the fast path."""
    encoder = Encoder(tokenizer)
    assert encoder.refusal is None
    tokens, lengths = encoder.encode(as_texts(texts))
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    for text, row, expected in zip(texts, rows, tokenizer.encode_batch(texts), strict=True):
        assert row.tolist() == expected, repr(text)
    assert encoder.counts["gigatoken"] >= at_least * len(texts), encoder.counts
    assert encoder.counts["gigatoken"] + encoder.counts[tokenizer.kind] == len(texts)
    return encoder


def train_sentencepiece(folder: Path, **options: Any) -> Tokenizer:
    folder.mkdir()
    fields: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 700,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in SAMPLE[:8] for line in text.split("\n") if line]),
            model_writer=file,
            **(fields | options),
        )
    return write_manifest(folder, source="a test")


def byte_level(folder: Path, pattern: str | None = None, **parts: Any) -> Tokenizer:
    """Byte-level BPE over GPT-2's pre-tokeniser or a Split by `pattern`; `parts` replace those of the tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE[:8], trainer)
    for name, part in parts.items():
        setattr(backend, name, part)
    return save(folder, backend)


def save(folder: Path, backend: tokenizers.Tokenizer) -> Tokenizer:
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return write_manifest(folder, source="a test", eod="<|end|>")


def test_sentencepiece_is_exact_for_every_text() -> None:
    tokenizer = load_tokenizer(STDLIB_8K)
    assert_exact(tokenizer, SAMPLE + hard_texts(), at_least=1)


def test_why_gigatokens_own_loader_differs(tmp_path: Path) -> None:
    """It takes the names of control pieces in a text for those pieces; SentencePiece and the model built here do not.

    The sources of the standard library that differ are those that hold `<s>` or `</s>`: lib2to3/pgen2/conv.py,
    test/test_pyexpat.py, zoneinfo/_zoneinfo.py.
    """
    import gigatoken

    tokenizer = train_sentencepiece(tmp_path / "sp")
    theirs = gigatoken.Tokenizer.from_sentencepiece(tokenizer.folder / "tokenizer.model")
    literals = ["a <s> b", "a </s> b", "(?P<s>", "<s></s>"]
    assert all(theirs.encode(text).tolist() != tokenizer.encode(text) for text in literals)
    assert_exact(tokenizer, [*literals, "<unk>", "<0x0A>", "<0x41>"], at_least=1)


def test_sentencepiece_with_dummy_prefix(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece(tmp_path / "sp", add_dummy_prefix=True)
    assert tokenizer.dummy_prefix
    assert_exact(tokenizer, SAMPLE[:10] + hard_texts(), at_least=1)


def test_user_defined_pieces_go_to_the_original(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece(tmp_path / "sp", user_defined_symbols=["<|im_start|>", "=="])
    encoder = assert_exact(tokenizer, hard_texts(), at_least=0.3)
    assert encoder.counts["because: holds the text of a special token"] > 50


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "the model normalises text"),
        ({"remove_extra_whitespaces": True}, "the model normalises text"),
        ({"treat_whitespace_as_suffix": True}, "spaces are suffixes"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    tokenizer = train_sentencepiece(tmp_path / "sp", **options)
    assert fast_path(tokenizer) == reason
    encoder = Encoder(tokenizer)
    tokens, _ = encoder.encode(as_texts(["some text"]))
    assert tokens.tolist() == tokenizer.encode("some text")
    assert encoder.counts == {"sentencepiece": 1, f"because: {reason}": 1, "gigatoken": 0}


def test_equal_scores_are_refused(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece(tmp_path / "sp")
    model, schema = tokenizer.proto()  # type: ignore[attr-defined]
    pieces = [p for p in model.pieces if p.type == schema.ModelProto.SentencePiece.NORMAL and len(p.piece) > 1]
    pieces[1].score = pieces[0].score
    (tokenizer.folder / "tokenizer.model").write_bytes(model.SerializeToString())
    assert fast_path(write_manifest(tokenizer.folder, source="a test")) == "two pieces have one score"


@pytest.mark.parametrize("pattern", [None, *PRE_TOKENIZERS])
def test_byte_level_bpe_is_exact(tmp_path: Path, pattern: str | None) -> None:
    tokenizer = byte_level(tmp_path / "hf", pattern)
    texts = SAMPLE[:10] + hard_texts()
    encoder = assert_exact(tokenizer, texts, at_least=0.8)
    special = sum("<|end|>" in text or "<|im_start|>" in text for text in texts)
    assert encoder.counts["because: holds the text of a special token"] == special > 0


def test_begin_of_sequence_and_normal_form(tmp_path: Path) -> None:
    template = processors.TemplateProcessing(
        single="<|end|> $A <|im_start|>", special_tokens=[("<|end|>", 0), ("<|im_start|>", 1)]
    )
    tokenizer = byte_level(tmp_path / "hf", post_processor=template, normalizer=normalizers.NFC())
    assert (tokenizer.before, tokenizer.after) == ((0,), (1,))
    encoder = assert_exact(tokenizer, [*SAMPLE[:5], *hard_texts()], at_least=0.5)
    assert encoder.counts["because: NFC may change it"] > 10


def test_llama_2s_own_form_is_exact(tmp_path: Path) -> None:
    """SentencePiece BPE as a tokenizer.json: Prepend, Replace, byte fallback."""
    source = train_sentencepiece(tmp_path / "sp", add_dummy_prefix=True)
    path = fast_path(source)
    assert isinstance(path, FastPath)
    config = json.loads(path.model)
    model, _ = source.proto()  # type: ignore[attr-defined]
    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(pair) for pair in config["model"]["merges"]],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>"), AddedToken("<unk>"), AddedToken("<|end|>")])
    tokenizer = save(tmp_path / "hf", backend)
    assert_exact(tokenizer, SAMPLE[:10] + hard_texts(), at_least=0.5)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"model": models.WordLevel({"a": 0, "<|end|>": 1}, unk_token="a")}, "not a BPE model but WordLevel"),
        ({"normalizer": normalizers.Lowercase()}, "an unknown normaliser (Lowercase)"),
        ({"pre_tokenizer": None}, "an unknown pre-tokeniser"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "an unknown pre-tokeniser"),
        (
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
            "an unknown pre-tokeniser",
        ),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "an unknown pre-tokeniser"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, parts: dict[str, Any], reason: str) -> None:
    tokenizer = byte_level(tmp_path / "hf", **parts)
    assert fast_path(tokenizer) == reason
    tokens, _ = Encoder(tokenizer).encode(as_texts(["a text"]))
    assert tokens.tolist() == tokenizer.encode("a text")


def test_what_unicode_17_brought_goes_to_the_original(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "hf")
    encoder = assert_exact(tokenizer, ["plain é", "new \U000187f8 letter", "\u088f"], at_least=0.3)
    assert encoder.counts["because: holds letters or digits new in Unicode 17"] == 2


def test_other_versions_of_the_libraries_are_trusted_with_ascii_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fast.COMPARED, "gigatoken", "0.9")
    encoder = assert_exact(byte_level(tmp_path / "hf"), ["plain", "é"], at_least=0.5)
    assert encoder.counts["gigatoken"] == 1


def test_verification_finds_a_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(load_tokenizer(STDLIB_8K), verify_fraction=1.0)
    texts = as_texts(SAMPLE[:5])
    encoder.encode(texts)
    assert encoder.counts["verified"] == 5
    right = encoder._quick
    monkeypatch.setattr(encoder, "_quick", lambda texts: (right(texts)[0] ^ 1, right(texts)[1]))
    with pytest.raises(DataError, match="text 0: gigatoken and sentencepiece give different tokens; use --fast off"):
        encoder.encode(texts)


def test_the_share_verified_is_chosen_by_content() -> None:
    texts = as_texts([f"text number {i}" for i in range(4000)])
    encoder = Encoder(load_tokenizer(STDLIB_8K), verify_fraction=0.1)
    encoder.encode(texts)
    chosen = encoder.counts["verified"]
    assert 300 < chosen < 500
    encoder.encode(texts[::-1])
    assert encoder.counts["verified"] == 2 * chosen


@pytest.mark.parametrize("dummy", [False, True])
def test_parts_of_a_document_give_the_tokens_of_the_whole(tmp_path: Path, dummy: bool) -> None:
    tokenizer = train_sentencepiece(tmp_path / "sp", add_dummy_prefix=dummy)
    hf = byte_level(tmp_path / "hf", PRE_TOKENIZERS[1])
    text = SAMPLE[3] + SAMPLE[4]
    cuts = [m.end() - 1 for m in re.finditer(r"[A-Za-z] (?=[A-Za-z])", text)]
    assert len(cuts) > 100
    for tokenizer_ in (tokenizer, hf):
        assert tokenizer_.splittable
        edges = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(edges)]
        pieces = [
            Text(part, part.encode(), "text", first=i == 0, last=i == len(parts) - 1) for i, part in enumerate(parts)
        ]
        for quick in (True, False):
            tokens, _ = Encoder(tokenizer_, fast=quick).encode(pieces)
            assert tokens.tolist() == tokenizer_.encode(text)


def borders(folder: Path, pattern: str | None) -> Tokenizer:
    """A merge over every border: a pre-tokeniser that cuts elsewhere gives other tokens."""
    names = dict(zip(_byte_order(), sorted(fast._byte_alphabet(), key=ord), strict=True))
    left = [*b"aA1. \n\r'_/", *range(0x80, 0xC0)]
    right = [*b"aA1. \n\r'_/", *range(0xC2, 0xF5)]
    vocabulary = {names[byte]: byte for byte in range(256)}
    merges = [(names[x], names[y]) for x in left for y in right]
    vocabulary |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    vocabulary["<|end|>"] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    return save(folder, backend)


@pytest.mark.parametrize("pattern", [None, *PRE_TOKENIZERS])
def test_every_short_text(tmp_path: Path, pattern: str | None) -> None:
    """Beginnings and ends: spaces, line breaks and letters in every order."""
    tokenizer = borders(tmp_path / "hf", pattern)
    texts = ["".join(part) for size in (1, 2, 3, 4) for part in itertools.product("aA1. \n\r'\u00a0", repeat=size)]
    encoder = assert_exact(tokenizer, texts, at_least=0.8)
    ends = sum(re.search("[\r\n][ \u00a0]+$", text) is not None and text[-1] not in "\r\n" for text in texts)
    assert encoder.counts["because: ends in a line break and spaces"] == (pattern == CL100K) * ends


@pytest.mark.parametrize("pattern", [None, *PRE_TOKENIZERS])
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_code_point(tmp_path: Path, pattern: str | None) -> None:
    tokenizer = borders(tmp_path / "hf", pattern)
    contexts = [
        "a{}a",
        "1{}1",
        ".{}.",
        " {} a",
        "A{}a",
        "\n{}\n{}a",
        "{}{}'s",
        "  {}  {}a",
        "{}\n\n{}.\n",
        "'S{}",
        "/{}/",
    ]
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 50_000):
        texts = ["\x01".join(c.replace("{}", chr(p)) for c in contexts) for p in points[start : start + 50_000]]
        expected = sum(not any(a <= p <= b for a, b in UNICODE_17) for p in points[start : start + 50_000])
        encoder = Encoder(tokenizer)
        tokens, lengths = encoder.encode(as_texts(texts))
        reference = tokenizer.encode_batch(texts)
        assert encoder.counts["gigatoken"] == expected
        assert tokens.tolist() == list(itertools.chain.from_iterable(reference))
        assert lengths.tolist() == list(map(len, reference))


def _byte_order() -> list[int]:
    """Bytes in the order of their characters in the byte-level alphabet."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*plain, *(byte for byte in range(256) if byte not in plain)]
