"""Fixtures that several integration tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_checkpoints import write_all

from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.project import tiny_project


@pytest.fixture(scope="session")
def hf_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml of a folder with data, tokenizer and a checkpoint of every case in hf_checkpoints.CASES."""
    config = tiny_project(tmp_path_factory.mktemp("project"))
    run_distributed(write_all, 2, config)
    return config
