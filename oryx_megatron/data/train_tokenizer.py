"""Train tokenizers that give back every text exactly."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from oryx_megatron.data.files import replacing
from oryx_megatron.data.tokenizer import Tokenizer, write_manifest
from oryx_megatron.errors import DataError


def train_sentencepiece(texts: Iterable[str], folder: str | Path, vocab_size: int, *, source: str) -> Tokenizer:
    """Train SentencePiece BPE with byte fallback into `folder`.

    Text comes back exactly: no normalisation, no space put before the text, runs of spaces kept and learned as pieces,
    everything else that is not in the vocabulary (newlines too) as bytes. Only U+2581, SentencePiece's own sign for a
    space, comes back as a space. Raises DataError when there is too little text for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 16,
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"cannot train {vocab_size} pieces on this corpus: {str(error).splitlines()[-1]}") from error
    folder = Path(folder)
    with replacing(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model.getvalue())
    return write_manifest(folder, source=source)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their end: SentencePiece's trainer knows no newlines, they stay bytes."""
    for text in texts:
        yield from (line for line in text.split("\n") if line)
