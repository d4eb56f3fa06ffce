"""Datasets on object storage: the same samples, checks and identity as of files, and no more copied than is read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from oryx_megatron import storage
from oryx_megatron.config.schema import BlendEntry, DataConfig, ModelConfig, RunConfig, TrainConfig
from oryx_megatron.data import indexed, places
from oryx_megatron.data.datasets import compare, document_lengths, merge, split, verify
from oryx_megatron.data.indexed import IndexedWriter, bytes_per_token, open_dataset
from oryx_megatron.data.loader import build_datasets, check_resume
from oryx_megatron.data.places import LocalPlace, StoredPlace, place_of
from oryx_megatron.data.stream import SampleStream
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import DataError
from oryx_megatron.storage import Remote

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "tokenizers" / "stdlib-8k")
EOD = TOKENIZER.eod_id
MODEL = ModelConfig(name="x", mixer="gdn", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_heads=1, vocab_size=8192)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_held", {})
    yield tmp_path / "cache"
    for descriptor in storage._held.values():
        os.close(descriptor)


@pytest.fixture
def local(tmp_path: Path) -> list[str]:
    """Two datasets of documents that end with EOD."""
    prefixes = []
    for seed in (1, 2):
        draw = np.random.default_rng(seed)
        prefixes.append(str(tmp_path / f"data{seed}"))
        with IndexedWriter(prefixes[-1], TOKENIZER.vocab_size) as writer:
            for _ in range(80):
                tokens = np.append(draw.integers(1000 * seed, 1000 * seed + 900, draw.integers(1, 60)), EOD)
                writer.add(tokens, np.array([len(tokens)]))
            writer.finish(TOKENIZER.describe(), 1000, append_eod=True)
    return prefixes


def put(prefix: str, url: str, *ends: str) -> str:
    for end in ends or ("bin", "idx", "json"):
        Remote(f"{url}.{end}").upload(Path(f"{prefix}.{end}"))
    return url


@pytest.fixture
def stored(local: list[str], tmp_path: Path) -> list[str]:
    return [put(prefix, f"memory://{tmp_path.name}-{os.getpid()}/x/{Path(prefix).name}") for prefix in local]


def config(paths: list[str], documents: str = "joined", cache_dir: str | None = None) -> RunConfig:
    return RunConfig(
        model=MODEL,
        data=DataConfig(
            blend=tuple(BlendEntry(path=path, weight=i + 1) for i, path in enumerate(paths)),
            sequence_length=16,
            tokenizer="x",
            documents=documents,  # type: ignore[arg-type]
            cache_dir=cache_dir,
        ),
        train=TrainConfig(iterations=20, global_batch_size=8),
        output_dir="x",
    )


def batches(run: RunConfig, workers: int) -> list[list[int]]:
    stream = SampleStream(
        build_datasets(run, TOKENIZER)["train"],
        micro_batch_size=4,
        microbatches=2,
        isolated=run.data.documents == "isolated",
        eod=EOD,
        vocab_size=8192,
        num_workers=workers,
    )
    rows = [row for _ in range(20) for batch in stream.next_batches() for row in batch["tokens"].tolist()]
    stream.close()
    return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_samples(local: list[str], stored: list[str], cache: Path, workers: int) -> None:
    run, there = config(local, "isolated"), config(stored, "isolated")
    assert batches(there, workers) == batches(run, workers)
    assert len(list((cache / "datasets").glob("*/*.idx"))) == 2
    assert not list(cache.rglob("*.bin"))
    ours, theirs = (build_datasets(r, TOKENIZER)["train"] for r in (run, there))
    check_resume({"consumed": 8, "identity": ours.identity}, theirs)  # they are the same data


def test_a_stored_dataset_is_the_local_one(local: list[str], stored: list[str], tmp_path: Path) -> None:
    here, there = open_dataset(local[0], vocab_size=8192), open_dataset(stored[0], vocab_size=8192)
    assert isinstance(place_of(local[0]), LocalPlace)
    assert isinstance(place_of(stored[0]), StoredPlace)
    assert there.identity() == here.identity()
    assert (there.documents, there.tokens, there.digests) == (here.documents, here.tokens, here.digests)
    assert {**there.record(), "written": 0} == {**here.record(), "written": 0}
    np.testing.assert_array_equal(document_lengths(there), document_lengths(here))
    data, expected = there.data(), here.data()
    assert len(data) == len(expected)
    for where in (0, -1, 7, slice(3, 9), slice(-5, None), slice(2, 20, 3), slice(None, None, -7), slice(9, 3)):
        np.testing.assert_array_equal(data[where], expected[where])
    for numbers in (np.array([5, 3, 5, 0]), np.arange(len(data))[::-3], np.array([], int)):
        np.testing.assert_array_equal(data[numbers], expected[numbers])
    for number in (0, 40, 79):
        np.testing.assert_array_equal(there.document(number), here.document(number))
    assert there.ends(EOD) == here.ends(EOD)
    assert there.holds(EOD)
    assert bytes_per_token(stored[0]) == bytes_per_token(local[0])
    assert compare(stored[0], local[0]) == []
    assert verify(stored[0]).problems == ()
    merge(stored, tmp_path / "merged")
    merge(local, tmp_path / "expected")
    assert (tmp_path / "merged.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()
    assert set(split(stored[0], {"a": 1, "b": 1}, tmp_path / "parts")) == {"a", "b"}
    with pytest.raises(DataError, match="is given twice"):
        merge([stored[0], stored[0]], tmp_path / "twice")
    read = place_of(stored[0]).megatron()
    again = pickle.loads(pickle.dumps(read))
    mapped = place_of(local[0]).megatron()  # what it gives is unmapped when it goes
    np.testing.assert_array_equal(again[3], mapped[3])
    np.testing.assert_array_equal(read.get(3, offset=1, length=2), here.document(3)[1:3])


def test_a_long_file_is_known_by_samples(local: list[str], stored: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "WHOLE", 100)
    monkeypatch.setattr(indexed, "SAMPLE", 16)
    assert open_dataset(stored[0], content=False).digests == open_dataset(local[0], content=False).digests
    many = open_dataset(stored[0], content=False).data()
    monkeypatch.setattr(places, "BLOCK", 64)  # numbers of many blocks: one small read each
    numbers = np.arange(0, len(many), 50)
    np.testing.assert_array_equal(many[numbers], open_dataset(local[0], content=False).data()[numbers])


def test_a_dataset_written_again_is_another_one(local: list[str], stored: list[str]) -> None:
    """A dataset that was written again is another one, though its name and copies are there."""
    before = open_dataset(stored[0])
    put(local[1], stored[0])
    after = open_dataset(stored[0])
    assert after.identity() != before.identity()
    np.testing.assert_array_equal(after.document(5), open_dataset(local[1]).document(5))
    run = config([local[0]])
    state = {"consumed": 8, "identity": build_datasets(run, TOKENIZER)["train"].identity}
    with pytest.raises(DataError, match="is not the checkpoint's"):
        check_resume(state, build_datasets(config([stored[0]]), TOKENIZER)["train"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda url: Remote(f"{url}.bin").remove(), "dataset {0}: {0}.bin is missing; make it with"),
        (lambda url: Remote(f"{url}.idx").remove(), "dataset {0}: {0}.idx is missing; make it with"),
        (lambda url: Remote(f"{url}.bin").write(b"x"), "{0}.bin is truncated: 1 bytes, not "),
        (lambda url: Remote(f"{url}.idx").write(b"x"), "{0}.idx is not a megatron-core index"),
        (lambda url: Remote(f"{url}.json").write(b"x"), "is not valid JSON"),
        (
            lambda url: Remote(f"{url}.bin").write(bytes(len(Remote(f"{url}.bin").read() or b""))),
            "{0}.bin is not the file that {0}.json describes",
        ),
    ],
)
def test_a_damaged_dataset_is_refused_with_the_file_at_fault(stored: list[str], damage: object, said: str) -> None:
    damage(stored[0])  # type: ignore[operator]
    with pytest.raises(DataError) as error:
        open_dataset(stored[0])
    assert said.format(stored[0]) in str(error.value)
    with pytest.raises(DataError):
        build_datasets(config(stored), TOKENIZER)


def test_what_is_not_stored_is_named() -> None:
    for url, said in (
        ("foo://b/x", "dataset foo://b/x: foo://b/x.bin: foo:// is no storage that fsspec knows"),
        ("memory://none/x", "dataset memory://none/x: memory://none/x.idx is missing"),
        ("memory://none/x.bin", "give the prefix without ending"),
    ):
        with pytest.raises(DataError) as error:
            open_dataset(url)
        assert said in str(error.value)


def test_without_a_manifest(local: list[str], tmp_path: Path) -> None:
    url = put(local[0], f"memory://{tmp_path.name}-{os.getpid()}/bare", "bin", "idx")
    dataset = open_dataset(url, vocab_size=8192)
    assert dataset.manifest is None
    assert dataset.identity().startswith("content-")
    with pytest.raises(DataError, match="holds token"):
        open_dataset(url, vocab_size=1500)
    with pytest.raises(DataError, match=f"{url}.json is missing"):
        bytes_per_token(url)
    assert json.loads((dataset.place.folder / places.VERSIONS).read_text()).keys() == {"idx"}
