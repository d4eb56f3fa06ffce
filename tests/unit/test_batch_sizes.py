"""Batch sizes over iterations: which samples a step reads is a function of the iteration and the record alone."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from test_monitor import step, write

from oryx_megatron import planner
from oryx_megatron.config import load_model
from oryx_megatron.config.batch_sizes import SampleCount, planned
from oryx_megatron.config.schema import BatchStage, ParallelConfig, TrainConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.stream import _Order
from oryx_megatron.errors import ConfigError
from oryx_megatron.monitor import Followed, table
from oryx_megatron.tools import plan
from oryx_megatron.train.__main__ import main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "run" / "quickstart.yaml")


def ramp(*stages: tuple[int, int], first: int = 4) -> TrainConfig:
    schedule = tuple(BatchStage(start=start, global_batch_size=size) for start, size in stages)
    return TrainConfig(iterations=10, global_batch_size=first, micro_batch_size=2, batch_schedule=schedule)


def layout(dp: int) -> Layout:
    return Layout(tp=1, pp=1, vpp=1, cp=1, dp=dp, microbatches=1, stage_layers=(1,))


@pytest.mark.parametrize("begin", [(0, 0), (3, 0), (3, 100), (6, 7)])
def test_counts_are_sums_of_steps(begin: tuple[int, int]) -> None:
    count = SampleCount.of(ramp((2, 8), (5, 16)), *begin)
    sizes = [4, 4, 8, 8, 8, 16, 16, 16, 16, 16]
    assert [count.batch_at(i) for i in range(10)] == sizes
    read = [0, *itertools.accumulate(sizes)]
    assert [count.samples_at(i) for i in range(11)] == [begin[1] + n - read[begin[0]] for n in read]


def test_a_change_keeps_what_was_read() -> None:
    """A stage before the change is of the past: only the size in force there counts."""
    count = SampleCount.of(ramp((2, 8), (8, 16)), 0, 5)
    changed = count.continued(4, planned(ramp((3, 2), (6, 32), first=64)))
    assert [changed.batch_at(i) for i in range(10)] == [4, 4, 8, 8, 2, 2, 32, 32, 32, 32]
    assert [changed.samples_at(i) for i in range(5)] == [count.samples_at(i) for i in range(5)]
    assert changed.continued(4, changed.sizes) == changed
    assert str(changed) == "4, 8 from step 3 on, 2 from step 5 on, 32 from step 7 on"
    assert planned(ramp((0, 8), (3, 8))) == ((0, 8),)


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("begin", [0, 1, 3, 6])
def test_order_in_the_middle_of_a_ramp(dp: int, begin: int) -> None:
    """Every layout reads every sample once and in order, whole steps only, from wherever it begins."""
    train = ramp((2, 8), (5, 12))
    count = SampleCount.of(train)
    microbatches = layout(dp).microbatches_from(begin, count, train)
    ranks = [list(_Order(count.samples_at(9) + 11, count.samples_at(begin), 2, microbatches, r, dp)) for r in range(dp)]
    assert all(len(rank) == sum(map(microbatches, range(9 - begin))) for rank in ranks)
    seen = [index for microbatch in zip(*ranks, strict=True) for indices in microbatch for index in indices]
    assert seen == list(range(count.samples_at(begin), count.samples_at(9)))


def test_sizes_of_the_past_that_do_not_divide() -> None:
    """Only steps that are still to be done must fit the layout."""
    train, count = ramp(first=12), SampleCount(((0, 4), (5, 12)))
    layout(3).microbatches_from(5, count, train)
    with pytest.raises(
        ConfigError,
        match=r"^the batch size of steps 4 to 5 4 is not divisible by train.micro_batch_size 2 × data 3 = 6; use 6$",
    ):
        layout(3).microbatches_from(3, count, train)


@pytest.mark.parametrize(
    ("stages", "world", "message"),
    [
        (
            "[{start: 2, global_batch_size: 16}, {start: 4, global_batch_size: 12}]",
            2,
            "train.batch_schedule[1].global_batch_size 12 is not divisible by train.micro_batch_size 4 × data 2 = 8; "
            "use 8 or 16",
        ),
        ("[{start: 2, global_batch_size: 0}]", 1, "train.batch_schedule[0].global_batch_size: 0 should be above 0"),
        (
            "[{start: 4, global_batch_size: 16}, {start: 4, global_batch_size: 32}]",
            1,
            "train.batch_schedule[1].start: 4 should be after the stage before it at 4",
        ),
        ("[{start: 9999, global_batch_size: 16}]", 1, "train.batch_schedule[0].start: 9999 is not within the run's"),
        ("[{start: 1, size: 16}]", 1, "train.batch_schedule[0]"),
    ],
)
def test_faults(stages: str, world: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = [QUICKSTART, f"train.batch_schedule={stages}", "train.micro_batch_size=4", "parallel.tensor=1"]
    assert main([*config, "--dry-run", "--world-size", str(world)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_interleaved_stages_name_their_size(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.num_layers=4"]
    overrides += ["train.micro_batch_size=4", "train.batch_schedule=[{start: 2, global_batch_size: 12}]"]
    assert main([QUICKSTART, *overrides, "--dry-run", "--world-size", "2"]) == 2
    assert (
        "train.batch_schedule[0].global_batch_size 12: microbatches per step 3 is not divisible"
        in capsys.readouterr().err
    )


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    stages = "train.batch_schedule=[{start: 10, global_batch_size: 16}, {start: 20, global_batch_size: 32}]"
    assert (
        main(
            [
                QUICKSTART,
                stages,
                "train.iterations=50",
                "schedule.warmup=5",
                "parallel.tensor=1",
                "--dry-run",
                "--config-only",
            ]
        )
        == 0
    )
    samples = 10 * 8 + 10 * 16 + 30 * 32
    assert capsys.readouterr().out.splitlines()[2] == (
        f"batch sizes: 8, 16 from step 11 on, 32 from step 21 on; {samples} samples, {samples * 256:,} tokens in all"
    )


def test_time_left(tmp_path: Path) -> None:
    """The steps to come are larger than those done: two of 4 samples took 4 s, 8 of 16 take 64."""
    write(tmp_path, step(1), step(2))
    stages = "[{start: 2, global_batch_size: 16}]"
    (tmp_path / "config.yaml").write_text(
        f"train: {{iterations: 10, global_batch_size: 4, batch_schedule: {stages}}}\n"
    )
    run = Followed(tmp_path, "run")
    run.look()
    assert "1:04 running" in table([run], time.time())[1]


def test_plan_of_a_ramp(capsys: pytest.CaptureFixture[str]) -> None:
    """Layouts take every size, and the best is told at each of them."""
    assert plan.main(["130m-gdn", "--gpus", "2", "--sequence", "1024", "--batch", "24", "64", "--top", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("64 × 1024 tokens per step")
    rows = out[out.index("batch    m  step s  tokens/s  bubble") + 1 :][:2]
    assert [row.split()[0] for row in rows] == ["24", "64"]
    assert plan.main(["130m-gdn", "--gpus", "2", "--sequence", "1024", "--batch", "24", "0"]) == 2
    assert "--batch: 0 should be above 0" in capsys.readouterr().err
    model = load_model("130m-gdn")
    assert planner.layout_of(model, planner.Work(1024, 24), ParallelConfig(), 12, 2).microbatches == 1
    with pytest.raises(ConfigError, match=r"global_batch_size 16 is not divisible"):
        planner.layout_of(model, planner.Work(1024, 24, ramp=(16,)), ParallelConfig(), 12, 2)
