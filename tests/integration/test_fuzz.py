"""Every file that is read, damaged: one line, or the same value. Never another value, a traceback or a hang.

`python -m pytest tests/integration/test_fuzz.py -m slow -s` prints the counts of docs/operations.md.
A new target: a function that writes a valid folder, one that reads it, and a line in TARGETS.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.testing.fuzz import Target, fuzz
from oryx_megatron.testing.project import tiny_project

QUICK = 60
SOAK = 500
"""Damaged variants over all targets in `make test` and in `make soak`."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project (tokenizer/, data.bin, data.idx, run.yaml) that targets copy their files from."""
    folder = tmp_path_factory.mktemp("project")
    tiny_project(folder)
    return folder


def copy_tokenizer(project: Path, folder: Path) -> None:
    shutil.copytree(project / "tokenizer", folder, dirs_exist_ok=True)


def read_tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    return tokenizer.describe(), tokenizer.encode("some words and 1234 é"), tokenizer.token_bytes().tolist()


TARGETS: list[tuple[Target, Callable[[Path, Path], None]]] = [
    (Target("tokenizer (SentencePiece)", read_tokenizer), copy_tokenizer),
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
