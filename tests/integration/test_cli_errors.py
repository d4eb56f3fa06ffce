"""Bad input through the real command lines: one `error: …` line, exit code 2, and nothing half-written."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from oryx_megatron.checkpoint import list_checkpoints
from oryx_megatron.testing.project import tiny_project
from oryx_megatron.train.__main__ import main

TOOLS = Path(__file__).parents[2] / "tools"
Failing = Callable[..., str]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml of a small run with two finished steps in out/."""
    config = tiny_project(tmp_path_factory.mktemp("project"))
    assert main([str(config), *SMALL, "checkpoint.interval=1"]) == 0
    return config


SMALL = ("model.num_layers=1", "train.global_batch_size=2", "train.iterations=2", "data.split=[9, 0, 1]")


def process(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=200, env=os.environ | environment
    )


def the_error(code: int, out: str, err: str) -> str:
    """The one line of a failed command; warnings may stand above it."""
    assert code == 2, err
    assert "Traceback" not in err
    *before, last = err.splitlines()
    assert last.startswith("error: ")
    assert all(line.startswith("WARNING ") for line in before), err
    assert out == ""
    return last.removeprefix("error: ")


# ------------------------------------------------------------------------------- configs: before torch is imported


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.iteratons=5"], "override `train.iteratons=5`: unknown key `train.iteratons`; did you mean "
         "`train.iterations`?"),
        (["optimizers.lr=1"], "unknown key `optimizers`; did you mean `optimizer`?"),
        (["train.iterations=many"], "train.iterations: expected integer, got 'many' (str)"),
        (["model.mixer=mamba"], "expected one of gdn | mamba2, got 'mamba' (str); did you mean `mamba2`?"),
        (["modes.chunk=7"], "data.sequence_length 48 is not divisible by modes.chunk 7; use 42 or 49"),
        (["--dry-run", "--world-size", "3", "parallel.tensor=3"], "model.num_heads 4 is not divisible by tensor 3; "
         "use 3 or 6"),
        (["--dry-run", "--world-size", "4", "parallel.tensor=4"], "model.num_kv_heads 2 is not divisible by tensor 4"),
        (["--dry-run", "--world-size", "6", "parallel.tensor=2", "parallel.pipeline=2"],
         "world size 6 ≠ tensor 2 × pipeline 2 × context 1 × data ? (a multiple of 4); "),
        (["--dry-run", "--world-size", "0"], "world size 0 ≠ tensor 1 × pipeline 1"),
        (["train.global_batch_size=3"], "train.global_batch_size 3 is not divisible by train.micro_batch_size 2"),
        (["evaluation.plans=[ratio:2]"], "evaluation.plans[0]: mode plan `ratio:2`: `2` is not a number from 0 to 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_configs(project: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    out = tmp_path / "out"
    done = process("-m", "oryx_megatron.train", project, *arguments, f"output_dir={out}")
    assert expected in the_error(done.returncode, done.stdout, done.stderr)
    assert not out.exists()


def test_world_size_of_the_launcher(project: Path, tmp_path: Path) -> None:
    """Of the ranks of a launch only the first speaks, and none waits for another."""
    command = ("-m", "oryx_megatron.train", project, "parallel.tensor=2", f"output_dir={tmp_path}/out")
    first = process(*command, WORLD_SIZE="3", RANK="0")
    assert "world size 3 ≠ tensor 2 × " in the_error(first.returncode, first.stdout, first.stderr)
    second = process(*command, WORLD_SIZE="3", RANK="1")
    assert (second.returncode, second.stdout, second.stderr) == (2, "", "")


def test_config_files(project: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, expected in (
        (project.read_text().replace("iterations: 6", "iterationen: 6"), f"{file}: unknown key `train.iterationen`; "
         "did you mean `train.iterations`?"),
        ("train: [", f"{file}, line "),
        (None, f"{file}: no such config file"),
    ):  # fmt: skip
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        done = process("-m", "oryx_megatron.train", file)
        assert expected in the_error(done.returncode, done.stdout, done.stderr)


def test_dry_run(project: Path, tmp_path: Path) -> None:
    """With --config-only: says the layout, starts nothing, writes nothing; torch is not even imported."""
    command = (
        "-X",
        "importtime",
        "-m",
        "oryx_megatron.train",
        project,
        "--dry-run",
        "--config-only",
        "--world-size",
        8,
    )
    done = process(*command, "parallel.tensor=2", "parallel.pipeline=2", f"output_dir={tmp_path}/out")
    assert done.returncode == 0
    assert done.stdout == (
        f"{project} is valid for 8 ranks:\n  tensor 2 × pipeline 2 × context 1 × data 2, 1 microbatch per step\n"
        "checked: the config alone (--config-only)\n"
    )
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines()}
    assert "yaml" in imported
    assert "torch" not in imported
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------- data and checkpoints: the same `main`, here in this process


@pytest.fixture
def failing(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> Iterator[Failing]:
    """Run with overrides; gives the error. Neither a run folder nor a process group is left behind."""
    out = tmp_path / "out"

    def run(*overrides: str) -> str:
        before = sorted(out.rglob("*")) if out.exists() else None
        capfd.readouterr()
        code = main([str(project), *SMALL, f"output_dir={out}", *overrides])
        error = the_error(code, *capfd.readouterr())
        assert (sorted(out.rglob("*")) if out.exists() else None) == before
        assert not torch.distributed.is_initialized()
        return error

    return run


@pytest.fixture
def data(project: Path, tmp_path: Path) -> Path:
    """Prefix of a copy of the dataset."""
    for end in ("bin", "idx"):
        shutil.copy(project.with_name(f"data.{end}"), tmp_path / f"copy.{end}")
    return tmp_path / "copy"


def test_datasets(failing: Failing, data: Path) -> None:
    blend = f"data.blend=[{data}]"
    bin_, idx = (data.with_name(f"{data.name}.{end}") for end in ("bin", "idx"))
    size = bin_.stat().st_size
    os.truncate(bin_, size - 2)
    assert failing(blend) == f"{bin_} is truncated: {size - 2} bytes, not {size}"
    bin_.unlink()
    assert failing(blend).startswith(f"dataset {data}: {bin_} is missing")
    os.truncate(idx, 60)
    assert failing(blend).startswith((f"dataset {data}: {bin_} is missing", f"{idx} is truncated: 60 bytes, not "))
    bin_.write_bytes(b"")
    assert failing(blend).startswith(f"{idx} is truncated: 60 bytes, not ")
    idx.write_bytes(b"no index at all, no index at all")
    assert failing(blend).startswith(f"{idx} is not a megatron-core index")
    idx.unlink()
    assert failing(blend).startswith(f"dataset {data}: {idx} is missing; ")
    assert failing(f"data.blend=[{bin_}]").endswith("give the prefix without ending")
    assert "its train part is empty" in failing("data.split=[1, 100000, 0]")


def test_vocabularies(failing: Failing, project: Path, tmp_path: Path) -> None:
    assert failing("model.vocab_size=300") == (
        "tokenizer tokenizer has 320 tokens, model.vocab_size is 300: make the model's vocabulary at least as large"
    )
    builder = IndexedDatasetBuilder(str(tmp_path / "high.bin"), dtype=np.uint16)
    for _ in range(20):
        builder.add_document(torch.tensor([*range(300, 340), 1]), [41])
    builder.finalize(str(tmp_path / "high.idx"))
    error = failing(f"data.blend=[{tmp_path}/high]")
    assert f"{tmp_path}/high" in error
    assert "339" in error
    assert "320" in error
    shutil.copytree(project.with_name("tokenizer"), tmp_path / "tokenizer")
    with open(tmp_path / "tokenizer" / "tokenizer.model", "ab") as file:
        file.write(b"\0")
    assert "is not the file of manifest.json: sha256" in failing(f"data.tokenizer={tmp_path}/tokenizer")
    assert failing("data.tokenizer=nowhere").startswith("tokenizer folder nowhere does not exist; ")


def test_checkpoints(failing: Failing, project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(project.with_name("out") / "checkpoints", out / "checkpoints")
    one, two = list_checkpoints(out / "checkpoints")
    assert "belongs to model tiny, which differs in ffn_hidden_size" in failing("model.ffn_hidden_size=64")
    assert "data had seed 1234, now it is 5" in failing("seed=5")
    error = failing("optimizer.name=muon", "parallel.distributed_optimizer=false")
    assert error.startswith(f"{out}/checkpoints: written with optimizer.name adamw, whose state muon cannot read; ")
    error = failing("parallel.distributed_optimizer=false")
    assert error.startswith(f"{out}/checkpoints: written with parallel.distributed_optimizer true, ")
    os.truncate(one / "__0_0.distcp", 100)
    (two / "manifest.json").write_text("{}")
    error = failing()
    assert error.startswith(f"{out}/checkpoints: every checkpoint is damaged (iteration_0000002, iteration_0000001); ")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_package(failing: Failing) -> None:
    assert failing("logging.wandb_project=x").startswith("logging.wandb_project: wandb is not installed; ")


@pytest.mark.parametrize(
    ("ranks", "arguments", "expected"),
    [
        (2, ["RUN", "data.blend=[nothing]"], "dataset nothing: nothing.idx is missing; make it with "
         "`oryx data preprocess`"),
        (4, ["missing.yaml"], "missing.yaml: no such config file"),
        (2, ["RUN", "--bogus"], "unrecognized arguments: --bogus; see python -m oryx_megatron.train --help"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_under_torchrun(project: Path, tmp_path: Path, ranks: int, arguments: list[str], expected: str) -> None:
    """Several ranks, three starts: one line in all. What else there is are torchrun's own lines."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", 29761 + ranks]
    command += ["--max-restarts", 2, "--monitor-interval", "0.1", "-m", "oryx_megatron.train"]
    arguments = [str(project) if word == "RUN" else word for word in arguments]
    done = process(*command, *arguments, f"output_dir={tmp_path}/out", OMP_NUM_THREADS="1")
    assert done.returncode == 1
    assert done.stdout == ""
    told, rest = done.stderr.split("Traceback", 1)
    ours = [line for line in told.splitlines() if not re.match(r"[WE]\d{4} .*torch/|INFO ", line)]
    assert ours == [f"error: {expected}"]
    assert told.count("failed (exitcode: 2)") == 3
    assert expected not in rest
    assert not (tmp_path / "out").exists()


def test_told_once_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A later start of the same launch says nothing; another launch, and one without torchrun's folders, does."""
    for folder, expected in (
        ("a/attempt_0/0", 1), ("a/attempt_1/0", 0), ("a/attempt_1/1", 0), ("b/attempt_0/0", 1), ("c", 1), ("c", 1),
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / folder / "error.json"))
        assert main([f"{tmp_path}/missing.yaml"]) == 2
        assert capsys.readouterr().err.count("error: ") == expected
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["told"] * 2


# ------------------------------------------------------------------------------------------------------------ tools


def test_preprocess_data(project: Path, tmp_path: Path) -> None:
    def fails(*arguments: object) -> str:
        output = ("--tokenizer", project.with_name("tokenizer"), "--output", tmp_path / "made" / "data")
        done = process(TOOLS / "preprocess_data.py", "--quiet", "--restart", "--processes", 1, *output, *arguments)
        error = the_error(done.returncode, done.stdout, done.stderr)
        assert not [path for path in tmp_path.glob("made/*") if path.suffix in (".bin", ".idx", ".json")]
        return error

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    assert str(corpus) in fails("--input", corpus)
    (corpus / "empty.txt").write_text("")
    assert "no tokens" in fails("--input", corpus)
    (corpus / "latin.txt").write_bytes("naïve".encode("latin-1"))
    error = fails("--input", corpus)
    assert str(corpus / "latin.txt") in error
    assert "UTF-8" in error
    assert "no-such-folder" in fails("--input", "stdlib", "--tokenizer", "no-such-folder")


def test_train_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    done = process(TOOLS / "train_tokenizer.py", "--input", tmp_path / "latin.txt", "--output", tmp_path / "made")
    assert "latin.txt" in the_error(done.returncode, done.stdout, done.stderr)
    assert not (tmp_path / "made").exists()


def test_generate(project: Path, tmp_path: Path) -> None:
    tool = (TOOLS / "generate.py", "--prompt", "a")
    done = process(*tool, tmp_path / "nothing")
    assert the_error(done.returncode, done.stdout, done.stderr).startswith(f"{tmp_path}/nothing does not exist; ")
    done = process(*tool, project.with_name("out"), "--plan", "sometimes")
    assert "mode plan `sometimes`: unknown form" in the_error(done.returncode, done.stdout, done.stderr)


def test_arch(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("name: x\nmixer: gdn\nnum_layer: 2\n")
    done = process("-m", "oryx_megatron.arch", tmp_path / "model.yaml")
    assert "unknown key `num_layer`; did you mean `num_layers`?" in the_error(done.returncode, done.stdout, done.stderr)
