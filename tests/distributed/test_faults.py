"""Bad numbers, stops and failing disks, on one rank in this process; several ranks are in test_faults_torchrun.py."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import trainer_of

from oryx_megatron import compat, parallel
from oryx_megatron.checkpoint import list_checkpoints, read_manifest, safe, store
from oryx_megatron.checkpoint.manifest import file_digest, write_manifest
from oryx_megatron.config import load_run, validate
from oryx_megatron.config.schema import FaultsConfig
from oryx_megatron.data.loader import Blend
from oryx_megatron.errors import CheckpointError, ConfigError, TrainingError
from oryx_megatron.testing import run_distributed
from oryx_megatron.train import lock, signals
from oryx_megatron.train.bad_steps import record_path
from oryx_megatron.train.callbacks import Callback, StepRecord
from oryx_megatron.train.guard import Guard, Prolonged
from oryx_megatron.train.history import read_events
from oryx_megatron.train.replay import read_record, replay, report
from oryx_megatron.train.schedule import learning_rate
from oryx_megatron.train.trainer import Trainer


@pytest.fixture
def trainer(project: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer of a one-layer model in a fresh folder; called again it resumes."""
    return trainer_of(project, tmp_path, "data.split=[9, 0, 1]", "checkpoint.interval=1")


class At(Callback):
    """Does something after one step, once."""

    def __init__(self, iteration: int, action: Callable[[], object]) -> None:
        self.iteration, self.action, self.done = iteration, action, False

    def on_step(self, record: StepRecord) -> None:
        if record.iteration == self.iteration and not self.done:
            self.done = True
            self.action()


def steps(folder: Path, field: str) -> list[Any]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[field] for line in lines if line["kind"] == "step"]


def poison_weight(opened: Trainer) -> None:
    """What a broken device may do to a weight."""
    with torch.no_grad():
        opened.engine.optimizer.get_parameters()[0].view(-1)[3] = float("nan")
        next(iter(opened.engine.chunks[0].parameters())).view(-1)[3] = float("nan")


def poison_next_gradient(opened: Trainer) -> None:
    parameter = next(iter(opened.engine.chunks[0].parameters()))
    handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])


# ------------------------------------------------------------------------------------------------------ bad numbers


def test_one_bad_gradient(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """The update is left out on its own, and the batch can be computed again."""
    opened = trainer("train.iterations=4")
    before: list[torch.Tensor] = []

    def remember() -> None:
        poison_next_gradient(opened)
        before.extend(parameter.detach().clone() for parameter in opened.chunks[0].parameters())

    def compare() -> None:
        assert all(torch.equal(a, b) for a, b in zip(before, opened.chunks[0].parameters()))
        compared.append(True)

    compared: list[bool] = []
    opened.callbacks.extend([At(2, remember), At(3, compare)])
    assert opened.fit() is None
    assert compared
    assert steps(tmp_path, "skipped") == [False, False, True, False]
    # No checkpoint between bad steps: it might keep what went wrong.
    assert [store.iteration_of(folder) for folder in list_checkpoints(tmp_path / "checkpoints")] == [1, 2, 4]
    record = read_record(record_path(tmp_path, 3))
    assert (record["iteration"], record["reason"], record["consumed_samples"]) == (3, "gradient is not finite", 4)
    (rank,) = record["ranks"]
    assert [microbatch["samples"] for microbatch in rank["microbatches"]] == [[4, 5]]
    assert rank["gradients_not_finite"]["count"] == 1
    assert record["loss"] == steps(tmp_path, "loss")[2]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = replay(trainer("train.iterations=4", before=3, reports=False), record)
    assert again["loss"] == record["loss"]  # same weights, samples and plan
    assert again["reason"] is None
    assert "good step" in "\n".join(report(record, again))
    assert "from the checkpoint of step 2\n" in "\n".join(report(record, again))
    assert not again["other_samples"]
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_steps"] == 1


def test_rollback(trainer: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A weight is lost after step 3, and so is in its checkpoint: that one is tried first, then the one before."""
    settings = ("train.iterations=9", "faults.bad_steps=2", "checkpoint.keep=0")
    opened = trainer(*settings)
    opened.callbacks.insert(0, At(3, lambda: poison_weight(opened)))
    assert opened.fit() is None
    assert "step 5: loss is not finite, 2 steps in a row: rollback to the checkpoint of step 3" in caplog.text
    assert "rollback to the checkpoint of step 2" in caplog.text
    # Steps 4 and 5 read samples 6–9, again 10–13 after the first rollback; step 3 now begins behind them.
    assert steps(tmp_path, "iteration") == list(range(1, 10))
    assert not any(steps(tmp_path, "skipped"))
    assert steps(tmp_path, "consumed_samples") == [2, 4, *range(16, 30, 2)]
    events = [event for event in read_events(tmp_path) if event["event"] == "rollback"]
    assert [(event["iteration"], event["to"], event["samples"]) for event in events] == [(5, 3, 4), (5, 2, 10)]
    for folder in list_checkpoints(tmp_path / "checkpoints")[2:]:
        manifest = read_manifest(folder)
        assert manifest.consumed_samples == 2 * manifest.iteration + 10
        assert manifest.guard["skipped_samples"] == 10
    # A resumed run skips the same samples.
    losses = steps(tmp_path, "loss")
    for folder in list_checkpoints(tmp_path / "checkpoints")[6:]:
        shutil.rmtree(folder)
    resumed = trainer(*settings)
    assert resumed.iteration == 6
    resumed.fit()
    assert steps(tmp_path, "loss") == losses
    # The samples that the run skipped are missing at its end: the first ones are read once more.
    assert torch.equal(resumed.open_stream().dataset[18]["tokens"], resumed.datasets["train"][0]["tokens"])
    record = read_record(record_path(tmp_path, 5))  # of the first time, from the checkpoint that is to blame itself
    again = replay(trainer(*settings, before=5, reports=False), record)
    assert (again["start"], again["other_samples"]) == (4, True)
    assert "not as in the run: it rolled back since" in "\n".join(report(record, again))


def test_samples_for_skipped_ones_are_of_the_last_stage() -> None:
    """A run that skipped some ends its last stage with samples of that stage, not of the first."""

    class Numbers(Blend):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"tokens": torch.tensor(index)}

    class Longer(Prolonged, Numbers):
        pass

    stages = [{"start": 0, "stop": 7}, {"start": 7, "stop": 10}]
    for found, last in ((stages, [7, 8, 9, 7, 8]), (stages[:1], [0, 1, 2, 3, 4])):
        longer = Longer(Numbers("train", [], None, 10, (), {"stages": found}), 5)
        assert [int(longer[i]["tokens"]) for i in range(len(longer))] == [*range(10), *last]


def test_giving_up(trainer: Callable[..., Trainer]) -> None:
    """Numbers that stay bad, with and without a checkpoint for a rollback, end the run in one line."""
    opened = trainer("train.iterations=9", "faults.bad_steps=2", "faults.max_rollbacks=1", "checkpoint.interval=3")
    parameter = next(iter(opened.engine.chunks[0].parameters()))
    opened.callbacks[:] = [At(3, lambda: parameter.register_hook(lambda gradient: gradient * float("nan")))]
    with pytest.raises(TrainingError, match=r"^step 5: gradient is not finite, 2 steps .* again after 1 rollbacks "):
        opened.fit()
    first = trainer("train.iterations=9", "faults.bad_steps=2", f"output_dir={opened.folder}/other")
    poison_weight(first)
    with pytest.raises(TrainingError, match=r"step 2: .*no checkpoint before them for a rollback"):
        first.fit()


def test_loss_spike(trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose loss jumps is left out, and a resumed run remembers the losses that it is judged by."""
    from oryx_megatron.train import engine as module

    settings = ("train.iterations=8", "faults.spike=6", "faults.spike_window=8", "optimizer.lr=1e-5")
    computed = module.forward_backward

    def jump(*arguments: Any, **keywords: Any) -> Any:
        totals = computed(*arguments, **keywords)
        if current[0].iteration == 5:
            totals.sums[0] *= 3
        return totals

    monkeypatch.setattr(module, "forward_backward", jump)
    current = [trainer(*settings, "train.exit_after=5")]
    current[0].fit()
    current[0] = trainer(*settings)
    assert len(current[0].guard.losses) == 5
    current[0].fit()
    assert steps(tmp_path, "skipped") == [False] * 5 + [True, False, False]
    assert "is a spike above" in read_record(record_path(tmp_path, 6))["reason"]


def test_running_median() -> None:
    guard = Guard(FaultsConfig(spike=5.0, spike_window=8))
    assert guard.limit() is None
    for loss in (2.0, 2.1, 1.9, 2.0):
        guard.good(loss)
    assert guard.limit() == pytest.approx(2.0 + 5 * 1.4826 * 0.05)
    assert guard.reason(2.3, 1.0) is None
    assert guard.reason(2.5, 1.0) is not None
    assert Guard(FaultsConfig()).reason(1e9, 1.0) is None


# ------------------------------------------------------------------------------------------------------------ stops


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)
def test_signals(trainer: Callable[..., Trainer], tmp_path: Path, number: signal.Signals) -> None:
    """The step is finished, a checkpoint written and the marker left; the next start resumes and removes it."""
    settings = ("train.iterations=4", "checkpoint.interval=0")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    stop = signals.StopRequest().install()
    try:
        opened = trainer(*settings, stop=stop)
        opened.callbacks.extend([At(2, lambda: os.kill(os.getpid(), number))])
        stopped = opened.fit()
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)
    assert stopped == signals.Stop(number.name, 3)  # noticed in the step that was under way
    marker = json.loads((tmp_path / "requeue").read_text())
    assert (marker["code"], marker["reason"], marker["iteration"]) == (75, number.name, 3)
    assert [read_manifest(folder).iteration for folder in list_checkpoints(tmp_path / "checkpoints")] == [3]
    resumed = trainer(*settings)
    assert not (tmp_path / "requeue").exists()
    assert resumed.fit() is None
    assert steps(tmp_path, "iteration") == [1, 2, 3, 4]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["resumes"], summary["restarts"], summary["iterations"]) == (1, 0, 4)


def test_another_run_in_the_folder(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """Refused before anything is touched; replay reads beside it; the end of a run leaves no lock."""
    trainer("train.iterations=1").fit()
    assert not (tmp_path / "lock").exists()
    with subprocess.Popen(["sleep", "100"]) as other:
        identity = lock._identity() | {"pid": other.pid, "birth": lock._birth(other.pid), "token": "another's"}
        (tmp_path / "lock").write_text(json.dumps(identity))
        (tmp_path / "requeue").touch()
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(ConfigError, match=rf"is in use by process {other.pid} on "):
            trainer("train.iterations=2")
        assert trainer("train.iterations=2", reports=False).iteration == 1
        assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        other.kill()
    assert trainer("train.iterations=2").fit() is None
    assert not (tmp_path / "lock").exists()


def test_what_is_told_on_resume(trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    """A learning rate that jumps, before it trains; and that nothing is left to do."""
    settings = ("optimizer.lr=2e-3", "schedule.min_lr=2e-4", "checkpoint.interval=0")
    opened = trainer("train.iterations=4", *settings)
    opened.fit()
    last = opened.callbacks and steps(opened.folder, "lr")[-1]
    assert not caplog.records or "jumps" not in caplog.text
    longer = trainer("train.iterations=16", "train.exit_after=5", *settings)
    assert f"the learning rate jumps from {last:.3g} in step 4 to {longer.engine.learning_rate():.3g} in step 5: " in (
        caplog.text
    )
    assert (
        "train.iterations 4 → 16; to warm up again from there: schedule.restarts=[4] schedule.rewarm=N" in caplog.text
    )
    longer.fit()
    assert steps(longer.folder, "lr")[-1] == pytest.approx(1.738e-3, rel=1e-3)  # cosine at 4 of 16
    caplog.clear()
    trainer("train.iterations=16", *settings)
    assert "jumps" not in caplog.text
    caplog.set_level("INFO", "oryx_megatron")
    trainer("train.iterations=16", "train.exit_after=3", *settings).fit()
    assert "already at iteration 5, train.exit_after=3; increase or remove it to continue" in caplog.text
    caplog.clear()
    trainer("train.iterations=5", *settings).fit()
    assert "already at train.iterations=5; increase it to continue" in caplog.text


def test_exit_after_and_changes(
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that pauses has stopped, not ended; what differs at the next start is told and kept; losses agree."""
    caplog.set_level("INFO", "oryx_megatron")
    settings = ("train.iterations=5", "checkpoint.interval=0", "logging.interval=4")
    assert trainer(*settings, "train.exit_after=3").fit() is None
    shown = capsys.readouterr().out
    assert "stopped after step 3 (train.exit_after); checkpoint saved\n  increase or remove it to continue\n" in shown
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "checkpoint", "stop"]
    assert not (tmp_path / "requeue").exists()
    trainer(*settings, "optimizer.lr=1e-3", "optimizer.clip_grad=0.5").fit()
    assert "changed since the checkpoint: optimizer.lr 0.005 → 0.001" in caplog.text
    events = [event for event in read_events(tmp_path) if event["event"] == "change"]
    assert [(event["iteration"], event["field"], event["before"], event["after"]) for event in events] == [
        (3, "optimizer.lr", 0.005, 0.001),
        (3, "optimizer.clip_grad", 1.0, 0.5),
    ]
    shown = capsys.readouterr().out
    losses = steps(tmp_path, "loss")
    lines = [line for line in shown.splitlines() if "/5 " in line]
    assert (
        [float(line.split()[1]) for line in lines]
        == [  # the first with the steps before the resume
            pytest.approx(sum(losses[:4]) / 4, abs=5e-5),
            pytest.approx(losses[4], abs=5e-5),
        ]
    )
    assert f"final training loss {losses[4]:.4f} (step 5)" in shown
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] == losses[4]


def test_ctrl_c_answers_at_once(
    trainer: Callable[..., Trainer], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What will follow is told when the signal comes; before the first step nothing is saved."""
    stop = signals.StopRequest(main=True).install()
    try:
        opened = trainer("train.iterations=3", stop=stop)
        capfd.readouterr()
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == (
            "SIGINT: finishing what is under way, then saving a checkpoint; Ctrl-C again ends at once, without saving\n"
        )
        os.kill(os.getpid(), signal.SIGTERM)
        assert opened.fit() == signals.Stop("SIGTERM and SIGINT", 0)
    finally:
        stop.restore()
    told = capfd.readouterr()
    assert "finishing" not in told.err
    assert "stopped after step 0 (SIGTERM and SIGINT); nothing is saved\n  rerun the command to resume\n" in told.out
    assert not list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("iterations", [2, 5, 9, 12, 19, 30])
def test_short_wsd_decays(project: Path, iterations: int) -> None:
    """At least one step of a run is trained at a lower rate, and an explicit decay of none at all is refused."""
    wsd = ("schedule.name=wsd", f"train.iterations={iterations}", "optimizer.lr=1e-3", "schedule.decay_shape=linear")
    run = load_run(project, [*wsd])
    validate(run, 1)
    rates = [learning_rate(run, done) for done in range(iterations)]
    lowered = max(1, iterations // 10 - 1)
    assert rates[: iterations - lowered] == [1e-3] * (iterations - lowered)
    assert rates[iterations - lowered] < 1e-3
    assert rates == sorted(rates, reverse=True)
    with pytest.raises(ConfigError, match=r"^schedule.decay: 1 lowers the learning rate of no step"):
        validate(load_run(project, [*wsd, "schedule.decay=1"]), 1)
    validate(load_run(project, [*wsd, "schedule.decay=0"]), 1)


def test_told_to_stop_in_the_last_step(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """The evaluation that is due then is left to the next start, which the marker asks for."""
    settings = ("train.iterations=3", "checkpoint.interval=0", "data.split=[8,2,0]")
    stop = signals.StopRequest().install()
    try:
        opened = trainer(*settings, stop=stop)
        opened.callbacks.extend([At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))])
        assert opened.fit() == signals.Stop("SIGTERM", 3)
    finally:
        stop.restore()
    assert (tmp_path / "requeue").exists()
    assert trainer(*settings).fit() is None
    assert not (tmp_path / "requeue").exists()
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds[:3] == ["step"] * 3
    assert "evaluation" in kinds[3:]


def test_nohup(trainer: Callable[..., Trainer]) -> None:
    """What ignores SIGHUP from the start keeps ignoring it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = signals.StopRequest().install()
    try:
        opened = trainer("train.iterations=2", stop=stop)
        opened.callbacks.extend([At(1, lambda: os.kill(os.getpid(), signal.SIGHUP))])
        assert opened.fit() is None
    finally:
        stop.restore()
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_second_interrupt() -> None:
    """The copy that torchrun delivers of one Ctrl-C does not count; a second Ctrl-C ends the process."""
    stop = signals.StopRequest().install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.notes() == [0.0, 0.0, 1.0, 0.0, 0.0]
        time.sleep(signals.ECHO + 0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()


def test_time_limit(trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to the end of the job each start does one step, saves it and asks for the next."""
    monkeypatch.setenv(signals.TIME_LIMIT_AT, str(time.time() + 10))
    for iteration in (2, 4):
        opened = trainer("train.iterations=9", "faults.time_margin=20", "checkpoint.interval=0")
        assert opened.fit() == signals.Stop("time limit", iteration)
    monkeypatch.setenv(signals.TIME_LIMIT_AT, str(time.time() + 1000))
    assert trainer("train.iterations=5").fit() is None
    monkeypatch.setenv(signals.TIME_LIMIT_AT, "tomorrow")
    with pytest.raises(ConfigError, match="ORYX_TIME_LIMIT_AT: 'tomorrow' is no unix time"):
        trainer()


def test_limits_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(signals.TIME_LIMIT_AT, raising=False)
    stop = signals.StopRequest()
    stop.limit_time(FaultsConfig(time_limit=1e9, time_margin=1.0))
    assert stop.notes() == [0.0] * 5
    assert stop.notes(longest=1e9)[-1] == 1.0  # a save takes longer than the margin
    stop.limit_time(FaultsConfig(time_limit=1e-3, time_margin=0.0))
    assert stop.notes()[-1] == 1.0
    assert stop.notes(started=False)[-1] == 0.0


# -------------------------------------------------------------------------------------------------------- slow ranks


def with_a_slow_rank(config: Path, folder: Path) -> None:
    """Rank 1 takes its time for every batch."""
    from oryx_megatron.train import trainer as module

    run = load_run(
        config,
        ["model.num_layers=1", "train.global_batch_size=4", "train.iterations=6", "data.split=[1,0,0]",
         "logging.interval=2", f"output_dir={folder}"],
    )  # fmt: skip
    parallel.initialize(run.parallel, seed=1)
    made = module.training_batches
    if torch.distributed.get_rank() == 1:

        def slow(*arguments: Any, **keywords: Any) -> Any:
            time.sleep(0.5)
            return made(*arguments, **keywords)

        module.training_batches = slow
    Trainer(run, validate(run, 2)).fit()
    parallel.destroy()


def test_a_slow_rank_is_named(project: Path, tmp_path: Path) -> None:
    run_distributed(with_a_slow_rank, 2, project, tmp_path)
    events = [event for event in read_events(tmp_path) if event["event"] == "slow"]
    assert [event["iteration"] for event in events][-2:] == [4, 6]  # in step 2 the first step's warm-up may hide it
    for event in events[-2:]:
        assert re.match(r"rank 1 \(.+\) is slow: \d\.\d+ s for its part of a step, its peers take ", event["text"])


# ------------------------------------------------------------------------------------------------------- full disks


COMMON_STATE = "a writer failed" if compat.megatron.since(0, 19) else "could not start to save"


@pytest.mark.parametrize(
    ("limit", "asynchronous", "cause"),
    [
        (1_000, "false", f"{COMMON_STATE} .*is the disk full"),
        (20_000, "true", "a writer failed .*is the disk full"),
    ],
    ids=["common state", "tensors"],
)
def test_disk_fills_up(
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    limit: int,
    asynchronous: str,
    cause: str,
) -> None:
    """Writing fails for real, by a limit on the size of files: the run continues, and later saves are good again."""
    opened = trainer("train.iterations=4", f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=0")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        opened.saver.wait()  # the save of step 1, in the background
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def lift() -> None:
        opened.saver.wait()  # a save in the background must have met the limit by now
        assert [path.name for path in opened.checkpoints.root.iterdir()] == ["iteration_0000001"]  # it keeps no room
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        opened.callbacks.extend([At(2, fill), At(3, lift)])
        opened.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert re.search(cause, caplog.text)
    assert "training continues, the last good checkpoint stays" in caplog.text
    assert [store.iteration_of(folder) for folder in list_checkpoints(tmp_path / "checkpoints")] == [1, 3, 4]
    assert steps(tmp_path, "iteration") == [1, 2, 3, 4]  # lines that found no room are written later
    assert trainer("train.iterations=4").iteration == 4


# -------------------------------------------------------------------------------------------------------- hostile files


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "object"])
def test_hostile_checkpoint(trainer: Callable[..., Trainer], tmp_path: Path, file: str) -> None:
    """A run that resumes from a checkpoint made to run code, with right checksums, ends in one line and runs none."""
    trainer("train.iterations=1").fit()
    (folder,) = list_checkpoints(tmp_path / "checkpoints")
    bomb = Bomb(tmp_path / "bomb")
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(bomb))
    elif file == "common.pt":
        torch.save(bomb, folder / file)
    else:  # the extra state of a layer lies among the tensors
        metadata = safe.read_metadata(folder)
        index = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
        data = io.BytesIO()
        torch.save([bomb], data)
        place = metadata.storage_data[index]
        tensors = (folder / place.relative_path).read_bytes()
        place.offset, place.length = len(tensors), len(data.getvalue())
        (folder / place.relative_path).write_bytes(tensors + data.getvalue())
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest = read_manifest(folder)
    manifest.files.update({name: file_digest(folder / name) for name in manifest.files})
    write_manifest(folder, manifest)
    with pytest.raises(CheckpointError, match=r"is damaged|hostile \(it names posix.mkdir") as error:
        trainer("train.iterations=2")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bomb").exists()
