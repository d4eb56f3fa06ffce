"""muP: activations change alike at every width, and the final norm stands for the factor 1/m of the logits."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from benchmarks.coordinate_check import ROUTER, changes, run_of, slope
from oryx_megatron import parallel, platform
from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.testing.layouts import session, train_and_resume

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    platform.install()
    yield
    parallel.destroy()


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_changes_by_width(optimizer: Literal["adamw", "muon"], experts: int) -> None:
    """As a power of the width after two steps: blocks about 0 with muP, rising without; logits never rise with it."""
    powers = {}
    for mup in (False, True):
        by_width = {width: changes(run_of(width, optimizer, mup=mup, experts=experts), 2)[-1] for width in (1, 4)}
        powers[mup] = {part: slope({w: found[part] for w, found in by_width.items()}) for part in by_width[1]}
    least = {"adamw": 0.8, "muon": 0.3}[optimizer]
    for part in ("first block", "last block"):
        assert powers[False][part] > least, powers
        assert abs(powers[True][part]) < 0.3, powers
        assert powers[False][part] - powers[True][part] > 0.4, powers
    for part in ("logits", ROUTER) if experts else ("logits",):
        assert powers[False][part] > 0.1 > powers[True][part], powers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_and_routers_start_and_move_by_their_fan_in(optimizer: Literal["adamw", "muon"]) -> None:
    """What a matrix of m × n does to its input at the start and by the first update, at every width.

    A start of √n · std is level; a router's falls as an output's does. An update by AdamW moves entries by lr: n times
    that is level. One by Muon has singular values of one size: times √(n / m) it is level.
    """
    starts: dict[str, list[float]] = {}
    updates: dict[str, list[float]] = {}
    for width in (1, 2, 4):
        run = run_of(width, optimizer, mup=True, experts=8)
        run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, weight_decay=0.0, epsilon=1e-15))
        with session(run) as opened:
            before = opened.weights()
            opened.steps(1)
            for name, value in opened.weights().items():
                kind = re.search(r"router|fc1|fc2|in_proj.*key|out_proj", name)
                moved = value - before[name]
                if kind is None or not moved.any():  # an expert without a token
                    continue
                rows, columns = value.shape[0] // (2 if kind[0] == "fc1" else 1), value.shape[1]
                size = columns * moved.abs().max()
                if optimizer == "muon":
                    size = torch.linalg.matrix_norm(moved[:rows], 2) * (columns / rows) ** 0.5
                starts.setdefault(f"{kind[0]} {width}", []).append(float(before[name].std()) * columns**0.5)
                updates.setdefault(f"{kind[0]} {width}", []).append(float(size))
    mean = {name: sum(sizes) / len(sizes) for name, sizes in starts.items()}
    moved = {name: sum(sizes) / len(sizes) for name, sizes in updates.items()}
    assert len(mean) == 5 * 3
    for kind in {name.split()[0] for name in mean}:
        for width in (2, 4):
            fall = width**-0.5 if kind == "router" else 1.0
            assert mean[f"{kind} {width}"] == pytest.approx(fall * mean[f"{kind} 1"], rel=0.05), kind
            assert moved[f"{kind} {width}"] == pytest.approx(moved[f"{kind} 1"], rel=0.15), kind


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sharded", [True, False])
def test_experts_resume_exactly(optimizer: Literal["adamw", "muon"], sharded: bool, tmp_path: Path) -> None:
    """The groups of parameters of a checkpoint are told apart."""
    run = run_of(2, optimizer, mup=True, experts=4)
    run = dataclasses.replace(run, parallel=ParallelConfig(distributed_optimizer=sharded))
    going, resumed = train_and_resume(run, tmp_path, before=2, after=2)
    assert going[2:] == resumed


def test_the_final_norm_is_the_factor_of_the_logits() -> None:
    """Held against the factor itself: logits times 1/m, final norm as without muP. Clipping, which sees it, is off."""
    run = run_of(4, "adamw", mup=True)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, clip_grad=0.0, epsilon=1e-12))
    with session(run) as opened:
        found = opened.steps(4)
        settings = {group["lr_mult"]: (group["lr"], group["eps"]) for group in opened.optimizer.param_groups}
    assert settings[0.25][0] == pytest.approx(settings[1.0][0] / 4)
    with session(run) as opened:
        chunk = opened.chunks[0].module
        chunk.output_layer.register_forward_hook(lambda module, inputs, output: (output[0] / 4, output[1]))
        weight = chunk.decoder.final_layernorm.weight
        with torch.no_grad():
            weight.mul_(4)
        for single in getattr(opened.optimizer, "chained_optimizers", [opened.optimizer]):
            single.reload_model_params()
            for group in single.param_groups:
                if group["wd_mult"] == 0.0 and group["lr_mult"] == 0.25:
                    group.update(max_lr=run.optimizer.lr, eps=1e-12)
        opened.engine.rewind(0)
        expected = opened.steps(4)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=2e-5)
    assert found[-1][0] != found[0][0]


def test_coordinate_check_draws_its_picture(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/coordinate_check.py", "--widths", "1", "2", "--steps", "1"]
    command += ["--experts", "4"]
    picture = tmp_path / "check.png"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--picture", str(picture)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("∝ width^") == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run([*command[:4], "--steps", "1"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--widths" in refused.stderr
