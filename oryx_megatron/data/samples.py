"""The samples of one dataset: megatron-core's GPTDataset over indices that are cached on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from oryx_megatron.config.schema import RunConfig
from oryx_megatron.data.cache import cached
from oryx_megatron.data.indexed import Dataset
from oryx_megatron.data.places import Place
from oryx_megatron.data.tokenizer import Tokenizer


def cache_root(run: RunConfig, place: Place, kind: str) -> tuple[Path, bool]:
    """Folder for caches of a `kind`, by default beside the dataset at `place`; and whether all machines share it."""
    if run.data.cache_dir is not None:
        return Path(run.data.cache_dir) / kind, True
    return place.folder / ".cache" / kind, place.shared


def open_samples(
    run: RunConfig,
    tokenizer: Tokenizer,
    path: str,
    dataset: Dataset,
    *,
    split: Split,
    share: tuple[float, float, float],
    sequences: tuple[int, int],
    count: int,
) -> GPTDataset:
    """Samples of a part of a dataset; their indices are built where no cache has them, by one rank (see `cached`).

    Args:
        run: Gives data.sequence_length, seed and data.cache_dir.
        tokenizer: Of the tokens.
        path: The dataset's name in the config.
        dataset: Opened and checked.
        split: Part to read, of those that `share` divides the dataset into.
        share: Of training, validation and test part.
        sequences: First sequence of that part in the dataset's index, and the one after its last.
        count: Samples to make; more than the part holds are further epochs of it.
    """
    first, stop = sequences
    key = {
        "data": dataset.identity(), "path": path, "begin": first, "end": stop, "samples": count, "split": split.name,
        "share": list(share), "sequence_length": run.data.sequence_length, "seed": run.seed,
        "tokenizer": tokenizer.unique_identifiers,
    }  # fmt: skip

    def build(folder: Path) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=run.seed,
            sequence_length=run.data.sequence_length,
            blend=([path], None),
            split=",".join(map(str, share)),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        config.path_to_cache = str(folder)
        numbers = np.arange(first, stop, dtype=np.int32)
        return GPTDataset(dataset.place.megatron(), path, numbers, count, split, config)

    root, shared = cache_root(run, dataset.place, "samples")
    return build(cached(root, key, build, shared=shared))
