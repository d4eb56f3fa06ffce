"""A batch size that changes on resume: as if it had been planned so, over rollbacks and starts from other runs too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oryx_megatron import parallel
from oryx_megatron.checkpoint import find_checkpoint, read_manifest
from oryx_megatron.checkpoint.manifest import write_manifest
from oryx_megatron.config import load_run, validate
from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.errors import CheckpointError
from oryx_megatron.testing.project import tiny_project
from oryx_megatron.train.trainer import Trainer

RAMP = "train.batch_schedule=[{start: 2, global_batch_size: 4}]"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """run.yaml, and in whole/ a run of five steps, the last three of twice as many samples."""
    parallel.initialize(ParallelConfig(), seed=1)
    config = tiny_project(tmp_path_factory.mktemp("project"))
    make(config, config.parent / "whole", RAMP).fit()
    yield config
    parallel.destroy()


def make(config: Path, folder: Path, *overrides: str) -> Trainer:
    small = ("model.num_layers=1", "train.global_batch_size=2", "data.split=[9, 0, 1]", "train.iterations=5")
    blend = str(config.parent / "data")
    stages = f"data.stages=[{{start: 1, blend: [{blend}]}}, {{start: 3, blend: [{blend}]}}]"
    run = load_run(config, [*small, stages, "checkpoint.interval=1", f"output_dir={folder}", *overrides])
    return Trainer(run, validate(run, 1))


@pytest.fixture
def trainer(project: Path, tmp_path: Path) -> Callable[..., Trainer]:
    return lambda *overrides: make(project, tmp_path / "run", *overrides)


def lines(folder: Path) -> list[tuple[float, ...]]:
    """Loss, norm, samples read and tokens of every step: all of them exact."""
    steps = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        tuple(s[field] for field in ("iteration", "loss", "grad_norm", "lr", "consumed_samples", "tokens"))
        for s in steps
        if s["kind"] == "step"
    ]


def test_as_if_planned(
    trainer: Callable[..., Trainer], project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, also in resumes after the change; the record keeps what was, the config what is."""
    caplog.set_level("INFO")
    expected = lines(project.parent / "whole")
    assert [line[4] for line in expected] == [2, 4, 8, 12, 16]
    assert [line[5] for line in expected] == [96, 96, 192, 192, 192]
    trainer("train.exit_after=2").fit()
    trainer("train.global_batch_size=4", "train.exit_after=3").fit()
    assert "train.global_batch_size 2 → 4 from step 3 on: samples continue at 4;" in caplog.text
    assert "batch sizes with those of the steps before: 2, 4 from step 3 on; 16 samples in all" in caplog.text
    caplog.clear()
    trainer("train.global_batch_size=4").fit()
    assert "samples continue at" not in caplog.text
    assert lines(tmp_path / "run") == expected
    manifest = read_manifest(find_checkpoint(tmp_path / "run"))
    assert manifest.batch_sizes == [[0, 2], [2, 4]]
    assert manifest.config["train"]["global_batch_size"] == 4


def test_rollback_past_the_change(trainer: Callable[..., Trainer], project: Path, tmp_path: Path) -> None:
    """Steps before the change are done again with their own size, and so is a damaged checkpoint's."""
    expected = lines(project.parent / "whole")
    trainer("train.exit_after=3", RAMP).fit()
    again = trainer("train.global_batch_size=4")  # planned from step 3 on already: nothing changes
    assert (again.iteration, again.stream.consumed) == (3, 8)
    again.stream.close()
    shutil.rmtree(tmp_path / "run")
    trainer("train.exit_after=2").fit()
    trainer("train.global_batch_size=4", "train.exit_after=3").fit()
    (tmp_path / "run" / "checkpoints" / "iteration_0000003" / "common.pt").write_bytes(b"")
    (tmp_path / "run" / "checkpoints" / "iteration_0000002" / "common.pt").write_bytes(b"")
    resumed = trainer("train.global_batch_size=4")
    assert (resumed.iteration, resumed.stream.consumed) == (1, 2)
    resumed.fit()
    assert lines(tmp_path / "run") == expected


def test_a_start_from_a_ramp(project: Path, tmp_path: Path) -> None:
    """init_from with position and schedule: the samples and stages before are those of the source."""
    source = project.parent / "whole" / "checkpoints" / "iteration_0000004"
    taken = [f"init_from.{name}=true" for name in ("optimizer", "schedule", "data")]
    begun = make(project, tmp_path / "run", f"init_from={source}", *taken, "train.global_batch_size=4")
    assert (begun.iteration, begun.stream.consumed) == (4, 12)
    begun.fit()
    assert lines(tmp_path / "run") == lines(project.parent / "whole")[4:]


def test_checkpoints_of_earlier_versions(trainer: Callable[..., Trainer], project: Path, tmp_path: Path) -> None:
    """They recorded no sizes: their config's alone. One whose count is another's is refused."""
    trainer("train.exit_after=2").fit()
    folder = find_checkpoint(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["batch_sizes"], manifest["checksum"]
    del manifest["config"]["train"]["batch_schedule"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    trainer("train.global_batch_size=4").fit()
    assert lines(tmp_path / "run") == lines(project.parent / "whole")
    newest = find_checkpoint(tmp_path / "run")
    foreign = dict(vars(read_manifest(newest))) | {"consumed_samples": 17}
    write_manifest(newest, type(read_manifest(newest))(**foreign))
    with pytest.raises(CheckpointError, match=r"its 5 iterations read 17 samples, which .*\(2, 4 from step 3 on\)"):
        trainer("train.global_batch_size=4")
