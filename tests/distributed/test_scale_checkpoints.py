"""Checkpoints written under one layout and continued under another: the losses of a run that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from oryx_megatron.config.schema import ParallelConfig, RunConfig
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Worlds, session, tiny_run

RANKS = 4
BEFORE, AFTER = 2, 2
"""Steps before and after the checkpoint."""

Layout = tuple[int, int, int, int]
"""tensor, pipeline, virtual pipeline, context"""

# name: variant, world and layout that write, world and layout that read
MOVES: dict[str, tuple[str, int, Layout, int, Layout]] = {
    "tp2-pp2-vpp2 to cp2-dp2": ("gdn", 4, (2, 2, 2, 1), 4, (1, 1, 1, 2)),
    "cp2-dp2 to tp2-pp2-vpp2": ("mamba2", 4, (1, 1, 1, 2), 4, (2, 2, 2, 1)),
    "dp4 to tp4": ("gdn", 4, (1, 1, 1, 1), 4, (4, 1, 1, 1)),
    "tp2-cp2 to pp4": ("mamba2", 4, (2, 1, 1, 2), 4, (1, 4, 1, 1)),
    "tp2-dp2 to one rank": ("gdn", 4, (2, 1, 1, 1), 1, (1, 1, 1, 1)),
    "pp2-vpp2-dp2 to tp2": ("mamba2", 4, (1, 2, 2, 1), 2, (2, 1, 1, 1)),
    "pp2-cp2 to pp2-vpp2": ("gdn", 4, (1, 2, 1, 2), 2, (1, 2, 2, 1)),
    "one rank to tp2-pp2": ("mamba2", 1, (1, 1, 1, 1), 4, (2, 2, 1, 1)),
    "hybrid: tp2-pp2-vpp2 to cp2-dp2": ("gdn hybrid", 4, (2, 2, 2, 1), 4, (1, 1, 1, 2)),
    "mixed: pp4 to tp2": ("mamba2 mixed", 4, (1, 4, 1, 1), 2, (2, 1, 1, 1)),
    "muon: tp2-pp2 to cp2-dp2": ("gdn muon", 4, (2, 2, 1, 1), 4, (1, 1, 1, 2)),
}


PATTERNS = {"gdn hybrid": ("recurrent*3", "attention"), "mamba2 mixed": ("both", "recurrent", "attention", "both")}


def _run(variant: str, layout: Layout = (1, 1, 1, 1)) -> RunConfig:
    mixer, *kind = variant.split()
    muon, pattern = kind == ["muon"], PATTERNS.get(variant, ())
    tensor, pipeline, virtual, context = layout
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        context=context,
        distributed_optimizer=not muon,
    )
    optimizer = {"optimizer__name": "muon"} if muon else {}
    return tiny_run(mixer, parallel=parallel, data__documents="isolated", model__pattern=pattern, **optimizer)


def _move(root: Path) -> dict[str, list[tuple[float, float]]]:
    worlds, results = Worlds(), dict[str, list[tuple[float, float]]]()
    for size in (1, 2, 4):
        for name, (mixer, _, layout, _, _) in worlds.share(size, _of(MOVES, 1, size)):
            with worlds.of(size, f"write {name}"), session(_run(mixer, layout)) as opened:
                opened.steps(BEFORE)
                opened.checkpoints(root / name).save(opened.iteration, opened.manifest)
    for mixer in worlds.share(1, ("gdn", "mamba2", "gdn muon", *PATTERNS)):
        with worlds.of(1, mixer), session(_run(mixer)) as opened:
            results[mixer] = opened.steps(BEFORE + AFTER)
    for size in (1, 2, 4):
        for name, (mixer, _, _, _, layout) in worlds.share(size, _of(MOVES, 3, size)):
            with worlds.of(size, f"read {name}"), session(_run(mixer, layout), iteration=BEFORE) as opened:
                manifest = opened.checkpoints(root / name).load()
                assert manifest is not None
                assert manifest.iteration == BEFORE
                results[name] = opened.steps(AFTER)
    return results


def _of(moves: dict[str, Any], field: int, size: int) -> list[tuple[str, Any]]:
    return [(name, move) for name, move in moves.items() if move[field] == size]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    merged: dict[str, list[tuple[float, float]]] = {}
    for part in run_distributed(_move, RANKS, tmp_path_factory.mktemp("moves"), timeout=900):
        merged |= part
    return merged


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", MOVES)
def test_another_layout_continues_the_run(name: str, moved: dict[str, list[tuple[float, float]]]) -> None:
    expected = torch.tensor(moved[MOVES[name][0]][BEFORE:], dtype=torch.float64)
    got = torch.tensor(moved[name], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)  # columns: loss, gradient norm
