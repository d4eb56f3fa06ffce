from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import Runs, train_all

from oryx_megatron import parallel
from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.project import tiny_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """run.yaml of a tiny project, and process groups of this process alone."""
    parallel.initialize(ParallelConfig(), seed=1)
    yield tiny_project(tmp_path_factory.mktemp("project"))
    parallel.destroy()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of both variants under all layouts, stopped and resumed under the same and other layouts."""
    root = tmp_path_factory.mktemp("runs")
    run_distributed(train_all, 4, tiny_project(root), timeout=900)
    return Runs(root)
