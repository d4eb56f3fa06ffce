"""Engine deepspeed: losses of the other engine under ZeRO 1 to 3, offload and tensor parallelism; resume; conversion.

One set of four processes trains everything with the real Trainer: as four worlds of one rank, two of two, one of four.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Runs, close, copy_checkpoint, train

from oryx_megatron import parallel
from oryx_megatron.checkpoint import list_checkpoints, read_manifest, store
from oryx_megatron.config import load_run, validate
from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.errors import CheckpointError, ConfigError
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Worlds
from oryx_megatron.testing.project import tiny_project

pytestmark = [
    pytest.mark.timeout(1000),  # whichever test is first makes all runs
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS, HALF = 6, 3
FIELDS = {
    "gdn": (),
    "mamba2": ("model.mixer=mamba2", "data.documents=isolated"),
    "gdn-bf16": ("precision.dtype=bf16",),
}
HALVES = (f"checkpoint.interval={HALF}", f"evaluation.interval={HALF}")


@pytest.fixture(autouse=True)
def _no_environment_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing DeepSpeed sets what other libraries would take for torchrun's."""
    monkeypatch.setenv("LOCAL_RANK", "0")


Case = tuple[str, int, int, int, tuple[str, ...]]
"""Variant, ZeRO stage, tensor-parallel size, ranks, further overrides."""


def _name(case: Case) -> str:
    variant, stage, tensor, world, more = case
    return " ".join([f"{variant} zero{stage} tp{tensor} dp{world // tensor}", *more])


# Worlds of one size take the cases in turn, and each must build as many ZeRO 3 engines (DeepSpeed numbers modules).
FAST: tuple[Case, ...] = (
    ("gdn", 3, 2, 4, ("parallel.overlap=true",)),
    ("gdn", 1, 2, 2, ()),
    ("mamba2", 2, 1, 2, ()),
    ("gdn", 3, 1, 2, ("deepspeed.offload=parameters",)),
    ("gdn-bf16", 1, 1, 2, ()),
    ("gdn-bf16", 2, 1, 2, ()),
)
WIDE: tuple[Case, ...] = (
    ("mamba2", 2, 2, 4, ("deepspeed.offload=optimizer",)),
    ("gdn", 2, 2, 4, ("parallel.overlap=true",)),
    *((variant, stage, tensor, 2, ()) for stage in (1, 2, 3) for tensor in (1, 2) for variant in ("gdn", "mamba2")),
    ("gdn", 3, 1, 2, ("parallel.recompute=full",)),
    ("mamba2", 3, 2, 2, ("parallel.recompute=full",)),
    ("gdn", 1, 1, 2, ("deepspeed.offload=optimizer", "parallel.recompute=mixer")),
    ("mamba2", 2, 2, 2, ("parallel.sequence=false", "parallel.overlap=true")),
)
RESUMED, CONVERTED = (FAST[2], FAST[3], FAST[4]), (FAST[1], FAST[3], FAST[4])
RESUMED_WIDELY, CONVERTED_WIDELY = (WIDE[2], WIDE[3]), (WIDE[6], WIDE[7], WIDE[12], WIDE[13])


def _overrides(case: Case) -> tuple[str, ...]:
    variant, stage, tensor, _, more = case
    return (
        *(*FIELDS[variant], "engine=deepspeed", f"deepspeed.zero_stage={stage}", f"parallel.tensor={tensor}"),
        *(*HALVES, *more),
    )


def _convert(root: Path, case: Case) -> None:
    """What tools/convert_from_deepspeed.py does on every rank."""
    from oryx_megatron.train.deepspeed import convert

    folder = root / _name(case) / "checkpoints" / f"iteration_{HALF:07d}"
    run = read_manifest(folder).run()
    parallel.initialize(run.parallel, seed=run.seed)
    try:
        convert(folder, root / f"{_name(case)} converted")
    finally:
        parallel.release()
        gc.collect()


def _train_all(config: Path, cases: tuple[Case, ...], resumed: tuple[Case, ...], converted: tuple[Case, ...]) -> None:
    worlds, root = Worlds(), config.parent
    for case in cases:
        if case[3] == 4:
            with worlds.of(4, _name(case)):
                train(config, _name(case), *_overrides(case))
    for case in worlds.share(2, [case for case in cases if case[3] == 2]):
        with worlds.of(2, _name(case)):
            train(config, _name(case), *_overrides(case))
            if case in resumed:
                copy_checkpoint(root, _name(case), f"{_name(case)} resumed")
                train(config, f"{_name(case)} resumed", *_overrides(case))
            if case in converted:
                _convert(root, case)
    for variant in worlds.share(1, FIELDS):
        with worlds.of(1, variant):
            train(config, variant, *FIELDS[variant], *HALVES)
    with worlds.of(4, "all are done"):  # conversions too
        torch.distributed.barrier()
    for case in worlds.share(1, converted):
        with worlds.of(1, _name(case)):
            train(config, f"{_name(case)} converted", *FIELDS[case[0]])


def _runs(root: Path, *arguments: Any) -> Runs:
    run_distributed(_train_all, 4, tiny_project(root), *arguments, timeout=900)
    return Runs(root)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return _runs(tmp_path_factory.mktemp("deepspeed"), FAST, RESUMED, CONVERTED)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return _runs(tmp_path_factory.mktemp("deepspeed"), WIDE, RESUMED_WIDELY, CONVERTED_WIDELY)


def _tolerance(case: Case) -> float:
    """Relative; in bf16 DeepSpeed rounds the decays too."""
    return 1e-3 if "bf16" in case[0] else 1e-4


def _assert_equal(runs: Runs, case: Case) -> None:
    name, reference, close = _name(case), case[0], _tolerance(case)
    assert len(runs.losses(name)) == STEPS
    assert runs.losses(name) == pytest.approx(runs.losses(reference), rel=close)
    assert runs.steps(name, "grad_norm") == pytest.approx(runs.steps(reference, "grad_norm"), rel=10 * close)
    for field in ("lr", "attention_share", "consumed_samples", "tokens", "model_flops"):
        assert runs.steps(name, field) == pytest.approx(runs.steps(reference, field), rel=1e-6)
    for iteration in (HALF, STEPS):
        assert runs.evaluations(name, iteration) == pytest.approx(runs.evaluations(reference, iteration), rel=close)


@pytest.mark.parametrize("case", FAST, ids=_name)
def test_losses_equal_the_other_engine(fast: Runs, case: Case) -> None:
    """fp32 and bf16, six steps, drawn plans that differ between data-parallel ranks; evaluation under three plans."""
    _assert_equal(fast, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE, ids=_name)
def test_losses_equal_the_other_engine_widely(wide: Runs, case: Case) -> None:
    """Every ZeRO stage under tensor 1 and 2 of both variants, and options."""
    _assert_equal(wide, case)


def _assert_resumed(runs: Runs, case: Case) -> None:
    name = _name(case)
    assert runs.losses(f"{name} resumed") == runs.losses(name)[HALF:]
    assert runs.steps(f"{name} resumed", "grad_norm") == runs.steps(name, "grad_norm")[HALF:]
    assert runs.loaded(f"{name} resumed") == runs.evaluations(name, HALF)
    assert runs.evaluations(f"{name} resumed") == runs.evaluations(name)


@pytest.mark.parametrize("case", RESUMED, ids=_name)
def test_resume_is_exact(fast: Runs, case: Case) -> None:
    """Bit for bit the run that was never stopped."""
    _assert_resumed(fast, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED_WIDELY, ids=_name)
def test_resume_is_exact_widely(wide: Runs, case: Case) -> None:
    _assert_resumed(wide, case)


def _assert_converted(runs: Runs, case: Case) -> None:
    name, close = _name(case), _tolerance(case)
    folder = runs.root / f"{name} converted" / "checkpoints" / f"iteration_{HALF:07d}"
    manifest = read_manifest(folder)
    assert (manifest.run().engine, manifest.iteration) == ("megatron", HALF)
    assert store.damaged_files(folder, manifest) == []
    assert runs.loaded(f"{name} converted") == pytest.approx(runs.evaluations(name, HALF), rel=close / 10)
    assert runs.losses(f"{name} converted") == pytest.approx(runs.losses(case[0])[HALF:], rel=close)
    assert runs.evaluations(f"{name} converted") == pytest.approx(runs.evaluations(case[0]), rel=close)


@pytest.mark.parametrize("case", CONVERTED, ids=_name)
def test_converted_checkpoints(fast: Runs, case: Case) -> None:
    """Loaded by the other engine on one rank: equal evaluation, and the losses of a run that never stopped."""
    _assert_converted(fast, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONVERTED_WIDELY, ids=_name)
def test_converted_checkpoints_widely(wide: Runs, case: Case) -> None:
    _assert_converted(wide, case)


@pytest.mark.slow
def test_conversion_by_command(fast: Runs, tmp_path: Path) -> None:
    """The tool starts its own ranks; what it makes is converted to Hugging Face's format."""
    source = fast.root / _name(FAST[3])
    command = [sys.executable, str(ROOT / "tools" / "convert_from_deepspeed.py"), str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (converted,) = list_checkpoints(tmp_path / "out" / "checkpoints")
    assert done.stdout.strip() == str(converted)
    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert again.returncode == 2
    assert "holds checkpoints already; choose another output" in again.stderr
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    for file in damaged.rglob("*optim_states.pt"):
        os.truncate(file, 100)
    failed = subprocess.run(
        [*command[:2], str(damaged), str(tmp_path / "none")], capture_output=True, text=True, timeout=300
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
    assert not list_checkpoints(tmp_path / "none" / "checkpoints")
    from oryx_megatron.checkpoint.inspect import summarize

    parts = summarize(converted).parts()
    assert parts["optimizer.exp_avg"][1] == parts["model"][1]


@pytest.fixture
def one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.destroy()


def test_what_other_programs_say(fast: Runs, tmp_path: Path, one_rank: None) -> None:
    """A DeepSpeed checkpoint is named as one, not called damaged; DeepSpeed refuses another layout and engine."""
    from oryx_megatron.checkpoint.inspect import summarize
    from oryx_megatron.train.trainer import Trainer

    zero3 = fast.root / _name(FAST[3]) / "checkpoints" / f"iteration_{STEPS:07d}"
    with pytest.raises(CheckpointError, match="was written by DeepSpeed; convert it"):
        summarize(zero3)
    small = ("model.num_layers=2", "train.global_batch_size=4")

    def trainer(name: str, *overrides: str) -> Trainer:
        run = load_run(fast.root / "run.yaml", [*small, f"output_dir={tmp_path / name}", *overrides])
        return Trainer(run, validate(run, 1))

    shutil.copytree(zero3.parent, tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="was written by DeepSpeed; convert it"):
        trainer("run")
    with pytest.raises(CheckpointError, match=r"the number of ranks was 2 and is 1, .*; set it back, or convert it"):
        trainer("run", "engine=deepspeed", "deepspeed.zero_stage=3")
    own = trainer("own", "train.iterations=1", "evaluation.batches=1")
    own.fit()
    close(own)
    with pytest.raises(CheckpointError, match="written by engine megatron, whose checkpoints DeepSpeed cannot read"):
        trainer("own", "engine=deepspeed")


def _save_on_full_disk(config: Path) -> None:
    """Train with a first save during which rank 1 cannot write."""
    from oryx_megatron.train.trainer import Trainer

    more = ("engine=deepspeed", "deepspeed.zero_stage=2", "model.num_layers=2", *HALVES)
    run = load_run(config, [*more, f"output_dir={config.parent / 'out'}"])
    parallel.initialize(run.parallel, seed=run.seed)
    trainer = Trainer(run, validate(run, 2))
    save, (soft, hard) = trainer.checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_little_room(iteration: int, *arguments: Any) -> Path | None:
        if torch.distributed.get_rank() == 1 and iteration == HALF:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return save(iteration, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    trainer.checkpoints.save = with_little_room  # type: ignore[method-assign]
    trainer.fit()
    close(trainer)
    parallel.destroy()


def test_a_disk_that_is_full_for_one_rank(tmp_path: Path) -> None:
    """The save fails for all ranks, and the run continues to the next one."""
    config = tiny_project(tmp_path)
    run_distributed(_save_on_full_disk, 2, config)
    (whole,) = list_checkpoints(tmp_path / "out" / "checkpoints")
    assert store.iteration_of(whole) == STEPS
    assert not store.damaged_files(whole, read_manifest(whole))
    assert len(Runs(tmp_path).losses("out")) == STEPS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bad_steps_are_left_out(tmp_path: Path, one_rank: None, stage: int) -> None:
    """Gradients that are not finite, or that are discarded, change nothing; the step after is as if alone."""
    from oryx_megatron.train.trainer import Trainer

    overrides = ("model.num_layers=1", "engine=deepspeed", f"deepspeed.zero_stage={stage}", "train.global_batch_size=4")
    run = load_run(tiny_project(tmp_path), [*overrides, f"output_dir={tmp_path / 'out'}"])
    trainer = Trainer(run, validate(run, 1), reports=False)
    from oryx_megatron.train.batches import training_batches

    def batches() -> Any:
        samples = trainer.stream.next_batches()
        return training_batches(samples, run.modes, seed=1, iteration=0, data_rank=0, data_size=1)

    first = batches()
    engine = trainer.engine
    loss, norm = engine.gradients(first).mean_loss, engine.gradient_norm()
    engine.discard()
    bad = batches()
    bad[0].loss_mask.fill_(math.nan)
    engine.gradients(bad)
    assert not math.isfinite(engine.gradient_norm())
    engine.discard()
    assert (engine.gradients(first).mean_loss, engine.gradient_norm()) == (loss, norm)
    engine.update(norm)
    assert engine.gradients(first).mean_loss < loss
    engine.discard()
    trainer.stream.close()
    close(trainer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.pipeline=2"], "parallel.pipeline: 2, but engine deepspeed splits tensor and data only; use 1"),
        (["parallel.context=2"], "parallel.context: 2, but engine deepspeed splits tensor and data only; use 1"),
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage: 4 should be 1, 2 or 3"),
        (["deepspeed.offload=parameters"], "deepspeed.offload: parameters need deepspeed.zero_stage 3"),
        (["optimizer.name=muon", "parallel.distributed_optimizer=false"], "optimizer.name: not with engine deepspeed"),
        (["checkpoint.asynchronous=true"], "checkpoint.asynchronous: not with engine deepspeed"),
        (["engine=megatron", "deepspeed.zero_stage=2"], "deepspeed.zero_stage: has no effect with engine megatron"),
    ],
)
def test_config_errors(tmp_path: Path, overrides: list[str], message: str) -> None:
    run = load_run(tiny_project(tmp_path), ["engine=deepspeed", *overrides])
    with pytest.raises(ConfigError) as error:
        validate(run, 2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
