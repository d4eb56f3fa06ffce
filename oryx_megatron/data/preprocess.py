"""Corpus to indexed dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from oryx_megatron.data.corpus import Document
from oryx_megatron.data.indexed import IndexedWriter
from oryx_megatron.data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20


def tokenize_corpus(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    append_eod: bool = True,
    overwrite: bool = False,
    progress: bool = False,
    source: str = "",
) -> dict[str, Any]:
    """Tokenize documents into PREFIX.bin/.idx/.json; gives the manifest.

    Raises DataError when the corpus is bad or empty, or the dataset exists and `overwrite` is off.
    """
    text_bytes = 0
    with (
        IndexedWriter(prefix, tokenizer.vocab_size, overwrite=overwrite) as writer,
        tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=not progress, dynamic_ncols=True) as bar,
    ):
        for batch, size in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            if append_eod:
                encoded = [[*ids, tokenizer.eod_id] for ids in encoded]
            lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
            writer.add(np.fromiter((i for ids in encoded for i in ids), np.int64, int(lengths.sum())), lengths)
            text_bytes += size
            bar.update(size)
            bar.set_postfix(documents=writer.documents, tokens=writer.tokens)
        return writer.finish(tokenizer, text_bytes, append_eod=append_eod, source=source)


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[Document], int]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text.encode())
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size
