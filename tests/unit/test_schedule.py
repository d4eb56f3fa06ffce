"""Learning rates by iteration, against formulas written out: restarts of WSD and cosine, with and without warm-up."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

import pytest

from oryx_megatron.config import load_run, validate
from oryx_megatron.config.schema import RunConfig, ScheduleConfig, TrainConfig
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.errors import ConfigError
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train import differences, resume
from oryx_megatron.train.schedule import learning_rate

PEAK, LOW = 1e-2, 1e-3
QUICKSTART = Path(__file__).parents[2] / "configs" / "run" / "quickstart.yaml"


def run_of(iterations: int, **schedule: object) -> RunConfig:
    run = tiny_run(train=TrainConfig(iterations=iterations, global_batch_size=4))
    return dataclasses.replace(run, schedule=ScheduleConfig(min_lr=LOW, **schedule))  # type: ignore[arg-type]


def rates(run: RunConfig) -> list[float]:
    validate(run, 1)
    return [learning_rate(run, done) for done in range(run.train.iterations)]


def test_wsd_with_several_decays() -> None:
    """5 of warm-up; decays of 4 that end at 20 and 40 and at the end; back to the peak over 3 each time."""
    found = rates(run_of(60, name="wsd", warmup=5, decay=4, decay_shape="linear", restarts=(20, 40), rewarm=3))
    falling = [PEAK - (PEAK - LOW) * i / 4 for i in range(4)]
    rising = [LOW + (PEAK - LOW) * i / 3 for i in range(3)]
    expected = [PEAK * i / 5 for i in range(5)] + [PEAK] * 11 + falling
    for _ in range(2):
        expected += rising + [PEAK] * 13 + falling
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_decay_alone_is_that_of_a_run_that_ends_there() -> None:
    """WSD-S: up to the first restart the same as the shorter run, by default with a tenth of its length."""
    whole, short = run_of(100, name="wsd", warmup=5, restarts=(30,)), run_of(30, name="wsd", warmup=5)
    assert rates(whole)[:30] == rates(short)
    assert rates(whole)[30] == PEAK  # at once


def test_cosine_restarts() -> None:
    found = rates(run_of(50, warmup=4, restarts=(20,), rewarm=6))
    first = [PEAK * i / 4 for i in range(4)]
    first += [LOW + (PEAK - LOW) * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)]
    second = [LOW + (PEAK - LOW) * i / 6 for i in range(6)]
    second += [LOW + (PEAK - LOW) * (1 + math.cos(math.pi * i / 24)) / 2 for i in range(24)]
    assert found == pytest.approx(first + second, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.restarts=[20, 20]"], "schedule.restarts[1]: 20 should be after the restart before it at 20"),
        (["schedule.restarts=[40]"], "train.iterations: 40 should be after the restart before it at 40"),
        (["schedule.restarts=[0]"], "schedule.restarts[0]: 0 should be above 0"),
        (["schedule.rewarm=3"], "schedule.rewarm: has no effect without schedule.restarts"),
        (
            ["schedule.restarts=[20]", "schedule.name=constant", "schedule.min_lr=0"],
            "a constant learning rate has none",
        ),
        (
            ["schedule.restarts=[20]", "schedule.name=wsd", "schedule.decay=8", "schedule.rewarm=13"],
            "train.iterations: 13 iterations of warm-up and 8 of decay do not fit between 20 and 40; move it, or lower "
            "schedule.rewarm or schedule.decay",
        ),
        (["schedule.restarts=[20]", "schedule.rewarm=20"], "train.iterations: 20 iterations of warm-up do not fit"),
        (["schedule.restarts=[5]", "schedule.warmup=5"], "schedule.restarts[0]: 5 iterations of warm-up do not fit"),
    ],
)
def test_faults(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(load_run(QUICKSTART, ["train.iterations=40", "schedule.warmup=2", *overrides]), 2)
    assert message in str(error.value)


def test_an_extended_run_is_told_how_to_warm_up_again() -> None:
    """What the message proposes makes the jump go, and leaves the past as it was."""
    short, longer = run_of(20, warmup=4), run_of(60, warmup=4)
    text = resume.jump(short, longer, 20)
    assert text.startswith("the learning rate jumps from ")
    assert text.endswith("; to warm up again from there: schedule.restarts=[20] schedule.rewarm=N")
    proposed = run_of(60, warmup=4, restarts=(20,), rewarm=5)
    assert resume.jump(short, proposed, 20) == ""
    assert rates(proposed)[:20] == rates(short)
    assert "to warm up again" not in resume.jump(short, longer, 10)
    again = run_of(90, warmup=4, name="wsd", restarts=(5,), rewarm=3)
    text = resume.jump(short, again, 20)
    assert (
        ": train.iterations 20 → 90, schedule.name cosine → wsd, schedule.restarts [] → [5], schedule.rewarm 0 → 3; "
        in text
    )
    assert text.endswith("; to warm up again from there: schedule.restarts=[5, 20] schedule.rewarm=3")
    # Both halfway down: another rate than the old schedule's, but none that jumps.
    assert learning_rate(run_of(2), 1) == learning_rate(run_of(4), 2)
    assert resume.jump(run_of(2), run_of(4), 2) == ""


@pytest.mark.parametrize("value", [0.1 + 0.2, 0.9999999, 1e-05, 0.002, 1234567.0, 1e22, -0.5, 1e-300])
def test_numbers_are_told_as_they_are(value: float) -> None:
    """Pasted behind a command, they give the same number; two that differ are never told as one."""
    assert parse_yaml(differences.to_text(value), "told") == value
    assert differences.to_text(value) != differences.to_text(value * (1 + 2**-50))


def test_settings_are_told_whole() -> None:
    name = "a model's name with spaces, and more than the sixty characters that a list of differences has"
    assert shlex.split(differences.as_override("model.name", name)) == [f"model.name={name}"]
