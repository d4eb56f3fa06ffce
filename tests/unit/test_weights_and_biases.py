"""Weights & Biases, by a stand-in for its package: who gets which id, and that nothing of it ends a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from oryx_megatron.train.callbacks import StepRecord
from oryx_megatron.train.callbacks.weights_and_biases import KEPT, WeightsAndBiases, run_id
from oryx_megatron.train.evaluate import Evaluation


class Wandb(ModuleType):
    """As much of wandb as is used, with its server: a run continues at the step after its last."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        self.names: list[str] = []
        self.finished = 0
        self.fails: dict[str, Exception] = {}

    def init(self, *, project: str, name: str, id: str, resume: str, config: dict[str, Any]) -> Any:
        self._may_fail("init")
        assert not set(id) & set(":;,#?/'="), "wandb: UsageError"
        assert resume == "allow"
        assert sys.stdin.isatty() is False
        self.names.append(name)
        history = self.runs.setdefault(id, {})
        server = self

        class Run:
            step = max(history, default=-1) + 1

            def log(self, numbers: dict[str, Any], step: int) -> None:
                server._may_fail("log")
                assert step >= max(history, default=0), "wandb: steps must increase"
                history.setdefault(step, {}).update(numbers)

            def finish(self) -> None:
                server._may_fail("finish")
                server.finished += 1

        return Run()

    def _may_fail(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    return module


def record(iteration: int, loss: float = 1.0) -> StepRecord:
    numbers = {field.name: 1.0 for field in dataclasses.fields(StepRecord) if field.type in ("float", "int")}
    return StepRecord(**(numbers | {"iteration": iteration, "loss": loss, "skipped": False}))  # type: ignore[arg-type]


def train(folder: Path, *steps: int, loss: float = 1.0) -> WeightsAndBiases:
    """A process that does these steps."""
    folder.mkdir(parents=True, exist_ok=True)
    reporter = WeightsAndBiases("p", folder, {})
    for step in steps:
        reporter.on_step(record(step, loss))
    reporter.on_end()
    return reporter


def test_runs_of_one_name_are_two(wandb: Wandb, tmp_path: Path) -> None:
    for parent in ("jan", "feb"):
        train(tmp_path / parent / "130m", 1)
    assert len(wandb.runs) == 2
    assert wandb.names == ["130m", "130m"]


def test_one_path_at_two_times_is_two(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ids = []
    for now in (1.0, 2.0):
        folder.mkdir()
        ids.append(run_id(folder, lambda now=now: now))
        shutil.rmtree(folder)
    assert ids[0] != ids[1]


def test_a_restart_resumes(wandb: Wandb, tmp_path: Path) -> None:
    """Also where the folder was moved; steps that are done again are sent once."""
    train(tmp_path / "run", 1, 2, 3, 4)
    (tmp_path / "run").rename(tmp_path / "moved")
    train(tmp_path / "moved", 3, 4, 5, loss=2.0)
    ((_, history),) = wandb.runs.items()
    losses = {step: numbers["train/loss"] for step, numbers in history.items()}
    assert losses == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0}
    assert wandb.finished == 2


def test_a_copy_is_another_run(wandb: Wandb, tmp_path: Path) -> None:
    train(tmp_path / "run", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train(tmp_path / "copy", 2)
    train(tmp_path / "run", 2)
    assert [list(history) for history in wandb.runs.values()] == [[1, 2], [2]]


@pytest.mark.parametrize("name", ["lr=3e-4:wd=0.1", "a'b;c,d#e?f", "größe 模型", "n" * 200, "$x$", "~"])
def test_runs_of_any_name_are_reported(
    wandb: Wandb, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / name, 1)
    assert wandb.names == [name[:128]]
    ((identity, history),) = wandb.runs.items()
    assert json.loads((tmp_path / name / KEPT).read_text())["id"] == identity
    assert list(history) == [1]
    assert not caplog.records


ODD = ["", "{", "[]", '{"id": 5}', '{"id": "a/b", "path": "/x"}', '{"id": "a"}', "[" * 100_000]


@pytest.mark.parametrize("content", ODD, ids=lambda text: text[:20])
def test_a_damaged_file(wandb: Wandb, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    """A new id, which is kept from then on."""
    (tmp_path / KEPT).write_text(content)
    train(tmp_path, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/{KEPT} is damaged: Weights & Biases will show a new run"
    ]
    train(tmp_path, 2)
    assert [list(history) for history in wandb.runs.values()] == [[1, 2]]


@pytest.mark.parametrize("what", ["init", "log", "finish"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("No API key configured.\nUse `wandb login`"), OSError("no such host"), TimeoutError(), KeyError("x")],
    ids=lambda error: type(error).__name__,
)
def test_the_run_continues_without_it(
    wandb: Wandb, tmp_path: Path, what: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.fails[what] = error
    reporter = train(tmp_path, 1, 2, 3)
    reporter.on_evaluation(3, [Evaluation("valid", "attention", 1.0, 1.0, 1, 1.0)])
    (told,) = caplog.records
    why = (str(error).splitlines() or [type(error).__name__])[0]
    assert told.getMessage().startswith(f"Weights & Biases: {why}; training continues without it")


def test_a_package_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    train(tmp_path / "run", 1)
    assert "No module named 'a_package_that_is_missing'; training continues without it" in caplog.text
