"""Runs, checkpoints and exports on object storage, through the commands that users type; S3 where moto is installed.

They are those of docs/storage.md.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oryx_megatron import monitor, storage
from oryx_megatron.checkpoint.remote import newest
from oryx_megatron.eval import __main__ as evaluation
from oryx_megatron.storage import Remote, StorageError
from oryx_megatron.testing.project import tiny_project
from oryx_megatron.train import __main__ as train
from oryx_megatron.train.remote import RemoteLock

TOOLS = Path(__file__).parents[2] / "tools"
SMALL = ("model.num_layers=2",)


def forget(cache: Path) -> None:
    """As on another machine: no copy is left."""
    for descriptor in storage._held.values():
        os.close(descriptor)
    storage._held.clear()
    shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of a server on this machine."""
    pytest.importorskip("s3fs", reason="no s3fs: pip install s3fs")
    server = pytest.importorskip("moto.server", reason="no moto: pip install 'moto[s3]' flask flask-cors")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        importlib.import_module("boto3").client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    running.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml, and in whole/ the run that was never stopped, on this machine's disk."""
    config = tiny_project(tmp_path_factory.mktemp("project"))
    assert train.main([str(config), *SMALL, f"output_dir={config.parent}/whole", "checkpoint.interval=2"]) == 0
    return config


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    monkeypatch.setattr(RemoteLock, "beat", 0.5)
    yield tmp_path / "cache"
    forget(tmp_path / "cache")


def steps(data: bytes | None) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (data or b"").splitlines()]
    fields = ("iteration", "loss", "grad_norm", "lr", "attention_share", "consumed_samples")
    return [tuple(line[field] for field in fields) for line in lines if line["kind"] == "step"]


def tool(name: str, *arguments: object) -> int:
    return importlib.import_module(f"oryx_megatron.tools.{name}").main([str(argument) for argument in arguments])


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_a_run_on_object_storage_is_the_run_on_a_disk(
    project: Path, cache: Path, scheme: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped, resumed on another machine, bit for bit the run on a disk; then read by every command."""
    base = request.getfixturevalue("s3") if scheme == "s3" else f"memory://runs-{os.getpid()}"
    url = f"{base}/a run/é"
    for end in ("bin", "idx"):
        Remote(f"{base}/data.{end}").upload(project.parent / f"data.{end}")
    data = (f"data.blend=[{base}/data]", "data.num_workers=1")
    common = [str(project), *SMALL, *data, f"output_dir={url}", "checkpoint.interval=2", "checkpoint.keep=2"]
    assert train.main([*common, "--dry-run"]) == 0
    assert Remote(url).files() == {}
    assert train.main([*common, "train.exit_after=3"]) == 0
    assert "lock" not in Remote(url).files()
    forget(cache)
    assert train.main([*common, "checkpoint.asynchronous=false"]) == 0
    capsys.readouterr()
    files = Remote(url).files()
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {
        "iteration_0000004",
        "iteration_0000006",
    }
    assert {name for name in files if "/" not in name} == {
        "config.yaml",
        "events.jsonl",
        "metrics.jsonl",
        "summary.json",
    }
    whole = (project.parent / "whole" / "metrics.jsonl").read_bytes()
    assert steps(Remote(f"{url}/metrics.jsonl").read()) == steps(whole)
    assert len(steps(whole)) == 6
    events = [json.loads(line)["event"] for line in (Remote(f"{url}/events.jsonl").read() or b"").splitlines()]
    assert [event for event in events if event in ("start", "stop", "end")] == ["start", "stop", "start", "end"]

    forget(cache)
    assert tool("inspect_checkpoint", url, "--depth", 1) == 0
    assert f"{url}/checkpoints/iteration_0000006\n  iteration 6, 24 samples read" in capsys.readouterr().out
    assert not list(cache.rglob("*.distcp"))  # described by its metadata alone
    assert tool("inspect_checkpoint", f"{url}/checkpoints/iteration_0000004", "--verify") == 0
    assert "iteration_0000004: all 4 files are as they were written" in capsys.readouterr().out
    assert tool("generate", url, "--prompt", "a", "--new-tokens", 3) == 0
    for model in (url, str(project.parent / "whole")):
        assert evaluation.main(["perplexity", model, "--plans", "attention", "recurrent"]) == 0
    there, here = (
        capsys.readouterr()
        .out.split(f"{url}/checkpoints/iteration_0000006, iteration 6\n")[1]
        .split(f"{project.parent}/whole/checkpoints/iteration_0000006, iteration 6\n")
    )
    assert there == here
    seen = io.StringIO()
    assert monitor.main([url, "--once"], seen) == 0
    assert "6/6" in seen.getvalue()
    assert tool("plot_run", url, "--out", cache.parent / "x.png") == 0

    export, local = f"{base}/exports/x", cache.parent / "export"
    assert tool("convert_to_hf", url, export) == 0
    assert tool("convert_to_hf", project.parent / "whole", local) == 0
    assert set(Remote(export).files()) == {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    assert not list(cache.rglob("models/*being*/*"))
    assert tool("convert_to_hf", url, export) == 2
    assert f"{export} exists already" in capsys.readouterr().err
    assert tool("convert_to_hf", url, export, "--overwrite", "--dtype", "bf16") == 0
    assert tool("convert_from_hf", export, cache.parent / "back") == 0
    (cache.parent / "copy").mkdir()
    Remote(f"{export}/model.safetensors").download(cache.parent / "copy" / "model.safetensors")
    weights, expected = load_file(cache.parent / "copy" / "model.safetensors"), load_file(local / "model.safetensors")
    assert all(
        torch.equal(weights[name].float(), tensor.to(weights[name].dtype).float()) for name, tensor in expected.items()
    )
    for source, change in ((url, "init_from.data=true"), (export, "init_from.data=false")):
        start = [str(project), *SMALL, f"output_dir={base}/next", f"init_from={source}", change]
        assert train.main([*start, "--dry-run"]) == 0
        assert train.main([*start, "train.exit_after=1", f"output_dir={base}/next-{change[-5:]}"]) == 0
    Remote(f"{export}/notes.txt").write(b"ours")
    assert tool("convert_to_hf", url, export, "--overwrite") == 2
    assert f"{export} holds notes.txt, which this command did not write" in capsys.readouterr().err


def test_what_goes_wrong(
    project: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A save that cannot be copied costs itself; a damaged checkpoint is named and the one before it is used."""
    url = f"memory://wrong-{os.getpid()}/run"
    common = [str(project), *SMALL, f"output_dir={url}", "checkpoint.interval=2", "checkpoint.keep=3"]
    real, failing = Remote.upload, ["/checkpoints/iteration_0000004/"]

    def upload(self: Remote, path: Path) -> None:
        if any(part in self.url for part in failing) and not self.name.endswith(".distcp"):
            raise StorageError(f"{self} cannot be written: the storage does not answer")
        real(self, path)

    monkeypatch.setattr(Remote, "upload", upload)
    with caplog.at_level(logging.ERROR):
        assert train.main([*common]) == 0
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 1
    assert "iteration_0000004/" in told[0]
    assert told[0].endswith("the storage does not answer; training continues, the last good checkpoint stays")
    names = Remote(f"{url}/checkpoints").files()
    assert {name.partition("/")[0] for name in names} == {"iteration_0000002", "iteration_0000006"}  # its rest is gone
    failing.clear()

    Remote(f"{url}/checkpoints/iteration_0000006/common.pt").write(b"damaged")
    (data,) = [Remote(f"{url}/checkpoints/iteration_0000002/{name}") for name in ("__0_0.distcp",)]
    assert newest(url)[0].name == "iteration_0000006"
    forget(cache)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert train.main([*common]) == 0
    told = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert told == [f"{url}/checkpoints/iteration_0000006 is damaged (common.pt); trying the checkpoint before it"]
    whole = (project.parent / "whole" / "metrics.jsonl").read_bytes()
    assert steps(Remote(f"{url}/metrics.jsonl").read()) == steps(whole)
    complete = {name for name in Remote(f"{url}/checkpoints").files() if name.endswith("manifest.json")}
    assert len(complete) == 3  # the one that was cut short is whole now, the damaged one was replaced

    kept = data.read() or b""
    data.write(b"x" * len(kept))
    for number in (4, 6):
        Remote(f"{url}/checkpoints/iteration_000000{number}/manifest.json").remove()
    forget(cache)
    assert train.main([*common]) == 2
    assert tool("inspect_checkpoint", url, "--verify") == 2
    Remote(f"{url}/checkpoints/notes").write(b"x")
    data.write(kept)
    assert train.main([*common]) == 0


def test_errors_in_one_line(project: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://none-{os.getpid()}/x"
    commands = [
        lambda path: tool("inspect_checkpoint", path),
        lambda path: tool("generate", path, "--prompt", "a"),
        lambda path: tool("convert_to_hf", path, "out"),
        lambda path: tool("convert_from_hf", path, cache.parent / "out"),
        lambda path: tool("plot_run", path, "--out", cache.parent / "x.png"),
        lambda path: evaluation.main(["perplexity", path]),
        lambda path: evaluation.main(["retrieval", path]),
        lambda path: train.main([str(project), f"init_from={path}", f"output_dir={cache.parent}/run", "--dry-run"]),
        lambda path: train.main([str(project), f"init_from={path}", f"output_dir={cache.parent}/run"]),
    ]
    for path, expected in ((url, url), ("foo://b/x", "foo:// is no storage that fsspec knows")):
        for command in commands:
            assert command(path) == 2
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
            assert len(said) == 1
            assert expected in said[0]
    for folder, expected in (
        ("foo://b/x", "output_dir: foo://b/x/lock: foo:// is no storage that fsspec knows"),
        ("https://host/x", "output_dir: https://host/x: files cannot be written there"),
        (f"{url} engine=deepspeed", "output_dir: not with engine deepspeed; DeepSpeed writes local files"),
    ):
        for more in ([], ["--dry-run"]):
            assert train.main([str(project), *f"output_dir={folder}".split(), *more]) == 2
            assert expected in capsys.readouterr().err
    assert Remote(url).files() == {}


def test_a_bucket_that_is_missing(project: Path, cache: Path, s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A typo in its name: found by --dry-run too, and never called a missing file."""
    url = "s3://bukket/x"
    for arguments in (
        [f"output_dir={url}", "--dry-run"],
        [f"output_dir={url}"],
        [f"init_from={url}", f"output_dir={cache.parent}/run", "--dry-run"],
        [f"data.blend=[{url}]", f"output_dir={cache.parent}/run", "--dry-run"],
    ):
        assert train.main([str(project), *arguments]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.endswith(": no such bucket or file (The specified bucket does not exist)"), said
        assert said.startswith("error")
        assert url in said
    for name, arguments in (
        ("inspect_checkpoint", [url]),
        ("inspect_dataset", [url]),
        ("generate", [url, "--prompt", "a"]),
    ):
        assert tool(name, *arguments) == 2
        assert "no such bucket or file (The specified bucket does not exist)" in capsys.readouterr().err
    assert train.main([str(project), f"output_dir={s3}/fresh", "--dry-run"]) == 0
    assert f"GiB free for copies in {cache}; 1 checkpoints of" in " ".join(capsys.readouterr().out.split())
