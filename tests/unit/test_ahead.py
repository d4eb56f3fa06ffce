"""The process that compiles the gated delta rule's kernels while a run imports (train/ahead.py); without a GPU."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oryx_megatron import platform
from oryx_megatron.config import load_run
from oryx_megatron.train import ahead

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "configs" / "run" / "pretrain-1.4b-gdn.yaml"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[list[str]]]:
    """Commands that `begin` starts on a machine with GPUs and the packages; they sleep instead."""
    commands: list[list[str]] = []
    original = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return original([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(ahead.subprocess, "Popen", popen)
    monkeypatch.setattr(ahead, "_sees_gpus", lambda: True)
    monkeypatch.setattr(platform, "installed", lambda package: True)
    monkeypatch.setattr(platform, "version", lambda distribution: (1, 0))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield commands
    ahead.end()


def gone(process: int, within: float = 20) -> bool:
    """Whether a process ends in time; one that nobody waited for has ended, too."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_one_process_for_the_shape_of_a_rank(started: list[list[str]]) -> None:
    run = load_run(str(RUN), ["parallel.tensor=2", "parallel.context=2", "train.micro_batch_size=3"])
    ahead.begin(run)
    (command,) = started
    heads, groups = run.model.num_heads // 4, run.model.kv_heads // 4
    shape = {"batch": 3, "length": run.data.sequence_length, "heads": heads, "groups": groups}
    assert repr(shape) in command[-1]
    process = ahead._process
    assert process is not None
    assert process.poll() is None
    ahead.end()
    assert process.returncode == -signal.SIGKILL
    ahead.end()  # harmless


@pytest.mark.parametrize(
    ("override", "starts"),
    [
        ("kernels.recurrence=fla", True),
        ("kernels.recurrence=reference", False),
        ("kernels.mixer=reference", False),
        ("precision.dtype=fp32", False),
        ("model.qk_head_dim=64", False),
        ("model.mixer=mamba2", False),
        ("model.pattern=[attention]", False),
    ],
)
def test_only_where_flash_qla_serves(started: list[list[str]], override: str, starts: bool) -> None:
    ahead.begin(load_run(str(RUN), [override]))
    assert len(started) == starts


@pytest.mark.parametrize("missing", ["fla", "flash_qla", "tilelang"])
def test_not_without_a_package(started: list[list[str]], monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(platform, "installed", lambda package: package != missing)
    ahead.begin(load_run(str(RUN)))
    assert started == []


def test_not_without_a_gpu(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_sees_gpus", lambda: False)
    ahead.begin(load_run(str(RUN)))
    assert started == []


@pytest.mark.parametrize(
    ("rank", "local_rank", "shared", "starts"),
    [(0, 0, True, True), (8, 0, True, False), (8, 0, False, True), (1, 1, False, False)],
)
def test_on_the_first_rank_of_a_cache(
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rank: int,
    local_rank: int,
    shared: bool,
    starts: bool,
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 16, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    ahead.begin(load_run(str(RUN), [f"kernels.cache_dir={tmp_path}"] if shared else []))
    assert len(started) == starts


def test_not_where_all_is_compiled(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shape is, and other versions of the packages are."""
    run = load_run(str(RUN))
    ahead._note(ahead._shape(run)).touch()
    ahead.begin(run)
    assert started == []
    ahead.begin(load_run(str(RUN), ["train.micro_batch_size=3"]))
    assert len(started) == 1
    ahead.end()
    monkeypatch.setattr(platform, "version", lambda distribution: (1, 1))
    ahead.begin(run)
    assert len(started) == 2


def test_what_fails_is_no_matter_of_the_run(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "oryx_megatron")

    def popen(command: list[str], **options: Any) -> Any:
        raise OSError("no processes left")

    monkeypatch.setattr(ahead.subprocess, "Popen", popen)
    ahead.begin(load_run(str(RUN)))
    ahead.end()
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


@pytest.mark.skipif(ahead._sees_gpus(), reason="for machines without a GPU")
def test_without_cuda_it_ends(
    started: list[list[str]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `begin` starts is a command that runs, and says nothing."""
    ahead.begin(load_run(str(RUN)))
    ahead.end()
    monkeypatch.undo()
    turns = os.memfd_create("turns")
    done = subprocess.run(
        [sys.executable, *started[0][1:-1], re.sub(r"\((\d+), (\d+)", f"({os.getpid()}, {turns}", started[0][-1])],
        **{"pass_fds": (turns,), "start_new_session": True, "timeout": 100},
    )
    assert done.returncode == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("compiles", ["True", "False", "1 / 0"])
def test_its_exit_code(compiles: str) -> None:
    """And it prints nothing."""
    code = f"""
import os
from oryx_megatron.train import ahead
ahead._may_share_the_gpu = lambda: True
ahead._compile = lambda turns, note, shape: {compiles}
ahead.work(os.getppid(), 0, "note", {{}})
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == (compiles != "True")
    assert done.stderr == done.stdout == ""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_run(how: signal.Signals, tmp_path: Path) -> None:
    """And those that it started do."""
    work = f"""
import os, time
from oryx_megatron.train import ahead
def compile(turns, note, shape):
    child = os.fork()
    if child:
        open({str(tmp_path / "new")!r}, "w").write(f"{{os.getpid()}} {{child}}")
        os.rename({str(tmp_path / "new")!r}, {str(tmp_path / "processes")!r})
    time.sleep(100)
ahead._may_share_the_gpu, ahead._compile = lambda: True, compile
ahead.work(os.getppid(), 0, "note", {{}})
"""
    run = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {work!r}], start_new_session=True)
time.sleep(100)
"""
    main = subprocess.Popen([sys.executable, "-c", run])
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "processes").exists() and time.monotonic() < until:
            time.sleep(0.05)
        processes = [int(number) for number in (tmp_path / "processes").read_text().split()]
    finally:
        os.kill(main.pid, how)
        main.wait()
    assert [gone(process) for process in processes] == [True, True]
