"""A run's folder in small: tokenizer, indexed dataset and run config, made in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from oryx_megatron.data.train_tokenizer import train_sentencepiece

VOCABULARY = 320


def synthetic_texts(documents: int = 160, *, seed: int = 0) -> list[str]:
    """Texts of made-up words, each followed by one of a few others: easy to learn."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("aeioulmnrst"), rng.integers(2, 7))) for _ in range(40)]
    follows = rng.integers(0, len(words), (len(words), 3))
    texts = []
    for _ in range(documents):
        word, text = int(rng.integers(len(words))), []
        for _ in range(int(rng.integers(5, 90))):
            text.append(words[word])
            word = int(follows[word, rng.integers(3)])
        texts.append(" ".join(text) + ".\n")
    return texts


def tiny_project(folder: Path) -> Path:
    """Make tokenizer/, data.bin, data.idx and run.yaml in `folder`; returns run.yaml, to be loaded with overrides.

    The model divides by tensor 2 × pipeline 2; paths are absolute.
    """
    folder = folder.resolve()
    texts = synthetic_texts()
    tokenizer = train_sentencepiece(texts, folder / "tokenizer", VOCABULARY, source="synthetic")
    dataset = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    for text in texts:
        tokens = [*tokenizer.encode(text), tokenizer.eod_id]
        dataset.add_document(torch.tensor(tokens), [len(tokens)])
    dataset.finalize(str(folder / "data.idx"))
    run = {
        "model": {
            "name": "tiny",
            "mixer": "gdn",
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_heads": 4,
            "num_kv_heads": 2,
            "qk_head_dim": 8,
            "v_head_dim": 8,
            "vocab_size": VOCABULARY,
            "recurrence_chunk": 16,
        },
        "data": {
            "sequence_length": 48,
            "tokenizer": str(folder / "tokenizer"),
            "blend": [str(folder / "data")],
            "split": [9, 1, 0],
        },
        "modes": {"chunk": 8},
        "train": {"iterations": 6, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 5e-3},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"interval": 0, "keep": 0},
        "evaluation": {"batches": 1},
        "logging": {"tensorboard": False},
        "output_dir": str(folder / "out"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path
