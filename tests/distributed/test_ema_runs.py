"""The average of the weights in a run of one rank: evaluated, saved, resumed, rolled back, exported, started from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import lines, trainer_of
from torch import Tensor

from oryx_megatron.checkpoint import find_checkpoint, list_checkpoints, store
from oryx_megatron.config import load_run, validate
from oryx_megatron.errors import CheckpointError, ConfigError, ConversionError
from oryx_megatron.eval.perplexity import evaluate_checkpoint
from oryx_megatron.hf.convert import export
from oryx_megatron.hf.tensors import CheckpointReader, SafetensorsReader
from oryx_megatron.train.trainer import Trainer

ON = "train.ema={decay: 0.5, start: 2}"


@pytest.fixture
def evaluating(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`evaluate_checkpoint` within the process groups of this process."""
    monkeypatch.setattr("oryx_megatron.eval.perplexity.parallel.initialize", lambda *_, **__: None)
    return evaluate_checkpoint


@pytest.fixture
def trainer(project: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer of a one-layer model in a fresh folder; called again it resumes."""
    few = ("evaluation.plans=[recurrent]", "evaluation.batches=1", "checkpoint.interval=2", "checkpoint.keep=0")
    return trainer_of(project, tmp_path / "run", "train.iterations=6", "optimizer.lr=0.02", *few)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder, "step")]


def averages(trainer: Trainer) -> list[Tensor]:
    return [part.average.clone() for part in trainer.engine.average.parts]  # type: ignore[attr-defined]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_evaluated_beside_the_weights(
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    evaluating: Callable[..., Any],
) -> None:
    """The run trains what it trains without; its losses are those of the averages in its checkpoints."""
    often = ("evaluation.interval=1", f"precision.dtype={dtype}")
    trainer(*often, f"output_dir={tmp_path / 'without'}").fit()
    trainer(*often, ON).fit()
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    shown, without = lines(tmp_path / "run", "evaluation"), lines(tmp_path / "without", "evaluation")
    assert ["ema_loss" in line for line in shown] == [False] + [True] * 5
    assert [{k: v for k, v in line.items() if k != "ema_loss"} for line in shown] == without
    assert shown[1]["ema_loss"] == shown[1]["loss"]  # it begins with the weights of step 2
    assert all(line["ema_loss"] != line["loss"] for line in shown[2:])
    assert f"loss {shown[-1]['ema_loss']:7.4f}   of the average" in capsys.readouterr().out
    for step in (2, 4, 6):
        folder = tmp_path / "run" / "checkpoints" / f"iteration_{step:07d}"
        for weights, name in (("trained", "loss"), ("ema", "ema_loss")):
            found = evaluating(folder, batches=1, batch_size=2, weights=weights)
            assert found.results[0].loss == pytest.approx(shown[step - 1][name], rel=1e-6)


def test_resumes_bit_by_bit_and_begins_and_ends_with_a_note(
    trainer: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    going = trainer(ON)
    going.fit()
    results, weights = lines(tmp_path / "run", "evaluation"), averages(going)
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        if store.iteration_of(path) > 2:
            (path / "manifest.json").unlink()
    resumed = trainer(ON)
    assert resumed.iteration == 2
    resumed.fit()
    assert equal(averages(resumed), weights)
    assert lines(tmp_path / "run", "evaluation") == results
    # off, and on again: a new average
    trainer("train.iterations=7").fit()
    assert "train.ema is off: the average of the weights in" in caplog.text
    assert not any(name.startswith("ema.") for name in CheckpointReader(find_checkpoint(tmp_path / "run")).shapes())
    caplog.clear()
    again = trainer("train.iterations=8", ON)
    assert "train.ema: the checkpoint has no average; a new one begins" in caplog.text
    again.fit()
    masters = [part.master for part in again.engine.average.parts]  # type: ignore[attr-defined]
    assert equal(averages(again), masters)
    caplog.clear()
    later = trainer("train.iterations=12", "train.ema={decay: 0.5, start: 10}")
    assert "train.ema.start 10: the average of the checkpoint of step 8 is dropped" in caplog.text
    assert not later.engine.average.begun  # type: ignore[attr-defined]
    later.stream.close()


def test_bad_steps_and_a_rollback(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is left out leaves the average alone; a rollback brings back that of the checkpoint."""
    opened = trainer(ON, "faults.bad_steps=2", "evaluation.steps=[2]")
    bad, seen = {4, 5}, {}

    def limit() -> float | None:
        step = opened.iteration + 1
        seen.setdefault(step, []).append(averages(opened))
        return 0.0 if step in bad and len(seen[step]) == 1 else None

    monkeypatch.setattr(opened.guard, "limit", limit)
    monkeypatch.setattr(opened.guard, "reason", lambda *_: "told so")
    opened.fit()
    first, again = seen[5]
    assert equal(seen[4][0], first)  # step 4 was left out
    assert {step: len(found) for step, found in seen.items()} == {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 6: 1}
    assert equal(*seen[3])  # as after step 2, from the checkpoint
    assert not equal(first, again)


def test_the_best_by_the_average(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """Of losses that make another checkpoint the best one by the weights themselves."""
    opened = trainer(ON, "checkpoint.interval=1", "checkpoint.keep=1", "checkpoint.keep_best=ema/valid/recurrent")
    opened.fit()
    shown = {line["iteration"]: line.get("ema_loss", 99.0) for line in lines(tmp_path / "run", "evaluation")}
    best = min(shown, key=lambda step: shown[step])
    kept = {store.iteration_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")}
    assert kept == {best, 6}
    run = load_run(opened.run.output_dir + "/config.yaml", ["train.ema=null"])
    with pytest.raises(ConfigError, match="keep_best: no validation loss is called 'ema/valid/recurrent'"):
        validate(run, 1)


def test_exported_and_started_from(trainer: Callable[..., Trainer], tmp_path: Path, project: Path) -> None:
    trainer(ON, "precision.dtype=bf16").fit()
    source = find_checkpoint(tmp_path / "run")
    reader = CheckpointReader(source)
    for weights, prefix in (("trained", ""), ("ema", "ema.")):
        export(source, tmp_path / weights, weights=weights, license="mit")  # type: ignore[arg-type]
        found = SafetensorsReader(tmp_path / weights)
        table = found.read("model.embed_tokens.weight")
        assert table.dtype == torch.bfloat16
        assert torch.equal(table, reader.read(f"{prefix}embedding.word_embeddings.weight").bfloat16())
        small = found.read("model.layers.0.mixer.a_log")
        assert torch.equal(small, reader.read(f"{prefix}decoder.layers.self_attention.a_log", 0).float())
    loss = lines(tmp_path / "run", "evaluation")[-1]
    ours, card = f"| {loss['ema_loss']:.4f} |", (tmp_path / "ema" / "README.md").read_text()
    assert ours in card
    assert "| weights | exponential moving average, decay 0.5 |" in card
    assert ours not in (tmp_path / "trained" / "README.md").read_text()
    started = trainer(
        f"output_dir={tmp_path / 'next'}", f"init_from.path={source}", "init_from.weights=ema", "precision.dtype=bf16"
    )
    (chunk,) = started.chunks
    weight = chunk.module.embedding.word_embeddings.weight
    assert torch.equal(weight, reader.read("ema.embedding.word_embeddings.weight").bfloat16())
    assert started.start.record is not None
    assert started.start.record["weights"] == "ema"
    started.stream.close()


def test_without_an_average(trainer: Callable[..., Trainer], tmp_path: Path, evaluating: Callable[..., Any]) -> None:
    """Every way to ask for one says so in a line, and leaves nothing."""
    trainer("train.iterations=1").fit()
    none = "holds no average of the weights"
    with pytest.raises(ConversionError, match=none):
        export(tmp_path / "run", tmp_path / "export", weights="ema", license="mit")
    assert not (tmp_path / "export").exists()
    with pytest.raises(CheckpointError, match=none):
        evaluating(tmp_path / "run", batches=1, weights="ema")
    with pytest.raises(ConfigError, match=rf"init_from.weights: .* {none}"):
        trainer(f"output_dir={tmp_path / 'next'}", f"init_from.path={tmp_path / 'run'}", "init_from.weights=ema")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.ema.decay=1"], "train.ema.decay: 1"),
        (["train.ema.start=0"], "train.ema.start: 0"),
        (["train.ema=0.99"], "train.ema"),
        (["train.ema.strat=5"], "did you mean `train.ema.start`"),
        ([ON, "train.iterations=1"], "train.ema.start: 2 is after train.iterations 1"),
        ([ON, "engine=deepspeed"], "train.ema: not with engine deepspeed; remove it, or set engine: megatron"),
        ([ON, "optimizer.cpu_offload=true"], "train.ema: not with optimizer.cpu_offload"),
        (["init_from={path: x, weights: ema, optimizer: true}"], "init_from.optimizer: its state belongs"),
    ],
)
def test_mistakes(project: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        validate(load_run(project, overrides), 1)
