"""Scales of delayed FP8 in checkpoints: plain tensors, none left for TransformerEngine to refuse."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from oryx_megatron.checkpoint import scales
from oryx_megatron.compat.transformer_engine import PARTS


class Linear(torch.nn.Module):
    """What a module of TransformerEngine's has of delayed scaling; it learns `products` when it runs."""

    def __init__(self, ran: bool, products: int) -> None:
        super().__init__()
        self.fp8_meta: dict = {}
        if ran:
            self.fp8_meta["num_gemms"] = products
            self.init_fp8_meta_tensors(None)

    def init_fp8_meta_tensors(self, recipe: object) -> None:
        for where, parts in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            count = parts * self.fp8_meta["num_gemms"]
            state = SimpleNamespace(scale=torch.rand(count), amax_history=torch.rand(8, count))
            self.fp8_meta.setdefault(where, state)

    def values(self) -> list[torch.Tensor]:
        return [getattr(self.fp8_meta[where], what) for where, what in PARTS.values()]


def model(ran: bool, fp8: str | None = "hybrid", products: int = 1) -> torch.nn.Module:
    layer = torch.nn.ModuleDict({"proj": Linear(ran, products)})
    found = torch.nn.ModuleDict({"layer": layer, "head": torch.nn.Linear(2, 2)})
    found.config = SimpleNamespace(fp8=fp8)
    return found


def saved(of: torch.nn.Module) -> dict:
    pickle = torch.arange(9, dtype=torch.uint8)
    state = {
        f"{name}._extra_state": ShardedObject(f"{name}._extra_state", pickle, (1,), (0,))
        for name in ("layer.proj", "head")
    }
    scales.unpickle(of, state)
    return {name: entry.data for name, entry in state.items()}


@pytest.fixture(autouse=True)
def recipe(monkeypatch):
    from megatron.core import fp8_utils

    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: config, raising=False)


@pytest.mark.parametrize("products", [1, 2, 4])
def test_they_come_back_as_they_were(products):
    before, after = model(ran=True, products=products), model(ran=False)
    weights = saved(before)
    assert set(weights["layer.proj._extra_state"]) == set(PARTS)
    scales.restore(after, weights, Path("checkpoint"))
    assert weights["layer.proj._extra_state"].numel() == 0
    for own, other in zip(after["layer"]["proj"].values(), before["layer"]["proj"].values(), strict=True):
        assert torch.equal(own, other)


def test_a_model_in_bf16_leaves_them(caplog):
    weights, other = saved(model(ran=True)), model(ran=False, fp8=None)
    weights.pop("head._extra_state")
    scales.restore(other, weights, Path("checkpoint"))
    assert weights["layer.proj._extra_state"].numel() == 0
    assert other["layer"]["proj"].fp8_meta == {}
    assert not caplog.records


def test_pickles_of_older_checkpoints_start_anew_with_a_line(caplog):
    other = model(ran=False)
    weights = {"layer.proj._extra_state": torch.arange(9, dtype=torch.uint8), "layer.proj.weight": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        scales.restore(other, weights, Path("runs/a/checkpoints/iteration_0000003"))
    assert weights["layer.proj._extra_state"].numel() == 0
    assert weights["layer.proj.weight"].numel() == 1
    (record,) = caplog.records
    assert "iteration_0000003: FP8 scales in an older format are not read; they start anew" in record.getMessage()
