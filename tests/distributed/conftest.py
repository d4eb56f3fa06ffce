from __future__ import annotations

import pytest
from tiny_runs import Runs, train_all

from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.project import tiny_project


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of both variants under all layouts, stopped and resumed under the same and other layouts."""
    root = tmp_path_factory.mktemp("runs")
    run_distributed(train_all, 4, tiny_project(root), timeout=900)
    return Runs(root)
