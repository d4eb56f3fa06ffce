"""What a cluster does to a job of several ranks under torchrun: kills, hangs, signals; and losses as if it had not."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from fault_jobs import Job, losses

from oryx_megatron.checkpoint import list_checkpoints, read_manifest, store
from oryx_megatron.errors import HANG_EXIT_CODE
from oryx_megatron.testing.project import tiny_project
from oryx_megatron.train.history import read_events


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("project"))


def undisturbed(project: Path, folder: Path, *overrides: str) -> list[float]:
    with Job(project, folder, "checkpoint.interval=0", *overrides) as job:
        assert job.finish() == 0, job.log()
    return losses(folder)


def all_whole(folder: Path) -> bool:
    folders = list_checkpoints(folder / "checkpoints")
    return bool(folders) and all(store.damaged_files(path, read_manifest(path)) == [] for path in folders)


def resumed_from_the_newest(folder: Path) -> bool:
    """Whether every start resumed from the newest checkpoint: nothing but the steps since was lost."""
    newest = 0
    for event in read_events(folder):
        if event["event"] == "start" and event["iteration"] < newest:
            return False
        if event["event"] == "checkpoint" and "path" in event:  # complete; the run may be some steps further by then
            newest = store.iteration_of(Path(event["path"]))
    return newest > 0


def test_kills_hang_and_preemption(project: Path, tmp_path: Path) -> None:
    """One job lives through kill -9 of ranks, a rank that stops answering, and SIGTERM to a single rank."""
    settings = ("train.iterations=30", "checkpoint.interval=2", "checkpoint.keep=3", "faults.hang_timeout=8")
    settings += ("checkpoint.timeout=60",)  # on top of hang_timeout while a checkpoint is under way
    expected = undisturbed(project, tmp_path / "whole", settings[0])
    folder, rng, old = tmp_path / "run", random.Random(6), set[int]()
    with Job(project, folder, *settings, restarts=5) as job:
        for moment in ("step", "save", "start"):
            old = job.kill_at_random(rng, moment, old)

        # A rank that stops: the other one sees it, says so, and ends for torchrun to restart both.
        ranks, before = job.wait_for_ranks(old), job.iteration()
        job.wait_for(lambda: job.iteration() > before + 1 and job.iteration() % 2, "a step with no checkpoint after it")
        ranks[1].send_signal(signal.SIGSTOP)
        stacks = folder / "faults" / "stacks-rank0.txt"
        job.wait_for(lambda: "ending with" in job.log(), "the watchdog")
        ranks[1].send_signal(signal.SIGCONT)  # else torchrun kills it after half a minute
        text = stacks.read_text()
        assert "rank 0 (" in text
        assert "it waits in all_reduce" in text or "it waits in" in text
        assert "rank 1 (" in text.splitlines()[1]
        assert "gives no sign of life" in text.splitlines()[1]
        # The stack of the main thread: the step, what all agree on, or the poll of a checkpoint in the background.
        assert any(f" in {name}\n" in text for name in ("forward_backward", "exchange", "_complete"))
        assert f"ending with {HANG_EXIT_CODE}" in job.log()

        # Preempted: one rank gets the signal, all stop after the same step.
        ranks, before = job.wait_for_ranks({process.pid for process in ranks.values()}), job.iteration()
        job.wait_for(lambda: job.iteration() > before, "steps")
        os.kill(ranks[1].pid, signal.SIGTERM)
        assert job.finish() == 0, job.log()
    marker = json.loads((folder / "requeue").read_text())
    assert (marker["code"], marker["reason"]) == (75, "SIGTERM")
    assert store.iteration_of(list_checkpoints(folder / "checkpoints")[-1]) == marker["iteration"] < 30
    assert all_whole(folder)
    with Job(project, folder, *settings) as job:
        assert job.finish() == 0, job.log()
    assert not (folder / "requeue").exists()
    assert losses(folder) == expected
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["restarts"] >= 3  # all but the one killed before it began
    assert summary["resumes"] == 1
    assert summary["iterations"] == 30
    events = [event["event"] for event in read_events(folder)]
    assert events.count("stop") == events.count("end") == 1
    assert events.count("lost") >= 3
    assert resumed_from_the_newest(folder)
    log = (folder / "log").read_text()
    for fact in ("command: ", "code: commit ", "versions: python ", "layout: 2 ranks: ", "kernels: ", "seed 1234"):
        assert fact in log  # what it takes to do the run again
    assert "goodput" in log


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_fifty_kills(project: Path, tmp_path: Path, seed: int) -> None:
    """kill -9 of random ranks at random moments, ten times in each of five jobs."""
    settings = ("train.iterations=120", "checkpoint.interval=2", "checkpoint.keep=2")
    expected = undisturbed(project, tmp_path / "whole", settings[0])
    folder, rng, old = tmp_path / "run", random.Random(seed), set[int]()
    with Job(project, folder, *settings, restarts=10) as job:
        for _ in range(10):
            old = job.kill_at_random(rng, rng.choice(("step", "step", "save", "save", "start")), old)
        assert job.finish(600.0) == 0, job.log()
    assert losses(folder) == expected
    assert all_whole(folder)
    assert resumed_from_the_newest(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hang_ends_within_a_bound(project: Path, tmp_path: Path) -> None:
    """A rank that never answers again is killed by torchrun, and the job resumes."""
    settings = ("train.iterations=20", "checkpoint.interval=2", "faults.hang_timeout=5")
    # On top of hang_timeout where the rank stops during a save: by default half an hour.
    settings += ("checkpoint.timeout=30",)
    expected = undisturbed(project, tmp_path / "whole", settings[0])
    folder = tmp_path / "run"
    with Job(project, folder, *settings, restarts=1) as job:
        ranks = job.wait_for_ranks(set())
        job.wait_for(lambda: job.iteration() > 3, "steps")
        ranks[0].send_signal(signal.SIGSTOP)
        assert job.finish(300.0) == 0, job.log()
    assert "stacks-rank1.txt; ending with" in job.log()
    assert losses(folder) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hang_under_nvidia_resiliency_ext(project: Path, tmp_path: Path) -> None:
    """Its monitor, in a process of its own, ends ranks that make no progress; its launcher starts them again."""
    pytest.importorskip("nvidia_resiliency_ext", reason="pip install nvidia-resiliency-ext==0.4.1")
    settings = ("train.iterations=20", "checkpoint.interval=2", "logging.tensorboard=false")
    expected = undisturbed(project, tmp_path / "whole", settings[0])
    folder = tmp_path / "run"
    agent = ("nvidia_resiliency_ext.fault_tolerance.launcher", "--ft-rank-heartbeat-timeout=6")
    with Job(project, folder, *settings, restarts=2, agent=agent) as job:
        ranks = job.wait_for_ranks(set())
        job.wait_for(lambda: job.iteration() > 3, "steps")
        ranks[0].send_signal(signal.SIGSTOP)
        assert job.finish(300.0) == 0, job.log()
    assert "Did not get subsequent heartbeat" in job.log()
    assert losses(folder) == expected
    assert not (folder / "faults").exists()  # hang_timeout is off: the monitor saw it
