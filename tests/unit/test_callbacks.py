"""What reporters make of a run that resumes from a checkpoint."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train.callbacks import Display, StepRecord, TensorBoard
from oryx_megatron.train.clock import Clock
from oryx_megatron.train.history import duration
from oryx_megatron.train.intervals import Intervals
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


def test_the_time_left_is_what_remains(tmp_path: Path) -> None:
    """Within 15 % all along, evaluations, saves and a first step that compiles included; exact once each was measured.

    Steps take 2 s, the first 300; an evaluation reads 3 × 4 batches, each a third of a step, 10 s in fact; a save 4 s.
    """
    run = tiny_run(
        train__iterations=100, train__exit_after=None, evaluation__interval=30, evaluation__batches=4,
        checkpoint__interval=25,
    )  # fmt: skip
    clock, out, intervals = Clock(), io.StringIO(), Intervals(run)
    display = Display(tmp_path, clock, 10, 100, out)
    display.on_start(run, 0)
    past, at = 0.0, {}
    for iteration in range(1, 101):
        seconds = 300.0 if iteration == 1 else 2.0
        past += seconds
        display.on_step(dataclasses.replace(_record(iteration), seconds=seconds))
        at[iteration] = past
        if intervals.evaluate(iteration):
            clock.add("evaluation", 10.0)
            display.on_evaluation(iteration, [])
            past += 10.0
        if intervals.save(iteration, 100):
            clock.add("checkpoint", 4.0)
            display.on_checkpoint("it")
            past += 4.0
    lines = [line.split() for line in out.getvalue().splitlines() if "/100" in line]
    left = {int(line[0].split("/")[0]): line[-1] for line in lines}
    assert left.keys() == set(range(10, 101, 10))
    for iteration, text in left.items():
        minutes, seconds = map(int, text.split(":"))
        assert 60 * minutes + seconds == pytest.approx(past - at[iteration], rel=0.15)
    assert left[50] == duration(past - at[50]) == "2:22"  # 50 steps, 3 evaluations, 3 saves
