from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from oryx_megatron import parallel
from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.ops import fused


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN: a kernel that reads what it never wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Process groups of one rank, which a model needs."""
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.destroy()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for a few rows."""
    for sizes in (fused._WALK, fused._WALK_BACK):
        monkeypatch.setitem(sizes, "BLOCK", 4)
    for sizes in (fused._TILE, fused._NORM, fused._NORM_BACK, fused._GATES):
        monkeypatch.setitem(sizes, "BLOCK", 8)
    monkeypatch.setitem(fused._SWIGLU, "BLOCK", 16)
    monkeypatch.setattr(fused, "_SHARES", {few: {"ROWS": 4, "COLS": 8} for few in (True, False)})
