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

    def left(self, iteration: int, last: int, done: Collection[str] = ()) -> tuple[int, int]:
        """Evaluations and saves to come up to `last`, from those due at `iteration` on, without the kinds in `done`."""
        run, best = self.run, self.run.checkpoint.keep_best is not None
        saving, evaluating = self._listed(run.checkpoint.steps), self._listed(run.evaluation.steps)
        evaluated, saved = (iteration if kind in done else iteration - 1 for kind in ("evaluation", "checkpoint"))
        saves = _due_between(saved, last, run.checkpoint.interval, saving, last)
        evaluations = _due_between(evaluated, last, run.evaluation.interval, evaluating, run.train.iterations)
        if best:
            evaluations |= {step for step in saves if step > evaluated}
        return len(evaluations), len(saves)

    def _listed(self, steps: Collection[int]) -> tuple[int, ...]:
        """These steps, and those at which a decay of the learning rate ends."""
        return (*steps, *self.run.schedule.restarts)


def retention(run: RunConfig) -> CheckpointConfig:
    """The config by which checkpoints are kept: also those where a decay of the learning rate ends, as of `steps`."""
    return replace(run.checkpoint, steps=tuple(dict.fromkeys((*run.checkpoint.steps, *run.schedule.restarts))))


def seconds_left(
    run: RunConfig,
    iteration: int,
    last: int,
    *,
    sample: float,
    evaluation: float,
    save: float,
    done: Collection[str] = (),
) -> float:
    """Time from step `iteration` to `last`, evaluations and saves included (`Intervals.left`).

    Args:
        run: The run.
        iteration: Steps done.
        last: Step to end at.
        sample: Seconds for each; steps to come may be of other sizes.
        evaluation: Seconds of one; 0: none was measured, and a forward pass is a third of a step.
        save: Seconds of one.
        done: What step `iteration` has behind it already: `evaluation`, `checkpoint`.
    """
    count = SampleCount.of(run.train)
    evaluations, saves = Intervals(run).left(iteration, last, done)
    stepping = (count.samples_at(last) - count.samples_at(iteration)) * sample
    sets = len(run.data.validation) + (run.data.split[1] > 0)
    read = sets * len(run.evaluation.plans) * (run.evaluation.batches or 0) * run.train.global_batch_size
    return stepping + evaluations * (evaluation or read * sample / 3) + saves * save


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
    regular = range(max(after - after % interval, 0) + interval, last + 1, interval) if interval else ()
    return {step for step in {*regular, *steps, end} if after < step <= last}
