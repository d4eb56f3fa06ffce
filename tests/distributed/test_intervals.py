"""When a run evaluates, saves and is profiled, and what an evaluation tells, on one rank in this process."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import lines, trainer_of

from oryx_megatron.checkpoint import list_checkpoints, store
from oryx_megatron.train import evaluate
from oryx_megatron.train.preflight import checkpoints_held
from oryx_megatron.train.step import forward_backward
from oryx_megatron.train.trainer import Trainer


@pytest.fixture
def trainer(project: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer of a one-layer model in a fresh folder; called again it resumes."""
    return trainer_of(project, tmp_path, "train.iterations=4")


def saved(folder: Path) -> list[int]:
    return [store.iteration_of(path) for path in list_checkpoints(folder / "checkpoints")]


def test_steps_from_zero_on(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """Before the first step and after listed ones; those checkpoints stay, and step 0's resumes bit by bit."""
    settings = ("checkpoint.steps=[0, 1]", "checkpoint.keep=1", "evaluation.steps=[0, 3]", "checkpoint.interval=2")
    trainer(*settings).fit()
    assert saved(tmp_path) == [0, 1, 4]
    assert list(dict.fromkeys(line["iteration"] for line in lines(tmp_path, "evaluation"))) == [0, 3, 4]
    losses = [line["loss"] for line in lines(tmp_path, "step")]
    evaluations = lines(tmp_path, "evaluation")
    for path in list_checkpoints(tmp_path / "checkpoints")[1:]:
        (path / "manifest.json").unlink()
    resumed = trainer(*settings)
    assert resumed.iteration == 0
    resumed.fit()
    assert [line["loss"] for line in lines(tmp_path, "step")] == losses
    assert lines(tmp_path, "evaluation") == evaluations


def test_checkpoints_where_a_decay_ends_stay(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """They are what WSD-S is for; and room for them is counted."""
    settings = ("schedule.name=wsd", "schedule.decay=2", "schedule.restarts=[3, 6]", "train.iterations=9")
    opened = trainer(*settings, "checkpoint.interval=2", "checkpoint.keep=1")
    opened.fit()
    assert saved(tmp_path) == [3, 6, 9]
    assert list(dict.fromkeys(line["iteration"] for line in lines(tmp_path, "evaluation"))) == [3, 6, 9]
    assert checkpoints_held(opened.run) == 4  # and the one that is being written


def test_the_best_checkpoint_stays(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every saved step is evaluated, and the one with the lowest loss outlives newer ones, also over a resume."""
    from oryx_megatron.train import trainer as module

    wanted = {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: 2.0, 6: 3.5}
    evaluated: list[int] = []

    def pretend(*arguments: Any, **keywords: Any) -> list[evaluate.Evaluation]:
        evaluated.append(current[0].iteration)
        losses = {"recurrent": wanted[evaluated[-1]], "attention": 9.0 - evaluated[-1]}
        return [evaluate.Evaluation("valid", plan, loss, loss, 1, 0.5) for plan, loss in losses.items()]

    monkeypatch.setattr(module, "evaluate", pretend)
    settings = ("checkpoint.interval=1", "checkpoint.keep=1", "checkpoint.keep_best=valid/recurrent")
    settings += ("train.iterations=6",)
    current = [trainer(*settings, "train.exit_after=4")]
    current[0].fit()
    assert saved(tmp_path) == [2, 4]
    current[0] = trainer(*settings)
    current[0].fit()
    assert evaluated == [1, 2, 3, 4, 5, 6]
    assert saved(tmp_path) == [5, 6]


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_losses_by_mode_and_position(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, documents: str
) -> None:
    """Each equals the loss of an evaluation in which no other label counts."""
    opened = trainer(f"data.documents={documents}", "evaluation.batches=2", "evaluation.plans=[attention, 'ratio:0.5']")
    whole = opened.evaluate()
    assert whole[0].modes == {"attention": pytest.approx(whole[0].loss, rel=1e-6)}
    assert (whole[0].attention_share, whole[1].attention_share) == (1.0, 0.5)
    assert list(whole[1].modes) == ["recurrent", "attention"]
    assert set(whole[1].positions) <= {"12", "24", "48"}
    assert len(whole[1].positions) >= 2
    bounds = [0, *(int(bound) for bound in ("24", "48"))]

    def only(choose: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Loss under ratio:0.5 of the labels in the groups that `choose` is true for."""

        def run(chunks: Any, batches: list[Any], *, forward_only: bool) -> Any:
            kept = [dataclasses.replace(b, loss_mask=b.loss_mask * choose(b.groups), groups=None, group_count=0)
                    for b in batches]  # fmt: skip
            totals = forward_backward(chunks, kept, forward_only=forward_only)
            return dataclasses.replace(totals, sums=torch.cat((totals.sums, torch.zeros(6 * groups))))

        with monkeypatch.context() as patched:
            patched.setattr(evaluate, "forward_backward", run)
            return opened.evaluate()[1].loss

    groups = len(bounds) - 1
    found = {"recurrent": only(lambda g: g < groups), "attention": only(lambda g: g >= groups)}
    assert whole[1].modes == pytest.approx(found, rel=1e-6)
    places = {str(bounds[i + 1]): only(lambda g, i=i: g % groups == i) for i in range(groups)}  # type: ignore[misc]
    assert whole[1].positions == pytest.approx(places, rel=1e-6)
    opened.stream.close()


def test_profile(trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trace covers the asked steps alone, and the run computes what it computes without."""
    trainer("logging.profile=[2, 3]").fit()
    losses = [line["loss"] for line in lines(tmp_path, "step")]
    folder = tmp_path / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank0-steps2-3.trace.json.gz",
        "rank0-steps2-3.txt",
    ]
    with gzip.open(folder / "rank0-steps2-3.trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    # torch's own optimizer marks each of its steps
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2
    shown = capsys.readouterr().out
    assert f"profile of steps 2 to 3: {folder}/rank0-steps2-3.*" in shown
    printed = shown[shown.index("profile of steps") :].splitlines()
    heads = [next(i for i, line in enumerate(printed) if mark in line) for mark in
             ("calls  operator", "longest gaps", "largest allocations")]  # fmt: skip
    assert heads == [2, 13, 24]  # ten of each
    assert all(float(line.split()[0]) > 0 for line in printed[25:35])
    again = tmp_path / "again"
    trainer(f"output_dir={again}").fit()
    assert [line["loss"] for line in lines(again, "step")] == losses
    assert not (again / "profile").exists()
