"""bf16, whose fp32 masters, fp32 decays and weights lie in buffers of their own: layouts, overlap, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from oryx_megatron.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Worlds, session, tiny_run, train_and_resume
from oryx_megatron.testing.masters import compare_masters

RANKS = 4
BEFORE, AFTER = 3, 2
"""Steps before and after the checkpoint."""

OVERLAP = {"overlap": True}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp2": ("gdn", 2, {}),
    "dp2-overlap": ("gdn", 2, OVERLAP),
    "tp2-overlap-dp2": ("mamba2", 4, {"tensor": 2, **OVERLAP}),
    "cp2": ("mamba2", 2, {"context": 2}),
    "cp2-overlap": ("gdn", 2, {"context": 2, **OVERLAP}),
    "pp2": ("mamba2", 2, {"pipeline": 2}),
    "pp2-vpp2": ("gdn", 2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2-vpp2-overlap-dp2": ("mamba2", 4, {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}),
    "tp2-pp2-vpp2": ("gdn", 4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "dp4-overlap-whole": ("gdn", 4, {"distributed_optimizer": False, **OVERLAP}),
    "muon-pp2-vpp2-whole": ("gdn muon", 2, {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": False}),
    "muon-tp2-overlap-dp2-whole": ("gdn muon", 4, {"tensor": 2, "distributed_optimizer": False, **OVERLAP}),
}


def _run(variant: str, layout: dict[str, Any]) -> RunConfig:
    mixer, *muon = variant.split()
    optimizer = {"optimizer__lr": 2e-3} | ({"optimizer__name": "muon"} if muon else {})
    return tiny_run(mixer, parallel=ParallelConfig(**layout), precision=PrecisionConfig(dtype="bf16"), **optimizer)


def _losses(root: Path) -> dict[str, list[float]]:
    """Of a run that continues behind its checkpoint, and behind it those of another that starts from there."""
    worlds, results = Worlds(), dict[str, list[float]]()
    for variant, layout in worlds.share(
        1, {"gdn": {}, "mamba2": {}, "gdn muon": {"distributed_optimizer": False}}.items()
    ):
        with worlds.of(1, variant), session(_run(variant, layout)) as opened:
            results[variant] = [loss for loss, _ in opened.steps(BEFORE + AFTER)]
    for size in (2, 4):
        for name, (variant, _, layout) in worlds.share(size, [case for case in LAYOUTS.items() if case[1][1] == size]):
            run = _run(variant, layout)
            with worlds.of(size, name):
                going, resumed = train_and_resume(run, root / name, before=BEFORE, after=AFTER)
                results[name] = going + resumed
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    root, merged = tmp_path_factory.mktemp("bf16"), dict[str, list[float]]()
    for part in run_distributed(_losses, RANKS, root, timeout=600):
        merged |= part
    return root, merged


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_one_rank_and_bit_equal_after_a_resume(
    name: str, trained: tuple[Path, dict[str, list[float]]]
) -> None:
    """Those of one rank but for bf16's roundings, and bit-equal behind a checkpoint."""
    losses = trained[1][name]
    assert losses[: BEFORE + AFTER] == pytest.approx(trained[1][LAYOUTS[name][0]], rel=3e-3)
    assert losses[BEFORE + AFTER :] == losses[BEFORE : BEFORE + AFTER]


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_in_a_checkpoint_are_the_rounded_masters(
    name: str, trained: tuple[Path, dict[str, list[float]]]
) -> None:
    (folder,) = (trained[0] / name).glob("iteration_*")
    compared, apart = compare_masters(folder)
    assert compared > 10
    assert not apart


def _apart_in_fp32(root: Path) -> int:
    """How many parameters differ between the ranks of a run that resumes in fp32 where one in bf16 stopped."""
    layout = {"overlap": False}
    with session(_run("gdn", layout)) as opened:
        opened.steps(2)
        manager = opened.checkpoints(root)
        assert manager.save(2, opened.manifest) or manager.wait()
    run = tiny_run("gdn", parallel=ParallelConfig(**layout), optimizer__lr=2e-3)
    with session(run, iteration=2) as opened:
        assert opened.checkpoints(root).load() is not None
        apart = 0
        for parameter in opened.chunks[0].parameters():
            first = parameter.detach().clone()
            torch.distributed.broadcast(first, src=0)
            apart += not torch.equal(first, parameter)
        return apart


def test_going_on_in_fp32_gives_all_ranks_the_same_weights(tmp_path: Path) -> None:
    assert run_distributed(_apart_in_fp32, 2, tmp_path) == [0, 0]
