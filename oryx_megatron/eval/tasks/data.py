"""Loads the JSON lines beside this file for lm-eval; each function is named by a task's `custom_dataset`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def _rows(name: str) -> dict[str, Dataset]:
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def choices(**_: Any) -> dict[str, Dataset]:
    """Beginnings of Python statements with four continuations."""
    return _rows("choices.jsonl")


def texts(**_: Any) -> dict[str, Dataset]:
    """Short Python sources."""
    return _rows("texts.jsonl")


def copies(**_: Any) -> dict[str, Dataset]:
    """Assignments of which one is asked for again."""
    return _rows("copies.jsonl")
