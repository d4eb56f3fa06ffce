"""Training and checkpoints under two versions of megatron-core, each with its own Python: bit-equal.

ORYX_OTHER_PYTHON names the Python of an environment with the other version (`.ci/run` does).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oryx_megatron.testing.project import tiny_project

OTHER = os.environ.get("ORYX_OTHER_PYTHON", "")
pytestmark = pytest.mark.skipif(not OTHER, reason="ORYX_OTHER_PYTHON names no second environment")
BF16 = ("precision.dtype=bf16", "train.iterations=10", "train.exit_after=5")
RUNS = {
    "gdn": ("train.exit_after=3", "checkpoint.asynchronous=true"),
    "gdn bf16": (*BF16, "parallel.distributed_optimizer=false"),
    "mamba2": ("model.mixer=mamba2", "train.exit_after=3", "parallel.distributed_optimizer=false"),
    "mamba2 bf16": ("model.mixer=mamba2", *BF16),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("project"))


def train(python: str, project: Path, folder: Path, *overrides: str) -> dict[int, str]:
    """Loss by step, exactly, of a run that is started or resumed; nothing is printed that asks for attention."""
    command = [python, "-m", "oryx_megatron.train", str(project), "model.num_layers=1", f"output_dir={folder}"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert not any(word in shown.lower() for word in ("deprecat", "warn", "traceback", "no cuda runtime")), shown
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: float(row["loss"]).hex() for row in rows if "loss" in row}


def version(python: str) -> str:
    code = "import importlib.metadata; print(importlib.metadata.version('megatron-core'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_they_are_two_versions() -> None:
    assert {version(sys.executable), version(OTHER)} == {"0.16.1", "0.19.2"}


@pytest.mark.parametrize("name", RUNS)
def test_each_resumes_what_the_other_wrote(name: str, project: Path, tmp_path: Path) -> None:
    """Losses of a whole run are equal, and equal to those of a run that changes version half-way."""
    half = RUNS[name]
    overrides = [field for field in half if "exit_after" not in field]
    expected = train(sys.executable, project, tmp_path / "own", *overrides)
    steps = len(expected)
    assert steps == (10 if "bf16" in name else 6)
    assert len(set(expected.values())) == steps
    begun = train(OTHER, project, tmp_path / "mixed", *half)
    assert begun == {step: loss for step, loss in expected.items() if step <= steps // 2}
    assert train(sys.executable, project, tmp_path / "mixed", *overrides) == expected
    train(sys.executable, project, tmp_path / "back", *half)
    assert train(OTHER, project, tmp_path / "back", *overrides) == expected
