"""Every file that is read, damaged: one line, or the same value. Never another value, a traceback or a hang.

`python -m pytest tests/integration/test_fuzz.py -m slow -s` prints the counts of docs/operations.md.
A new target: a function that writes a valid folder, one that reads it, and a line in TARGETS.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_runs
import numpy as np
import pytest

from oryx_megatron.config import load_run
from oryx_megatron.data.indexed import IndexedWriter, bytes_per_token, open_dataset
from oryx_megatron.data.loader import Blend, build_datasets, check_resume
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.data.train_tokenizer import train_byte_level
from oryx_megatron.testing.fuzz import Target, fuzz
from oryx_megatron.testing.project import VOCABULARY, synthetic_texts, tiny_project

QUICK = 60
SOAK = 1000
"""Damaged variants over all targets in `make test` and in `make soak`."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project (tokenizer/, data.bin, data.idx, run.yaml) that targets copy their files from."""
    folder = tmp_path_factory.mktemp("project")
    tiny_project(folder)
    return folder


# Tokenizers


def copy_tokenizer(project: Path, folder: Path) -> None:
    shutil.copytree(project / "tokenizer", folder, dirs_exist_ok=True)


def train_byte_level_tokenizer(_: Path, folder: Path) -> None:
    train_byte_level(synthetic_texts(20), folder, 290, source="synthetic")


def read_tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    return tokenizer.describe(), tokenizer.encode("some words and 1234 é"), tokenizer.token_bytes().tolist()


# Datasets and sample caches: what a run reads of them


def foreign_dataset(project: Path, folder: Path) -> None:
    """A dataset of another tool, without manifest, and what a checkpoint knows of it."""
    shutil.copytree(project / "tokenizer", folder / "tokenizer")
    for name in ("run.yaml", "data.bin", "data.idx"):
        shutil.copy(project / name, folder)
    with contextlib.chdir(folder):
        (folder / "state.json").write_text(json.dumps({"consumed": 4, "identity": blends()["train"].identity}))
    shutil.rmtree(folder / "cache")


def own_dataset(project: Path, folder: Path) -> None:
    """A dataset with manifest."""
    foreign_dataset(project, folder)
    made = open_dataset(folder / "data")
    with IndexedWriter(folder / "own", VOCABULARY) as writer:
        for number in range(made.documents):
            writer.add(made.document(number), np.array([len(made.document(number))]))
        writer.finish(load_tokenizer(folder / "tokenizer").describe(), 1000, append_eod=True)
    for end in ("bin", "idx"):
        (folder / f"data.{end}").unlink()
    for end in ("bin", "idx", "json"):
        (folder / f"own.{end}").rename(folder / f"data.{end}")
    (folder / "state.json").unlink()


def sample_cache(project: Path, folder: Path) -> None:
    """Sample indices and the order of a blend of two."""
    own_dataset(project, folder)
    for end in ("bin", "idx"):
        shutil.copy(project / f"data.{end}", folder / f"other.{end}")
    tokens = np.fromfile(folder / "other.bin", np.uint16)
    np.roll(tokens, 1000).tofile(folder / "other.bin")
    with contextlib.chdir(folder):
        blends("data", "other")


def blends(*names: str) -> dict[str, Blend]:
    """Of the project in the working folder; relative paths are part of what a cache is known by."""
    paths = ", ".join(names or ("data",))
    fields = [f"data.blend=[{paths}]", "data.tokenizer=tokenizer", "data.cache_dir=cache"]
    run = load_run("run.yaml", fields)
    return build_datasets(run, load_tokenizer("tokenizer"), {"train": 24, "valid": 4})


def samples(found: dict[str, Blend]) -> Any:
    return {name: [blend[i]["tokens"].tolist() for i in range(len(blend))] for name, blend in found.items()}


def read_dataset(folder: Path) -> Any:
    os.chdir(folder)
    found = blends()
    if (folder / "state.json").exists():
        check_resume(json.loads((folder / "state.json").read_text()), found["train"])
        return samples(found)
    return samples(found), bytes_per_token("data")


def read_cache(folder: Path) -> Any:
    os.chdir(folder)
    return samples(blends("data", "other"))


TARGETS: list[tuple[Target, Callable[[Path, Path], None]]] = [
    (Target("tokenizer, SentencePiece", read_tokenizer), copy_tokenizer),
    (Target("tokenizer, Hugging Face", read_tokenizer), train_byte_level_tokenizer),
    (Target("dataset", read_dataset, ["data.*"]), own_dataset),
    (Target("dataset without manifest", read_dataset, ["data.*"]), foreign_dataset),
    (Target("sample cache", read_cache, ["cache/**/*"]), sample_cache),
    *fuzz_runs.TARGETS,
]
"""Each with what writes its valid folder, given a tiny project's folder and an empty one."""


@pytest.mark.parametrize("way", [pytest.param("quick"), pytest.param("soak", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("target", "make"), TARGETS, ids=[target.name for target, _ in TARGETS])
def test_damage_counts(
    target: Target, make: Callable[[Path, Path], None], way: str, project: Path, tmp_path: Path
) -> None:
    variants = -(-(QUICK if way == "quick" else SOAK) // len(TARGETS))
    folder = tmp_path / "valid"
    folder.mkdir()
    make(project, folder)
    report = fuzz(target, folder, variants)
    print(f"\n{report}")
    assert report.variants == variants
    assert not report.failures, "\n".join(report.failures)
