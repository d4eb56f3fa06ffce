"""Blends, stages, caches and the stream of microbatches."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from oryx_megatron.config.schema import (
    BlendEntry,
    DataConfig,
    DataStage,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from oryx_megatron.data import cache, loader
from oryx_megatron.data.indexed import IndexedWriter
from oryx_megatron.data.loader import Blend, build_datasets, check_resume
from oryx_megatron.data.stream import SampleStream, document_starts
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import DataError

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "tokenizers" / "stdlib-8k")
EOD = TOKENIZER.eod_id
MODEL = ModelConfig(name="x", mixer="gdn", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_heads=1, vocab_size=8192)
SEQUENCE = 16


def dataset(prefix: Path, low: int, high: int, documents: int = 60, *, eod: bool = True) -> str:
    """Documents of 10 to 49 tokens drawn from [low, high), each ended by EOD."""
    draw = np.random.default_rng(low)
    with IndexedWriter(prefix, TOKENIZER.vocab_size) as writer:
        for _ in range(documents):
            tokens = draw.integers(low, high, draw.integers(9, 49))
            tokens = np.append(tokens, EOD) if eod else tokens
            writer.add(tokens, np.array([len(tokens)]))
        writer.finish(TOKENIZER.describe(), 100, append_eod=eod)
    return str(prefix)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    ranges = {"a": (1000, 2000), "b": (2000, 3000), "c": (3000, 4000)}
    return {name: dataset(folder / name, *bounds) for name, bounds in ranges.items()}


def config(blend: tuple[BlendEntry, ...], tmp_path: Path, **data: Any) -> RunConfig:
    fields: dict[str, Any] = {"sequence_length": SEQUENCE, "tokenizer": "x", "cache_dir": str(tmp_path / "cache")}
    return RunConfig(
        model=MODEL,
        data=DataConfig(blend=blend, **(fields | data)),
        train=TrainConfig(iterations=20, global_batch_size=8),
        output_dir="x",
    )


def samples(blend: Blend, count: int | None = None) -> list[list[int]]:
    return [blend[i]["tokens"].tolist() for i in range(count or len(blend))]


def test_one_dataset_is_megatron_cores_own_order(paths: dict[str, str], tmp_path: Path) -> None:
    run = config((BlendEntry(path=paths["a"]),), tmp_path)
    ours = build_datasets(run, TOKENIZER, {"train": 160, "valid": 16})
    theirs = BlendedMegatronDatasetBuilder(
        GPTDataset,
        [160, 16, 0],
        lambda: True,
        GPTDatasetConfig(
            random_seed=run.seed,
            sequence_length=SEQUENCE,
            blend=([paths["a"]], None),
            split="98,2,0",
            path_to_cache=str(tmp_path / "theirs"),
            tokenizer=TOKENIZER,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        ),
    ).build()
    for name, reference in zip(("train", "valid"), theirs, strict=False):
        assert samples(ours[name]) == [reference[i]["tokens"].tolist() for i in range(len(ours[name]))]
        assert ours[name][3]["labels"].tolist() == reference[3]["labels"].tolist()
    assert ours["train"].parts[0].epochs > 1


def test_weights_decide_the_share(paths: dict[str, str], tmp_path: Path) -> None:
    run = config((BlendEntry(path=paths["a"], weight=3), BlendEntry(path=paths["b"], weight=1)), tmp_path)
    blend = build_datasets(run, TOKENIZER)["train"]
    assert [part.samples for part in blend.parts] == [120, 40]
    first = [max(row) // 1000 for row in samples(blend)]
    assert first.count(1) == 120
    assert first.count(2) == 40
    assert first[:40].count(2) == 10  # evenly spread, not in blocks


def test_stages_continue_each_dataset(paths: dict[str, str], tmp_path: Path) -> None:
    a, b, c = (BlendEntry(path=paths[name]) for name in "abc")
    stages = (DataStage(start=5, blend=(c, b)), DataStage(start=15, blend=(a,)))
    staged = build_datasets(config((a, b), tmp_path, stages=stages), TOKENIZER)["train"]
    kinds = [max(row) // 1000 for row in samples(staged)]
    assert {kind: kinds[:40].count(kind) for kind in (1, 2, 3)} == {1: 20, 2: 20, 3: 0}
    assert {kind: kinds[40:120].count(kind) for kind in (1, 2, 3)} == {1: 0, 2: 40, 3: 40}
    assert set(kinds[120:]) == {1}
    # Dataset a is left at its 20th sample and continues there: it is read as one stream over the stages.
    assert staged.order is not None
    from_a = staged.order[1][np.asarray(staged.order[0]) == 0]
    assert from_a.tolist() == list(range(60))


def test_named_validation_sets_are_used_whole(paths: dict[str, str], tmp_path: Path) -> None:
    validation = {"other": (BlendEntry(path=paths["b"]),)}
    run = config((BlendEntry(path=paths["a"]),), tmp_path, validation=validation)
    blends = build_datasets(run, TOKENIZER)
    assert set(blends) == {"train", "valid", "other"}
    assert len(blends["other"]) == run.evaluation.batches * 8
    assert all(max(row) >= 2000 for row in samples(blends["other"]))
    assert all(max(row) < 2000 for row in samples(blends["valid"]))


def test_train_and_validation_share_no_document(paths: dict[str, str], tmp_path: Path) -> None:
    blends = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path, split=(50, 50, 0)), TOKENIZER)
    train, valid = blends["train"].datasets[0], blends["valid"].datasets[0]
    assert set(train.indices.tolist()).isdisjoint(valid.indices.tolist())
    assert len(train.indices) + len(valid.indices) == 60


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_order_does_not_depend_on_the_layout(
    paths: dict[str, str], tmp_path: Path, ranks: int, workers: int
) -> None:
    blend = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER)["train"]
    streams = [
        SampleStream(
            blend,
            micro_batch_size=2,
            microbatches=4 // ranks,
            data_rank=rank,
            data_size=ranks,
            consumed=8,
            eod=EOD,
            vocab_size=8192,
            num_workers=workers,
        )
        for rank in range(ranks)
    ]
    seen: list[list[int]] = []
    for _ in range(2):
        steps = [stream.next_batches() for stream in streams]
        for microbatch in range(4 // ranks):
            for step in steps:
                seen += step[microbatch]["tokens"].tolist()
    assert seen == samples(blend)[8:24]
    assert [stream.consumed for stream in streams] == [24] * ranks
    for stream in streams:
        stream.close()


def test_loader_processes_are_forked_before_the_stream_is_there(paths: dict[str, str], tmp_path: Path) -> None:
    """Forked later, beside a subprocess of the trainer, they would keep its pipe open and the trainer waiting."""
    blend = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER)["train"]
    before = set(multiprocessing.active_children())
    stream = SampleStream(blend, micro_batch_size=2, microbatches=4, eod=EOD, vocab_size=8192, num_workers=2)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()


def test_a_resumed_stream_continues_where_it_stopped(paths: dict[str, str], tmp_path: Path) -> None:
    blend = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER)["train"]
    settings: dict[str, Any] = {"micro_batch_size": 2, "microbatches": 4, "eod": EOD, "vocab_size": 8192}
    whole = SampleStream(blend, **settings)
    steps = [whole.next_batches() for _ in range(4)]
    state = json.loads(json.dumps(whole.state()))
    assert state["consumed"] == 32
    resumed = SampleStream(blend, consumed=16, **settings)
    for expected in steps[2:]:
        for ours, theirs in zip(resumed.next_batches(), expected, strict=True):
            for field in ("tokens", "labels", "loss_mask"):
                assert torch.equal(ours[field], theirs[field])  # type: ignore[literal-required]
    assert whole.wait_seconds > 0
    for stream in (whole, resumed):
        stream.close()
        assert not stream._thread.is_alive()


def test_the_end_of_the_data_is_an_error_line(paths: dict[str, str], tmp_path: Path) -> None:
    blend = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER, {"train": 20})["train"]
    stream = SampleStream(blend, micro_batch_size=8, microbatches=1, eod=EOD, vocab_size=8192)
    stream.next_batches()
    stream.next_batches()
    for _ in range(2):
        with pytest.raises(DataError, match="train data is used up: 20 samples, 16 consumed, 8 wanted"):
            stream.next_batches()


def test_tokens_are_checked_while_reading(paths: dict[str, str], tmp_path: Path) -> None:
    blend = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER)["train"]
    stream = SampleStream(blend, micro_batch_size=8, microbatches=1, eod=EOD, vocab_size=1500)
    with pytest.raises(DataError, match=r"train data holds token 1\d\d\d, outside the vocabulary of 1500"):
        stream.next_batches()


@pytest.mark.parametrize("vocabulary", [1500, 8192])
def test_loader_processes_fail_in_one_line(paths: dict[str, str], tmp_path: Path, vocabulary: int) -> None:
    """An error in one of them reads as without them; one that is killed, as when memory runs out, is named."""
    blend = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER, {"train": 10**5})["train"]
    before = set(multiprocessing.active_children())
    stream = SampleStream(blend, micro_batch_size=2, microbatches=1, eod=EOD, vocab_size=vocabulary, num_workers=2)
    if vocabulary == 8192:
        stream.next_batches()
        (set(multiprocessing.active_children()) - before).pop().kill()
        expected = r"^a loader process was killed by SIGKILL \(memory used up\?\); rerun to resume, with fewer"
    else:
        expected = r"^train data holds token 1\d\d\d, outside the vocabulary of 1500$"
    with pytest.raises(DataError, match=expected) as error:
        collections.deque((stream.next_batches() for _ in range(10**5)), maxlen=0)
    assert "\n" not in str(error.value)
    stream.close()


def test_labels_are_the_tokens_after(paths: dict[str, str], tmp_path: Path) -> None:
    """In a row, and at its end: there it is the token that follows in the document."""
    blend = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER, {"train": 64})["train"]
    stream = SampleStream(blend, micro_batch_size=64, microbatches=1, eod=EOD, vocab_size=8192)
    (batch,) = stream.next_batches()
    stream.close()
    indexed = blend.datasets[0].dataset
    followed = {pair for i in range(len(indexed)) for pair in itertools.pairwise(indexed[i].tolist())}
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        assert labels[:-1] == tokens[1:]
        assert tokens[-1] == EOD or (tokens[-1], labels[-1]) in followed


def test_isolated_documents(paths: dict[str, str], tmp_path: Path) -> None:
    blend = build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER)["train"]
    stream = SampleStream(blend, micro_batch_size=8, microbatches=1, eod=EOD, vocab_size=8192, isolated=True)
    (batch,) = stream.next_batches()
    stream.close()
    assert batch["documents"] is not None
    for row in range(8):
        tokens, starts = batch["tokens"][row].tolist(), batch["documents"][row].tolist()
        expected = [0, *(i + 1 for i, token in enumerate(tokens) if token == EOD and i + 1 < SEQUENCE), SEQUENCE]
        assert starts == expected
        assert batch["documents"][row].dtype == torch.int32
        assert batch["loss_mask"][row].tolist() == [float(token != EOD) for token in tokens]
        assert batch["labels"][row, :-1].tolist() == tokens[1:]
    assert any(len(starts) > 2 for starts in batch["documents"])


def test_document_starts_at_the_edges() -> None:
    row = torch.tensor([EOD, 5, EOD, EOD, 7, EOD])
    assert document_starts(row, EOD).tolist() == [0, 1, 3, 4, 6]
    assert document_starts(torch.tensor([5, 5]), EOD).tolist() == [0, 2]


def test_a_rewritten_dataset_does_not_meet_its_old_cache(tmp_path: Path) -> None:
    path = dataset(tmp_path / "d", 1000, 2000)
    run = config((BlendEntry(path=path),), tmp_path)
    before = samples(build_datasets(run, TOKENIZER)["train"], 8)
    for end in ("bin", "idx", "json"):
        (tmp_path / f"d.{end}").unlink()
    dataset(tmp_path / "d", 2000, 3000, documents=30)
    after = build_datasets(run, TOKENIZER)["train"]
    assert samples(after, 8) != before
    assert all(min(set(row) - {EOD}) >= 2000 for row in samples(after))


def test_a_damaged_cache_is_built_again(
    paths: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config((BlendEntry(path=paths["a"]),), tmp_path)
    expected = samples(build_datasets(run, TOKENIZER)["train"])
    (folder,) = {path.parent for path in (tmp_path / "cache").rglob("*train-shuffle_index.npy")}
    file = next(folder.glob("*sample_index.npy"))
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert samples(build_datasets(run, TOKENIZER)["train"]) == expected
    assert "rebuilding the damaged sample index" in caplog.text


def test_errors_name_the_cause(paths: dict[str, str], tmp_path: Path) -> None:
    entry = BlendEntry(path=paths["a"])
    small = dataclasses.replace(config((entry,), tmp_path), model=dataclasses.replace(MODEL, vocab_size=8000))
    unmarked = dataset(tmp_path / "unmarked", 1000, 2000, eod=False)
    tiny = dataset(tmp_path / "tiny", 1000, 2000, documents=3)
    cases = [
        (small, "tokenizer stdlib-8k has 8192 tokens, model.vocab_size is 8000"),
        (config((), tmp_path), "data.blend is empty"),
        (config((BlendEntry(path=str(tmp_path / "none")),), tmp_path), r"none\.idx is missing"),
        (config((BlendEntry(path=tiny),), tmp_path), "its valid part is empty .0 of 3 documents."),
        (config((BlendEntry(path=unmarked),), tmp_path, documents="isolated"), "without end-of-document tokens"),
        (config((entry, BlendEntry(path=paths["b"], weight=0)), tmp_path), "it must be above 0"),
    ]
    for run, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            build_datasets(run, TOKENIZER)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no dataset is called 'held'; known: train, valid, test"):
        build_datasets(config((entry,), tmp_path), TOKENIZER, {"held": 8})


def test_resume_is_checked(paths: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = BlendEntry(path=paths["a"]), BlendEntry(path=paths["b"])
    first = build_datasets(config((a,), tmp_path), TOKENIZER)["train"]
    state = json.loads(json.dumps({"consumed": 80, "identity": first.identity}))
    check_resume(state, first)
    later = config((a,), tmp_path, stages=(DataStage(start=10, blend=(b,)),))
    with caplog.at_level(logging.WARNING):
        check_resume(state, build_datasets(later, TOKENIZER)["train"])
    assert "the run's length changed" in caplog.text  # dataset a was meant to be read more than once
    earlier = config((a,), tmp_path, stages=(DataStage(start=9, blend=(b,)),))
    with pytest.raises(DataError, match="the train blend of the first 80 samples is not the checkpoint's"):
        check_resume(state, build_datasets(earlier, TOKENIZER)["train"])
    with pytest.raises(DataError, match="had sequence_length 16, now it is 8"):
        check_resume(state, build_datasets(config((a,), tmp_path, sequence_length=8), TOKENIZER)["train"])


def test_order_files_are_made_once(paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config((BlendEntry(path=paths["a"]), BlendEntry(path=paths["b"])), tmp_path)
    expected = samples(build_datasets(run, TOKENIZER)["train"])

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(loader, "_write_order", never)
    assert samples(build_datasets(run, TOKENIZER)["train"]) == expected


# Sample caches


def cached(tmp_path: Path) -> dict[str, Path]:
    """The files of the one cache of samples, by what megatron-core calls them."""
    return {path.stem.rpartition("-")[2]: path for path in (tmp_path / "cache" / "samples").rglob("*-train-*.npy")}


@pytest.mark.parametrize("name", ["shuffle_index", "sample_index", "document_index", "dataset", "sample"])
def test_a_cache_damaged_at_equal_size_is_built_again(
    paths: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    blend = (BlendEntry(path=paths["a"]), BlendEntry(path=paths["b"])) if name in ("dataset", "sample") else ()
    run = config(blend or (BlendEntry(path=paths["a"]),), tmp_path)
    expected = samples(build_datasets(run, TOKENIZER)["train"])
    file = cached(tmp_path).get(name) or next((tmp_path / "cache" / "blends").rglob(f"{name}.npy"))
    raw = bytearray(file.read_bytes())
    raw[-len(raw) // 3 :] = bytes(len(raw) - len(raw) * 2 // 3)
    file.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        assert samples(build_datasets(run, TOKENIZER)["train"]) == expected
    assert "rebuilding the damaged sample index in" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": {}}', '{"files": []}', '{"files": {"x": 3}}', '{"files": 1}']
)
def test_a_damaged_manifest_of_a_cache_is_built_again(paths: dict[str, str], tmp_path: Path, text: str) -> None:
    run = config((BlendEntry(path=paths["a"]),), tmp_path)
    expected = samples(build_datasets(run, TOKENIZER)["train"])
    manifest = cached(tmp_path)["shuffle_index"].with_name("complete.json")
    manifest.write_text(text)
    assert samples(build_datasets(run, TOKENIZER)["train"]) == expected
    assert json.loads(manifest.read_text())["files"]


def test_something_else_in_the_place_of_a_cache_is_replaced(paths: dict[str, str], tmp_path: Path) -> None:
    run = config((BlendEntry(path=paths["a"]),), tmp_path)
    expected = samples(build_datasets(run, TOKENIZER)["train"])
    folder = cached(tmp_path)["shuffle_index"].parent
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "elsewhere")
    assert samples(build_datasets(run, TOKENIZER)["train"]) == expected
    assert (tmp_path / "moved" / "complete.json").is_file()


def build_in_a_job(run: RunConfig, ready: Any, answers: Any) -> None:
    ready.wait()
    answers.put(samples(build_datasets(run, TOKENIZER)["train"]))


@pytest.mark.parametrize("locks", [True, False])
def test_jobs_that_start_together_share_one_cache(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """With a damaged cache in place; also where the file system has no locks."""
    run = config((BlendEntry(path=paths["a"]), BlendEntry(path=paths["b"])), tmp_path)
    expected = samples(build_datasets(run, TOKENIZER)["train"])
    for file in (tmp_path / "cache").rglob("*.npy"):
        file.write_bytes(bytes(file.stat().st_size))
    if not locks:
        monkeypatch.setattr(cache.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "no locks")))
    context = multiprocessing.get_context("fork")
    ready, answers = context.Barrier(4), context.Queue()
    jobs = [context.Process(target=build_in_a_job, args=(run, ready, answers)) for _ in range(4)]
    for job in jobs:
        job.start()
    assert [answers.get(timeout=60) for _ in jobs] == [expected] * 4
    for job in jobs:
        job.join()
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("rank", "local", "shared", "builds"),
    [
        (None, 0, True, True),
        (0, 0, True, True),
        (0, 0, False, True),
        (2, 0, True, False),  # the first of its machine, but the folder is everyone's
        (2, 0, False, True),
        (3, 1, False, False),
    ],
)
def test_who_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int | None, local: int, shared: bool, builds: bool
) -> None:
    """By rank in the job, whatever the layout; on folders of each machine by rank on it. megatron-core sees rank 0."""
    monkeypatch.setattr(cache, "VISIBLE", 0.0)
    monkeypatch.setattr(cache, "LIFE", 0.0)
    if rank is not None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
        for name, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))

    def build(folder: Path) -> None:
        assert rank is None or torch.distributed.get_rank() == 0
        np.save(folder / "made.npy", np.arange(3))

    if not builds:
        why = r"made by rank 0, is not visible here: data\.cache_dir" if shared else "the first rank of this machine"
        with pytest.raises(DataError, match=why):
            cache.cached(tmp_path, {"a": 1}, build, shared=shared)
        assert not list(tmp_path.iterdir())
        return
    folder = cache.cached(tmp_path, {"a": 1}, build, shared=shared)
    assert np.load(folder / "made.npy").tolist() == [0, 1, 2]
    assert rank is None or torch.distributed.get_rank() == rank


def test_what_a_killed_job_left_is_cleared_after_a_day(paths: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "cache" / "samples"
    for name, age in (("old", 90000), ("new", 60)):
        folder = root / f".{name}.tmp"
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age,) * 2)
    build_datasets(config((BlendEntry(path=paths["a"]),), tmp_path), TOKENIZER)
    assert [path.name for path in root.glob("*.tmp")] == [".new.tmp"]


# Evaluation


def test_an_evaluation_reads_nothing_twice(
    paths: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """evaluation.batches beyond the validation part: all of it once, the last batch filled up without loss."""
    run = config((BlendEntry(path=paths["a"]),), tmp_path, split=(90, 10, 0))
    with caplog.at_level(logging.WARNING):
        valid = build_datasets(run, TOKENIZER, {"valid": 640}, once=True)["valid"]
    whole = (int(valid.datasets[0].dataset.sequence_lengths[54:].sum()) - 1) // SEQUENCE
    assert f"valid: evaluation reads {whole} samples, not the 640 that evaluation.batches asks for" in caplog.text
    assert valid.counted == whole
    assert len(valid) == -(-whole // 8) * 8
    counted = [valid[i] for i in range(len(valid)) if valid[i]["loss_mask"].any()]
    assert len(counted) == whole
    assert len({tuple(sample["tokens"].tolist()) for sample in counted}) == whole
    stream = SampleStream(valid, micro_batch_size=8, microbatches=1, eod=EOD, vocab_size=8192)
    mask = torch.cat([stream.next_batches()[0]["loss_mask"] for _ in range(len(valid) // 8)])
    stream.close()
    assert int(mask.sum()) == whole * SEQUENCE


def test_evaluations_of_the_whole_set(paths: dict[str, str], tmp_path: Path) -> None:
    """evaluation.batches null: every sample of every dataset once, the last ones too, which fill no batch."""
    validation = {"mixed": (BlendEntry(path=paths["a"]), BlendEntry(path=paths["b"], weight=7))}
    run = config((BlendEntry(path=paths["a"]),), tmp_path, split=(90, 10, 0), validation=validation)
    for size in (8, 7, 1000):
        run = dataclasses.replace(
            run,
            train=dataclasses.replace(run.train, global_batch_size=size),
            evaluation=EvaluationConfig(batches=None),
        )
        blends = build_datasets(run, TOKENIZER)
        for name, first in (("valid", 54), ("mixed", 0)):
            blend = blends[name]
            tokens = [int(part.dataset.sequence_lengths[first:].sum()) for part in blend.datasets]
            whole = sum((count - 1) // SEQUENCE for count in tokens)
            counted = [sample for sample in map(blend.__getitem__, range(len(blend))) if sample["loss_mask"].any()]
            assert len({tuple(sample["tokens"].tolist()) for sample in counted}) == len(counted) == whole
            assert len(blend) == -(-whole // size) * size  # whole batches, which is what an evaluation reads


def test_an_evaluation_of_a_blend_reads_nothing_twice(
    paths: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = dataset(tmp_path / "small", 5000, 6000, documents=4)
    validation = {"mixed": (BlendEntry(path=paths["b"], weight=1), BlendEntry(path=small, weight=1))}
    run = config((BlendEntry(path=paths["a"]),), tmp_path, validation=validation)
    with caplog.at_level(logging.WARNING):
        mixed = build_datasets(run, TOKENIZER, {"mixed": 160}, once=True)["mixed"]
    once = (sum(map(int, mixed.datasets[1].dataset.sequence_lengths)) - 1) // SEQUENCE
    assert f"evaluation reads {80 + once} samples, not the 160" in caplog.text
    assert f": {small} hold no more" in caplog.text
    rows = [tuple(row) for row in samples(mixed, mixed.counted)]
    assert len(set(rows)) == len(rows) == 80 + once
    kinds = [max(row) // 1000 for row in rows]
    assert kinds.count(5) == once
    assert kinds[: 2 * once].count(5) == once  # as the weights say, while there are some


def test_a_validation_part_below_one_sample_is_one_sample(
    paths: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config((BlendEntry(path=paths["a"]),), tmp_path, sequence_length=512)
    with caplog.at_level(logging.WARNING):
        valid = build_datasets(run, TOKENIZER)["valid"]
    assert "valid: evaluation reads 1 samples, not the 64" in caplog.text
    assert (valid.counted, len(valid)) == (1, 8)


# Many datasets


def open_many(folder: str, count: int, limits: tuple[int, int], answers: Any) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    blend = tuple(BlendEntry(path=f"{folder}/d{i}") for i in range(count))
    try:
        build_datasets(config(blend, Path(folder)), TOKENIZER, {"train": 160, "valid": 40})
        answers.put("built")
    except DataError as error:
        answers.put(str(error))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(40):
        dataset(folder / f"d{number}", 1000 + number, 1100 + number, documents=50)
    return folder


@pytest.mark.parametrize(("limits", "answer"), [((64, 4096), "built"), ((64, 64), "too many open files")])
def test_the_limit_of_open_files(many: Path, limits: tuple[int, int], answer: str) -> None:
    """The soft limit is raised; the hard one is named, not data.cache_dir."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    job = context.Process(target=open_many, args=(str(many), 40, limits, answers))
    job.start()
    found = answers.get(timeout=120)
    job.join()
    assert found.startswith(answer)
    assert "cache_dir" not in found
    assert "\n" not in found
