"""Paths as people write them: expanded in every field and argument, never a folder called `~` or `s3:`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

from oryx_megatron import monitor
from oryx_megatron.atomic import replacing
from oryx_megatron.cli import main_guard
from oryx_megatron.config import from_dict, load_model, load_run, to_dict, to_yaml, validate
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand, expand_arguments
from oryx_megatron.testing.layouts import tiny_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder, beside HOME and SCRATCH."""
    for name in ("home", "scratch", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("JOB", "7")
    monkeypatch.setenv("NOTHING", "")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~", "{0}/home"),
        ("~/runs/x", "{0}/home/runs/x"),
        ("$SCRATCH/run", "{0}/scratch/run"),
        ("${SCRATCH}/a${JOB}b/$JOB", "{0}/scratch/a7b/7"),
        ("runs/~x", "runs/~x"),
        ("./~/x", "./~/x"),
        (r"runs/$\bad{$", r"runs/$\bad{$"),
        ("cost$5 $", "cost$5 $"),
        ("runs/lr=3e-4:wd=0.1", "runs/lr=3e-4:wd=0.1"),
        ("a b\tc", "a b\tc"),
        ("./s3:/x", "./s3:/x"),
        ("./None", "./None"),
    ],
)
def test_expanded(here: Path, text: str, expected: str) -> None:
    assert expand(text, "field") == expected.replace("{0}", str(here))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$UNSET/run", "field: $UNSET/run: the environment variable UNSET is not set; "),
        ("a/${UNSET}", "field: a/${UNSET}: the environment variable UNSET is not set; "),
        ("$NOTHING/run", "the environment variable NOTHING is empty; "),
        ("${}/x", "`${}` names no variable"),
        ("${JOB:-8}/x", "`${JOB:-8}` names no variable"),
        ("~no-such-user/x", "no home folder of ~no-such-user is known"),
        ("s3://bucket/run", "only local paths work here, not s3://…"),
        ("s3:/bucket/run", "only local paths work here"),
        ("gs://bucket", "only local paths work here"),
        ("hf://datasets/x", "only local paths work here"),
        ("https://example.org/x.yaml", "only local paths work here"),
        ("file:///tmp/x", "only local paths work here"),
        ("simplecache::s3://bucket/x", "only local paths work here"),
        ("a\0b", "holds a NUL character"),
        ("None", "field: `None` is no path"),
        ("null", "`null` is no path"),
        ("", "field: is empty"),
    ],
)
def test_paths_that_cannot_be_expanded_are_refused(here: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        expand(text, "field")
    assert expected in str(error.value)
    assert not list((here / "work").iterdir())


def test_a_bucket_in_a_variable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "s3://bucket")
    with pytest.raises(ConfigError, match="only local paths work here"):
        expand("$BUCKET/run", "output_dir")
    assert expand("$BUCKET/run", "--input", urls=True) == "s3://bucket/run"
    # a/ and a are two names there, and the checkpoints of one are not found under the other
    assert expand("$BUCKET/run//", "output_dir", urls=True) == "s3://bucket/run"
    assert [expand(url, "x", urls=True) for url in ("memory://", "file:///")] == ["memory://", "file:///"]


def test_what_has_this_very_name_is_meant(here: Path) -> None:
    """A `$` in a name that is there already, also of a dataset; a variable that is set comes first."""
    Path("a$b").mkdir()
    Path("set$x.idx").touch()
    assert expand("a$b", "RUN") == "a$b"
    assert expand("set$x", "--data") == "set$x"
    with pytest.raises(ConfigError, match="the environment variable b is not set"):
        expand("a$b/c", "RUN")


EVERY_PATH = {
    "output_dir": "{}",
    "data.tokenizer": "{}",
    "data.cache_dir": "{}",
    "kernels.cache_dir": "{}",
    "data.blend": "[{}]",
    "data.validation": "{{held: [{}, {{path: {}, weight: 2}}]}}",
    "data.stages": "[{{start: 3, blend: [{}]}}]",
}
"""Fields of a run config that hold paths, as overrides."""


def _texts(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _texts(inner, f"{prefix}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in _texts(inner, f"{prefix}[{i}]").items()}
    return {prefix: value} if isinstance(value, str) else {}


@pytest.fixture
def run_file(here: Path) -> Path:
    path = here / "work" / "run.yaml"
    path.write_text(to_yaml(tiny_run()))
    return path


def test_every_path_of_a_run(here: Path, run_file: Path) -> None:
    """In the file and as overrides; what is no path stays as it is, and a manifest's config too."""
    overrides = [f"{key}={form.replace('{}', '$SCRATCH/x').replace('{{', '{').replace('}}', '}')}"
                 for key, form in EVERY_PATH.items()]  # fmt: skip
    run = load_run(run_file, [*overrides, "logging.wandb_project=$SCRATCH"])
    texts = _texts(to_dict(run))
    found = [name for name, text in texts.items() if text == f"{here}/scratch/x"]
    assert sorted(found) == sorted(
        (".output_dir", ".data.tokenizer", ".data.cache_dir", ".kernels.cache_dir", ".data.blend[0].path",
         ".data.validation.held[0].path", ".data.validation.held[1].path", ".data.stages[0].blend[0].path")
    )  # fmt: skip
    assert [name for name, text in texts.items() if "$" in text] == [".logging.wandb_project"]
    (here / "work" / "again.yaml").write_text(to_yaml(run))
    assert load_run("again.yaml") == run
    literal = dataclasses.replace(run, output_dir="$SCRATCH/x")
    assert from_dict(RunConfig, to_dict(literal)) == literal


URLS_TOO = ("output_dir", "data.blend", "data.validation", "data.stages")
"""Those that may be on object storage."""


@pytest.mark.parametrize("key", URLS_TOO)
def test_urls(here: Path, run_file: Path, key: str) -> None:
    form = EVERY_PATH[key].replace("{}", '"$B/x"', 1).replace("{}", "y", 1).replace("{{", "{").replace("}}", "}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("B", "s3://bucket")
        run = load_run(run_file, [f"{key}={form}"])
    assert "s3://bucket/x" in _texts(to_dict(run)).values()
    validate(run, 1)
    with pytest.raises(ConfigError, match=f"{key}.*: s3:/bucket/x: write s3://…, with two slashes"):
        load_run(run_file, [f"{key}={form.replace('$B/x', 's3:/bucket/x')}"])


@pytest.mark.parametrize("key", EVERY_PATH)
@pytest.mark.parametrize("path", ["s3://bucket/x", "$UNSET/x", "~no-such-user/x", "None"])
def test_every_path_is_refused_by_name(here: Path, run_file: Path, key: str, path: str) -> None:
    form = EVERY_PATH[key].replace("{}", f'"{path}"').replace("{{", "{").replace("}}", "}")
    before = sorted((here / "work").iterdir())
    if path == "None" and key.endswith("cache_dir"):
        run = load_run(run_file, [f"{key}={path}"])
        assert (run.data.cache_dir, run.kernels.cache_dir) == (None, None)
        return
    if path.startswith("s3:") and key in URLS_TOO:
        return
    with pytest.raises(ConfigError) as error:
        load_run(run_file, [f"{key}={form}"])
    assert key in str(error.value)
    assert path in str(error.value)
    assert sorted((here / "work").iterdir()) == before


@pytest.mark.parametrize("null", ["None", "none", "null", "~", "Null", "", "'None'"])
def test_nulls(run_file: Path, null: str) -> None:
    names = ("data.cache_dir", "kernels.cache_dir", "logging.wandb_project", "modes.fixed", "train.exit_after")
    run = load_run(run_file, [f"{name}={null}" for name in names])
    assert (run.data.cache_dir, run.kernels.cache_dir, run.logging.wandb_project, run.modes.fixed) == (None,) * 4
    validate(run, 1)


def test_an_optional_path_that_is_empty(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.cache_dir: is empty"):
        load_run(run_file, ["data.cache_dir=''"])


def test_the_config_itself_and_models(here: Path, run_file: Path) -> None:
    run_file.rename(here / "scratch" / "run.yaml")
    model = tiny_run().model
    (here / "home" / "model.yaml").write_text(to_yaml(model))
    run = load_run("$SCRATCH/run.yaml", ["model=~/model.yaml"])
    assert run.model == model == load_model("~/model.yaml")
    for name in ("s3://bucket/model.yaml", "$UNSET/model.yaml"):
        with pytest.raises(ConfigError, match=r"model: .*(only local paths|is not set)"):
            load_run("$SCRATCH/run.yaml", [f"model={name}"])
    with pytest.raises(ConfigError, match=r"run config: s3:.*only local paths"):
        load_run("s3://bucket/run.yaml")


def test_named_arguments_are_expanded(here: Path) -> None:
    arguments = argparse.Namespace(runs=["~/a", "b"], out=Path("$SCRATCH/x.png"), tokenizer=None)
    expand_arguments(arguments, "runs", "--out", "--tokenizer")
    assert arguments.runs == [f"{here}/home/a", "b"]
    assert arguments.out == here / "scratch" / "x.png"
    assert arguments.tokenizer is None
    with pytest.raises(ConfigError, match=r"--out: s3:/bucket/x.png: only local paths work here"):
        expand_arguments(argparse.Namespace(out=Path("s3://bucket/x.png")), "--out")


def _tool(name: str) -> ModuleType:
    return importlib.import_module(f"oryx_megatron.tools.{name}")


COMMANDS = {
    "inspect_checkpoint": [["@"]],
    "plot_run": [["@", "--out", "x.png"], ["here", "--out", "@.png"]],
    "generate": [["@", "--prompt", "a"], ["here", "--prompt-file", "@"], ["here", "--prompt", "a", "--tokenizer", "@"]],
    "convert_to_hf": [["@", "out"], ["here", "@"], ["here", "out", "--tokenizer", "@"]],
    "convert_from_hf": [["@", "out"], ["here", "@"], ["here", "out", "--run", "@"]],
    "convert_from_deepspeed": [["@", "out"], ["here", "@"]],
    "merge_datasets": [["@", "--output", "out"], ["here", "--output", "@"]],
    "split_dataset": [["@", "a=1"], ["here", "a=1", "--output", "@"]],
    "inspect_dataset": [["@"], ["here", "--compare", "@"], ["here", "--tokenizer", "@"], ["here", "--plot", "@"]],
    "preprocess_data": [["--input", "here", "--tokenizer", "@", "--output", "out"],
                        ["--input", "here", "--tokenizer", "here", "--output", "@"]],
    "train_tokenizer": [["--input", "here", "--output", "@"], ["--adopt", "@"]],
    "plan": [["@", "--gpus", "1", "--sequence", "64", "--batch", "1"],
             ["130m-gdn", "--gpus", "1", "--sequence", "64", "--batch", "1", "--picture", "@"]],
    "quickstart": [["--output", "@"], ["--data", "@"]],
}  # fmt: skip
"""Command lines with @ for a path."""
REMOTE = {
    *(("inspect_checkpoint", 0), ("plot_run", 0), ("generate", 0), ("convert_to_hf", 0), ("convert_from_hf", 0)),
    *(("merge_datasets", 0), ("split_dataset", 0), ("inspect_dataset", 0), ("inspect_dataset", 1)),
}
"""Those that name what may be on object storage."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_the_tools(here: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    """Refused by name, and nothing is made."""
    main = _tool(name).main
    for number, line in enumerate(COMMANDS[name]):
        wrong = [("s3://bucket/x", "only local paths work here"), ("$UNSET/x", "UNSET is not set")]
        if (name, number) in REMOTE:
            wrong[0] = ("s3:/bucket/x", "write s3://…, with two slashes")
        if (name, number) == ("convert_to_hf", 1):
            wrong[0] = ("foo://bucket/x", "foo:// is no storage that fsspec knows")
        for path, expected in wrong:
            assert main([word.replace("@", path) for word in line]) == 2
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 1
            assert expected in said[0]
            assert not list((here / "work").iterdir())


def test_tools_find_what_is_meant(here: Path, capsys: pytest.CaptureFixture) -> None:
    run = here / "scratch" / "run"
    run.mkdir()
    step = {"kind": "step", "iteration": 1, "loss": 2.0, "tokens": 10}
    (run / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    assert _tool("plot_run").main(["$SCRATCH/run", "--out", "~/x.png"]) == 0
    assert (here / "home" / "x.png").is_file()
    assert monitor.main(["foo://bucket/run", "--once"]) == 2
    assert "foo://bucket/run/metrics.jsonl: foo:// is no storage that fsspec knows" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int) -> None:
    """Not by its hidden name; and nothing is left of it."""

    def write(path: Path, name: object) -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(number, os.strerror(number), name and str(temporary))

    for name in (None, "temporary"):
        assert main_guard(write)(tmp_path / "e" / "perplexity.json", name) == 2
        told = capfd.readouterr().err
        assert told == f"error: {tmp_path}/e/perplexity.json: {os.strerror(number)}\n"
        assert not list((tmp_path / "e").iterdir())
