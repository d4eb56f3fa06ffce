"""Several ranks: one builds the sample indices, all read them, and a failure is everybody's."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oryx_megatron.config.schema import BlendEntry, DataConfig, ModelConfig, RunConfig, TrainConfig
from oryx_megatron.data.indexed import IndexedWriter
from oryx_megatron.data.loader import build_datasets
from oryx_megatron.data.stream import SampleStream
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import DataError
from oryx_megatron.parallel.wait import first_rank_alone
from oryx_megatron.testing import run_distributed

TOKENIZER_FOLDER = Path(__file__).parents[2] / "tokenizers" / "stdlib-8k"
MODEL = ModelConfig(name="x", mixer="gdn", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_heads=1, vocab_size=8192)


def read(folder: str, paths: list[str]) -> tuple[list[list[int]], str]:
    torch.distributed.init_process_group("gloo")
    tokenizer = load_tokenizer(TOKENIZER_FOLDER)
    data: dict[str, Any] = {"sequence_length": 16, "tokenizer": "x", "cache_dir": folder}
    run = RunConfig(
        model=MODEL,
        data=DataConfig(blend=tuple(BlendEntry(path=path) for path in paths), **data),
        train=TrainConfig(iterations=4, global_batch_size=8),
        output_dir="x",
    )
    try:
        blend = build_datasets(run, tokenizer)["train"]
    except DataError as error:
        return [], str(error)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    stream = SampleStream(
        blend,
        micro_batch_size=2,
        microbatches=4 // size,
        data_rank=rank,
        data_size=size,
        eod=tokenizer.eod_id,
        vocab_size=8192,
    )
    rows = [row for _ in range(2) for batch in stream.next_batches() for row in batch["tokens"].tolist()]
    stream.close()
    return rows, ""


def test_two_ranks_read_what_one_reads(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER_FOLDER)
    paths = []
    for seed in (1, 2):
        paths.append(str(tmp_path / f"data{seed}"))
        with IndexedWriter(paths[-1], 8192) as writer:
            for tokens in np.random.default_rng(seed).integers(10, 8000, (50, 40)):
                writer.add(tokens, np.array([40]))
            writer.finish(tokenizer.describe(), 1)
    ((one, _),) = run_distributed(read, 1, str(tmp_path / "cache1"), paths)
    (left, _), (right, _) = run_distributed(read, 2, str(tmp_path / "cache2"), paths)
    pairs = zip(left[0::2], left[1::2], right[0::2], right[1::2], strict=True)
    assert [row for pair in pairs for row in pair] == one
    failures = run_distributed(read, 2, str(tmp_path / "cache3"), [str(tmp_path / "none")])
    assert [message.split(";")[0] for _, message in failures] == [
        f"dataset {tmp_path}/none: {tmp_path}/none.idx is missing"
    ] * 2


def build_for(seconds: float, life: float, beat: float) -> str:
    """What a rank gets from a rank 0 that works for so long, under a time limit of one second."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=1))

    def work() -> str:
        time.sleep(seconds)
        return "built"

    try:
        return first_rank_alone(work, "builds sample indices", DataError, beat=beat, life=life)
    except DataError as error:
        return f"{error} {error.rank_local}"


def fail() -> str:
    torch.distributed.init_process_group("gloo")

    def work() -> str:
        raise DataError("dataset x is damaged")

    try:
        return first_rank_alone(work, "builds sample indices", DataError)
    except DataError as error:
        return str(error)


def test_building_takes_as_long_as_it_takes() -> None:
    """No collective waits meanwhile; only a rank 0 that gives no sign of life ends the others."""
    assert run_distributed(build_for, 2, 3.0, 1.0, 0.2) == ["built"] * 2
    silent = "rank 0, which builds sample indices, did not report for 1 s True"
    assert run_distributed(build_for, 2, 4.0, 1.0, 60.0) == ["built", silent]
    assert run_distributed(fail, 2) == ["dataset x is damaged"] * 2


def read_other_copies(folder: str) -> str:
    """Each rank is the first of a node of its own, with its own copy of the data."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(f"{folder}/node{rank}")
    run = RunConfig(
        model=MODEL,
        data=DataConfig(
            blend=(BlendEntry(path="data"),), sequence_length=16, tokenizer="x", cache_dir=f"{folder}/cache"
        ),
        train=TrainConfig(iterations=4, global_batch_size=8),
        output_dir="x",
    )
    try:
        build_datasets(run, load_tokenizer(TOKENIZER_FOLDER))
    except DataError as error:
        return f"{error} {error.rank_local}"
    return ""


def leave_early() -> int:
    """Rank 0 has nothing more to do when the other one asks its store."""
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 0:
        return first_rank_alone(lambda: 7, "builds sample indices", DataError)
    time.sleep(0.5)
    return first_rank_alone(lambda: 0, "builds sample indices", DataError)


def test_a_first_rank_that_is_done_is_not_missed() -> None:
    assert run_distributed(leave_early, 2) == [7, 7]


def test_a_node_with_another_copy_of_the_data_is_noticed(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
        with IndexedWriter(tmp_path / f"node{rank}" / "data", 8192) as writer:
            for tokens in np.random.default_rng(rank).integers(10, 8000, (50, 40)):
                writer.add(tokens, np.array([40]))
            writer.finish(load_tokenizer(TOKENIZER_FOLDER).describe(), 1)
    first, second = run_distributed(read_other_copies, 2, str(tmp_path))
    assert first == ""
    assert "is not the one that rank 0 reads: its content is another; copy it again True" in second
