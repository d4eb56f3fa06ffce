"""When a run evaluates and saves. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import CheckpointConfig, RunConfig


class Intervals:
    """When one run evaluates and saves. An iteration is a number of steps done, 0 before the first."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def evaluate(self, iteration: int, *, saving: bool = False) -> bool:
        """Whether an evaluation is due; `saving`: a save is, before which checkpoint.keep_best needs one."""
        run = self.run
        due = _due(iteration, run.evaluation.interval, self._listed(run.evaluation.steps), run.train.iterations)
        return due or (run.checkpoint.keep_best is not None and (saving or iteration in run.checkpoint.steps))

    def save(self, iteration: int, last: int) -> bool:
        """Whether a save is due in a run that ends, for now, at `last`."""
        return _due(iteration, self.run.checkpoint.interval, self._listed(self.run.checkpoint.steps), last)

    def left(self, iteration: int, last: int) -> tuple[int, int]:
        """Evaluations and saves from after `iteration` to `last`."""
        run, best = self.run, self.run.checkpoint.keep_best is not None
        saving, evaluating = self._listed(run.checkpoint.steps), self._listed(run.evaluation.steps)
        saves = _due_between(iteration, last, run.checkpoint.interval, saving, last)
        evaluations = _due_between(iteration, last, run.evaluation.interval, evaluating, run.train.iterations)
        return len(evaluations | saves if best else evaluations), len(saves)

    def _listed(self, steps: Collection[int]) -> tuple[int, ...]:
        """These steps, and those at which a decay of the learning rate ends."""
        return (*steps, *self.run.schedule.restarts)


def retention(run: RunConfig) -> CheckpointConfig:
    """The config by which checkpoints are kept: also those where a decay of the learning rate ends, as of `steps`."""
    return replace(run.checkpoint, steps=tuple(dict.fromkeys((*run.checkpoint.steps, *run.schedule.restarts))))


def seconds_left(run: RunConfig, iteration: int, last: int, *, sample: float, evaluation: float, save: float) -> float:
    """Time from step `iteration` to `last`, evaluations and saves included, from the seconds that one of each takes.

    Steps to come may be of other sizes: they are computed from the seconds of a `sample`.
    """
    count = SampleCount.of(run.train)
    evaluations, saves = Intervals(run).left(iteration, last)
    stepping = (count.samples_at(last) - count.samples_at(iteration)) * sample
    return stepping + evaluations * evaluation + saves * save


def mean_seconds(events: Sequence[dict[str, Any]], kind: str) -> float:
    """What an `evaluation` or a `checkpoint` took on average, by the events of a run; 0 where there was none."""
    seconds = [event["seconds"] for event in events if event["event"] == kind and "seconds" in event]
    return sum(seconds) / len(seconds) if seconds else 0.0


def last_step(run: RunConfig) -> int:
    """Step after which a run ends, for good or for now."""
    return min(run.train.iterations, run.train.exit_after or run.train.iterations)


def _due(iteration: int, interval: int, steps: Collection[int], end: int) -> bool:
    return iteration in steps or (iteration > 0 and (iteration == end or (interval > 0 and iteration % interval == 0)))


def _due_between(after: int, last: int, interval: int, steps: Collection[int], end: int) -> set[int]:
    """Iterations from after `after` to `last` at which something is due."""
    regular = range(after - after % interval + interval, last + 1, interval) if interval else ()
    return {step for step in {*regular, *steps, end} if after < step <= last}
