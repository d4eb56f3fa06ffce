"""What reporters make of a run that resumes from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train.callbacks import StepRecord, TensorBoard
from oryx_megatron.train.routing import Routing

LOADS = {"expert_load_max": 2.0, "expert_load_min": 0.5, "dropped_share": 0.0, "load": ((2.0, 0.5, 0.5),)}


def _record(iteration: int) -> StepRecord:
    numbers = {field.name: 1.0 for field in dataclasses.fields(StepRecord) if field.type in ("float", "int")}
    routing = Routing(**dict.fromkeys(("load_balancing_loss", "router_z_loss", "router_entropy"), 1.0), **LOADS)
    own = {"iteration": iteration, "skipped": False, "routing": routing}
    return StepRecord(**(numbers | own))  # type: ignore[arg-type]


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    """Processes that died before the first checkpoint and behind a later one; one that rolls back after bad steps."""
    for done, steps, back in ((0, (1, 2, 3, 4, 5), None), (0, (1, 2, 3, 4), None), (2, (3, 4, 5), 3), (3, (), None)):
        reporter = TensorBoard(tmp_path)
        reporter.on_start(tiny_run(), done)
        for iteration in steps:
            reporter.on_step(_record(iteration))
        if back is not None:
            reporter.on_rollback(steps[-1], back, 0)
            reporter.on_step(_record(back + 1))
        reporter.on_end()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_without_a_folder_for_tensorboard(tmp_path: Path) -> None:
    """A file lies in its place: the trainer reports that and the run continues."""
    (tmp_path / "tensorboard").touch()
    reporter = TensorBoard(tmp_path / "tensorboard")
    with pytest.raises(OSError, match="tensorboard"):
        reporter.on_start(tiny_run(), 0)
    reporter.on_step(_record(1))
    reporter.on_evaluation(1, [])
    reporter.on_end()
