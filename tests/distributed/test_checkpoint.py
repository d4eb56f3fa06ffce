"""Checkpoints: exact resume, any layout to any layout, and what happens when saving or loading goes wrong."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from tiny_runs import BF16_HALF, CHANGED, CONSUMED, HALF, RESUMED, STEPS, VARIANTS, Runs, trainer_of

from oryx_megatron import compat
from oryx_megatron.checkpoint import list_checkpoints, read_manifest, store
from oryx_megatron.config import load_run, validate
from oryx_megatron.errors import CheckpointError, DataError
from oryx_megatron.train.trainer import Trainer

pytestmark = pytest.mark.timeout(1000)  # whichever test is first makes all runs
WRITE_ALL = "write_preloaded_data_multithread" if compat.megatron.since(0, 19) else "write_preloaded_data_multiproc"
variants = pytest.mark.parametrize("variant", VARIANTS)


# ------------------------------------------------------------------------------------------ resume, as it was or not


@variants
def test_resume_is_exact(runs: Runs, variant: str) -> None:
    """Stopped half-way and resumed under the same layout, saved in the background: bit for bit the same."""
    whole, resumed = f"{variant} {RESUMED[variant]}", f"{variant} resumed"
    assert len(runs.losses(resumed)) == STEPS
    for field in ("loss", "grad_norm", "lr", "attention_share", "consumed_samples", "iteration"):
        assert runs.steps(resumed, field) == runs.steps(whole, field)
    assert runs.evaluations(resumed) == runs.evaluations(whole)


@pytest.mark.parametrize(
    ("variant", "source", "target"), [(variant, *pair) for variant in VARIANTS for pair in CHANGED[variant]]
)
def test_resume_under_another_layout(runs: Runs, variant: str, source: str, target: str) -> None:
    """Equal evaluation right after loading; then the losses of the run never stopped, so the optimizer came along."""
    name = f"{variant} {source} to {target}"
    assert runs.loaded(name) == pytest.approx(runs.evaluations(f"{variant} {source}", HALF), rel=1e-5)
    assert runs.losses(name) == pytest.approx(runs.losses(f"{variant} 1x1x1")[HALF:], rel=1e-4)
    assert runs.evaluations(name) == pytest.approx(runs.evaluations(f"{variant} 1x1x1"), rel=1e-4)


def test_resume_of_bf16(runs: Runs) -> None:
    """fp32 master weights and moments come along: exact under one layout, near under another."""
    assert runs.losses("gdn bf16 resumed") == runs.losses("gdn bf16")[BF16_HALF:]
    assert runs.losses("mamba2 bf16 resumed") == pytest.approx(runs.losses("mamba2 bf16")[BF16_HALF:], rel=5e-3)


@variants
def test_manifest(runs: Runs, variant: str) -> None:
    folder = runs.root / f"{variant} 2x1x1" / "checkpoints" / f"iteration_{HALF:07d}"
    manifest = read_manifest(folder)
    assert (manifest.iteration, manifest.consumed_samples) == (HALF, CONSUMED[variant])
    run = manifest.run()
    assert run.model.mixer == variant
    assert (run.parallel.tensor, run.train.iterations) == (2, STEPS)
    assert run == load_run(runs.root / f"{variant} 2x1x1" / "config.yaml")
    assert manifest.layout == {"tp": 2, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}
    assert manifest.rng["seed"] == run.seed
    assert manifest.versions["torch"] == importlib.metadata.version("torch")  # without a wheel's +cu130
    assert {"python", "megatron-core", "numpy"} <= set(manifest.versions)
    assert manifest.commit is None or len(manifest.commit.removesuffix("+changes")) == 40
    assert manifest.data["train"]["consumed"] == CONSUMED[variant]
    assert manifest.data["tokenizer"]["vocab_size"] == run.model.vocab_size
    assert {e["plan"]: e["loss"] for e in manifest.evaluations} == runs.evaluations(f"{variant} 2x1x1", HALF)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} <= set(manifest.files)
    assert ("common.pt" in manifest.files) == (not compat.megatron.since(0, 19))
    assert store.damaged_files(folder, manifest) == []


def test_a_writer_that_fails_on_one_rank(runs: Runs) -> None:
    """The save counts as failed on all ranks, the run continues, and the next save is good."""
    folders = list_checkpoints(runs.root / "gdn broken writer" / "checkpoints")
    assert [store.iteration_of(folder) for folder in folders] == [1, 3, 5]
    assert len(runs.losses("gdn broken writer")) == 5
    assert len(list(folders[0].parent.iterdir())) == 3
    for folder in folders:
        assert store.damaged_files(folder, read_manifest(folder)) == []


# -------------------------------------------------------------------------------------------- one rank, in this process


@pytest.fixture
def trainer(project: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer of a one-layer model in a fresh folder; called again it resumes."""
    return trainer_of(project, tmp_path, "train.iterations=3", "data.split=[9, 0, 1]")


def iterations(trainer: Trainer) -> list[int]:
    return [store.iteration_of(folder) for folder in list_checkpoints(trainer.checkpoints.root)]


def test_retention(trainer: Callable[..., Trainer]) -> None:
    trainer("train.iterations=5", "checkpoint.interval=1", "checkpoint.keep=2", "checkpoint.keep_every=2").fit()
    resumed = trainer("train.iterations=5")
    assert (resumed.iteration, iterations(resumed)) == (5, [2, 4, 5])
    assert sorted(path.name for path in resumed.checkpoints.root.iterdir()) == [
        *("iteration_0000002", "iteration_0000004", "iteration_0000005"),
    ]


def test_damaged_checkpoints(trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    """Each kind of damage is named, and the checkpoint before it is used; when none is left, that is said."""
    first = trainer("checkpoint.interval=1", "checkpoint.keep=0")
    first.fit()
    root = first.checkpoints.root
    one, two, three = list_checkpoints(root)

    def resumed(expected: int, *words: str) -> Trainer:
        caplog.clear()
        again = trainer()
        assert again.iteration == expected
        for word in words:
            assert word in caplog.text
        return again

    data = bytearray((three / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (three / "__0_0.distcp").write_bytes(data)
    again = resumed(2, "iteration_0000003 is damaged (__0_0.distcp)", "the checkpoint before it")
    # Resuming from there gives the losses of the first time and replaces the damaged one.
    losses = [json.loads(line)["loss"] for line in (root.parent / "metrics.jsonl").read_text().splitlines()]
    again.fit()
    assert losses == [json.loads(line)["loss"] for line in (root.parent / "metrics.jsonl").read_text().splitlines()]
    resumed(3)

    manifest = (three / "manifest.json").read_text()
    (three / "manifest.json").write_text(manifest.replace('"consumed_samples": 6', '"consumed_samples": 7'))
    resumed(2, "iteration_0000003 is damaged", "manifest.json", "checksum does not fit")
    newer = json.dumps(json.loads(manifest) | {"format": 2})
    (three / "manifest.json").write_text(newer)
    with pytest.raises(CheckpointError, match=r"iteration_0000003/manifest.json: format 2 is of a newer version"):
        trainer()  # and not past it, to overwrite it later
    (three / "manifest.json").write_text(manifest)
    three.rename(three.with_name("iteration_0000009"))
    resumed(2, "iteration_0000009 is the checkpoint of iteration 3, renamed or copied")
    three.with_name("iteration_0000009").rename(three)
    os.truncate(three / "manifest.json", 100)
    resumed(2, "iteration_0000003 is damaged", "manifest.json")
    (three / "manifest.json").unlink()
    resumed(2, "iteration_0000003", "no manifest.json")
    (two / "metadata.json").unlink()
    resumed(1, "iteration_0000002 is damaged (metadata.json)")
    os.truncate(one / ".metadata", 10)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(.*3, .*2, .*1\); restore one") as error:
        trainer()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("model.hidden_size=48", CheckpointError, r"model tiny, which differs in hidden_size \(there 32, here 48\)"),
        ("model.mixer=mamba2", CheckpointError, "differs in mixer"),
        ("model.norm_epsilon=1e-6", CheckpointError, "differs in norm_epsilon"),
        ("seed=7", DataError, "data had seed 1234, now it is 7"),
        ("data.sequence_length=40", DataError, "sequence_length 48, now it is 40"),
        ("parallel.distributed_optimizer=false", CheckpointError, r"distributed_optimizer true, .*; set it back"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_foreign_checkpoint(
    trainer: Callable[..., Trainer], tmp_path: Path, one_save: Path, override: str, error: type, message: str
) -> None:
    shutil.copytree(one_save, tmp_path / "checkpoints")
    with pytest.raises(error, match=message) as raised:
        trainer(override)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def one_save(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run of one step."""
    folder = tmp_path_factory.mktemp("saved")
    small = ("model.num_layers=1", "train.global_batch_size=2", "data.split=[9, 0, 1]", "train.exit_after=1")
    run = load_run(project, [*small, "train.iterations=3", f"output_dir={folder}"])
    Trainer(run, validate(run, 1)).fit()
    return folder / "checkpoints"


def test_what_may_change(trainer: Callable[..., Trainer], one_save: Path, tmp_path: Path) -> None:
    """Names, schedules and microbatches are no part of a checkpoint's identity."""
    shutil.copytree(one_save, tmp_path / "checkpoints")
    changed = ("model.name=other", "model.recurrence_chunk=8", "train.micro_batch_size=1", "optimizer.lr=3e-4")
    changed += ("schedule.name=constant", "schedule.warmup=0", "optimizer.beta1=0.5", "optimizer.epsilon=1e-5")
    resumed = trainer(*changed, "train.iterations=2")
    assert resumed.iteration == 1
    for group in resumed.engine.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.5, 0.95), 1e-5)
    resumed.fit()
    assert resumed.iteration == 2
    assert resumed.engine.learning_rate() == 3e-4


def test_checkpoints_of_another_program(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "iter_0000100").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds iter_0000100, which is no checkpoint of this project"):
        trainer()


@pytest.mark.parametrize("stop_in", ["write_manifest", "commit", "apply_retention"])
def test_interrupted_save(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stop_in: str
) -> None:
    """A process that ends anywhere in a save leaves the last good checkpoint, and no trace after the next save."""
    from oryx_megatron.checkpoint import manager

    def die(*arguments: object, **named: object) -> None:
        raise SystemExit("killed")

    first = trainer("checkpoint.interval=1", "checkpoint.keep=1", "train.iterations=2")
    first.callbacks.clear()
    first.step()
    first.save()
    first.step()
    with monkeypatch.context() as patched:
        patched.setattr(manager if stop_in == "write_manifest" else store, stop_in, die)
        with pytest.raises(SystemExit):
            first.save()
    first.stream.close()
    second = trainer("checkpoint.interval=1", "checkpoint.keep=1", "train.iterations=2")
    assert second.iteration == (2 if stop_in == "apply_retention" else 1)
    assert "damaged" not in caplog.text
    second.fit()
    if stop_in != "apply_retention":
        assert [path.name for path in second.checkpoints.root.iterdir()] == ["iteration_0000002"]
    assert trainer("train.iterations=2").iteration == 2


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_writer_fails(
    trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asynchronous: str,
) -> None:
    """A failed save is reported with its cause and the run continues; a failed last save is the run's failure."""
    opened = trainer("checkpoint.interval=1", f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=0")
    written = FileSystemWriterAsync.write_preloaded_data

    def broken(*arguments: object, **keywords: object) -> object:
        path = Path(keywords["write_bucket"][0])  # type: ignore[index]
        if path.parent.name != ".writing_0000001":
            path.parent.joinpath(path.name).mkdir()  # open() fails
        return written(*arguments, **keywords)

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(broken))
    with pytest.raises(CheckpointError, match=r"writing_0000003: a writer failed \(.*Is a directory") as error:
        opened.fit()
    assert "\n" not in str(error.value)
    assert "writing_0000002: a writer failed" in caplog.text
    assert "training continues, the last good checkpoint stays" in caplog.text
    assert (opened.iteration, iterations(opened)) == (3, [1])
    assert len(list(opened.checkpoints.root.iterdir())) == 1  # what a failed save wrote is gone at once
    monkeypatch.undo()
    assert trainer().iteration == 1


@pytest.mark.parametrize("function", ["write_preloaded_data", WRITE_ALL])
def test_writer_killed(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    """As the kernel does when memory runs out: noticed at once, and the next save is good."""
    opened = trainer("checkpoint.interval=1", "checkpoint.keep=0")
    written = getattr(FileSystemWriterAsync, function)

    def killed(*arguments: object, **keywords: object) -> object:
        if (opened.checkpoints.root / ".writing_0000002").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return written(*arguments, **keywords)

    monkeypatch.setattr(FileSystemWriterAsync, function, staticmethod(killed))
    started = time.monotonic()
    opened.fit()
    assert time.monotonic() - started < 60  # a report from the writer is waited for 20 s, the timeout is 1800 s
    assert "writing_0000002: a writer failed (rank 0: its writer was killed by SIGKILL (memory used up?" in caplog.text
    assert caplog.text.count("ERROR") == 1
    assert [path.name for path in sorted(opened.checkpoints.root.iterdir())] == [
        *("iteration_0000001", "iteration_0000003"),
    ]


def test_writer_hangs(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that takes longer than its timeout is given up, and does not spoil the next."""
    opened = trainer("checkpoint.timeout=0.5")
    opened.callbacks.clear()
    written = getattr(FileSystemWriterAsync, WRITE_ALL)

    def late(*arguments: object) -> None:
        written(*arguments)  # its result is in the queue already
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(FileSystemWriterAsync, WRITE_ALL, staticmethod(late))
        opened.step()
        opened.save()
    assert "not written within checkpoint.timeout = 0.5 s" in str(opened.saver.error)
    object.__setattr__(opened.checkpoints.config, "timeout", 100.0)
    opened.step()
    opened.save()
    opened.stream.close()
    assert iterations(opened) == [2]
    assert trainer().iteration == 2


def test_killed_at_any_time(project: Path, tmp_path: Path) -> None:
    """kill -9 of a process that saves all the time in the background; the run continues from the last good one."""
    command = [sys.executable, "-m", "oryx_megatron.train", str(project), f"output_dir={tmp_path}"]
    command += ["model.num_layers=1", "train.iterations=1000", "checkpoint.interval=1", "checkpoint.asynchronous=true"]
    command += ["train.global_batch_size=2", "checkpoint.keep=2"]
    root = tmp_path / "checkpoints"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            while len(list_checkpoints(root)) < 2 or not list(root.glob(".writing_*")):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.005)
            process.kill()
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # its writers, if any are left
                os.killpg(process.pid, signal.SIGKILL)
    last = store.iteration_of(list_checkpoints(root)[-1])
    done = subprocess.run(
        [*command, f"train.exit_after={last + 1}"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed from iteration {last} of" in done.stderr
    assert store.iteration_of(list_checkpoints(root)[-1]) == last + 1
    assert not list(root.glob(".writing_*"))
