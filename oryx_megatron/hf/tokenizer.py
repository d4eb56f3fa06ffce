"""A run's tokenizer as the files that transformers' AutoTokenizer reads, needing nothing but `tokenizers` there."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

from oryx_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from oryx_megatron.errors import ConversionError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of SentencePiece pieces."""
SPACE = "▁"


PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
"""What padding is called where a vocabulary has it."""


def export_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> int:
    """Write tokenizer.json and tokenizer_config.json (and keep the original model file and chat template beside them).

    Special tokens in a text become their ids, as fine-tuning needs them and a Hugging Face tokenizer does in training,
    where to SentencePiece they are text. Padding is another token than the end of a text where the vocabulary has one
    that no text holds. Returns its id.

    Raises ConversionError when the written tokenizer gives other ids than the run's on sample texts.
    """
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = _from_sentencepiece(tokenizer)
        _compare(tokenizer, fast)
        fast.save(str(folder / "tokenizer.json"))
        shutil.copyfile(tokenizer.folder / "tokenizer.model", folder / "tokenizer.model")
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        shutil.copyfile(tokenizer.folder / "tokenizer.json", folder / "tokenizer.json")
        original = tokenizer.folder / "tokenizer_config.json"
        if original.is_file():
            config = json.loads(original.read_text(encoding="utf-8"))
    else:
        raise ConversionError(f"no export for a tokenizer of kind {tokenizer.kind}")
    end = tokenizer.piece(tokenizer.eod_id)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    config.setdefault("eos_token", end)
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    ids = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    if _text(config.get("pad_token")) in (None, _text(config["eos_token"])):
        config["pad_token"] = _padding(tokenizer, ids) or config["eos_token"]
    template = tokenizer.folder / "chat_template.jinja"
    if template.is_file():
        shutil.copyfile(template, folder / template.name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    pad = ids.token_to_id(_text(config["pad_token"]))
    return tokenizer.eod_id if pad is None else pad


def _text(token: Any) -> Any:
    """A special token of tokenizer_config.json, which may be written as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _padding(tokenizer: Tokenizer, ids: FastTokenizer) -> str | None:
    """A token to pad with that is not the end of a text and that no text becomes; None where there is none."""
    names = list(PADS)
    if isinstance(tokenizer, SentencePieceTokenizer):
        processor = tokenizer.processor
        if processor.pad_id() >= 0:
            names.insert(0, processor.id_to_piece(processor.pad_id()))
        if any(processor.is_byte(i) for i in range(tokenizer.vocab_size)):
            names.append(processor.id_to_piece(processor.unk_id()))  # bytes spell what has no piece: it never occurs
        if processor.bos_id() >= 0:
            names.append(processor.id_to_piece(processor.bos_id()))  # training begins no text with it
    found = (name for name in names if ids.token_to_id(name) not in (None, tokenizer.eod_id))
    return next(found, None)


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> FastTokenizer:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.processor.serialized_model_proto())
    trainer, rules, pieces = proto.trainer_spec, proto.normalizer_spec, list(proto.pieces)
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    unknown = pieces[trainer.unk_id].piece
    if trainer.model_type == trainer.BPE:
        model: models.Model = models.BPE(
            vocab=ids,
            merges=_merges(pieces, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        model = models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        raise ConversionError(f"{tokenizer.folder}: only BPE and unigram SentencePiece models can be exported")
    fast = FastTokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if rules.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    fast.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == USER_DEFINED])
    fast.add_special_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == CONTROL])
    return fast


def _merges(pieces: list[Any], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best first: SentencePiece keeps the score of the result only."""
    found = []
    for number, piece in enumerate(pieces):
        if piece.type != NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if all(half in ids and pieces[ids[half]].type == NORMAL for half in (left, right)):
                found.append((-piece.score, number, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _compare(tokenizer: SentencePieceTokenizer, fast: FastTokenizer) -> None:
    """Hold the written tokenizer against the run's on texts made of its own pieces and of hard cases.

    Byte pieces make texts no one writes; they take part where text is read as it is. With SentencePiece's Unicode
    normalisation, which `tokenizers` approximates for broken characters, they do not.
    """
    draw = random.Random(0)
    fast.encode_special_tokens = True
    texts = [
        "",
        " ",
        "  a\n\n\tb",
        "été 中文 🙂 <s",
        "0123456789",
        "x" * 50,
        "    def f(self):\n        return 1\n",
    ]
    exact = tokenizer.processor.normalize("\ufb01 ２") == "\ufb01 ２".replace(" ", SPACE)
    plain = [i for i in range(tokenizer.vocab_size) if exact or not tokenizer.processor.is_byte(i)]
    for _ in range(300):
        tokens = [draw.choice(plain) for _ in range(draw.randint(1, 40))]
        texts.append(tokenizer.decode(tokens).replace(SPACE, " "))
    if isinstance(fast.model, models.BPE):
        texts.append("<s></s> <0x41>")
    for text in texts:
        expected, found = tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise ConversionError(
                f"{tokenizer.folder}: as tokenizer.json it would read {text[:40]!r} differently ({found[:5]}…, not "
                f"{expected[:5]}…); export with --no-tokenizer and ship the original"
            )
