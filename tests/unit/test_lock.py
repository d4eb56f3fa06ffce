"""RUN/lock: one run at a time in a folder, and never one too few."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oryx_megatron.errors import ConfigError
from oryx_megatron.train import lock

FORK: Any = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 1.0)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Some other living process of this machine."""
    started = subprocess.Popen(["sleep", "100"])
    yield started
    started.kill()
    started.wait()


def leave(folder: Path, **changes: Any) -> Path:
    """A lock as another process leaves it."""
    path = folder / lock.NAME
    path.write_text(json.dumps(lock._identity() | {"token": "another's"} | changes) + "\n")
    return path


def holder(folder: Path) -> Any:
    return json.loads((folder / lock.NAME).read_text())


def test_held_and_released(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    held = lock.hold(run)
    assert held is not None
    assert holder(run)["pid"] == os.getpid()
    assert lock.hold(run) is held  # this process's own
    assert [path.name for path in run.iterdir()] == ["lock"]
    first = (run / "lock").stat().st_mtime_ns
    time.sleep(0.3)
    assert (run / "lock").stat().st_mtime_ns > first
    held.release()
    assert not run.parent.exists()  # made for it, and empty
    again = lock.hold(run)
    assert again is not None
    leave(run)
    again.release()
    assert holder(run)["token"] == "another's"


def test_a_living_process_is_named(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    path = leave(tmp_path, pid=process.pid, birth=lock._birth(process.pid), job="77", started="2026-01-02 03:04:05")
    old = time.time() - 1e6  # asleep (SIGSTOP, a debugger) for however long: it lives
    os.utime(path, (old, old))
    with pytest.raises(ConfigError) as caught:
        lock.hold(tmp_path)
    text = f"^output_dir: {tmp_path} is in use by process {process.pid} on {lock._machine()[0]}, started 2026-01-02 "
    assert str(caught.value).startswith(text[1:] + "03:04:05, Slurm job 77; ")
    assert str(caught.value).endswith("wait for it, end it, or choose another output_dir")
    assert holder(tmp_path)["token"] == "another's"


@pytest.mark.parametrize("reaped", [True, False])
def test_kill_9(tmp_path: Path, process: subprocess.Popen[bytes], reaped: bool) -> None:
    """At once, though the last sign of life is a moment old; a zombie is no life."""
    leave(tmp_path, pid=process.pid, birth=lock._birth(process.pid))
    process.kill()
    if reaped:
        process.wait()
    while Path(f"/proc/{process.pid}").exists() and " Z " not in Path(f"/proc/{process.pid}/stat").read_text():
        time.sleep(0.01)
    took_over_at_once(tmp_path)


def test_process_id_taken_anew(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    birth = lock._birth(process.pid)
    assert birth is not None
    leave(tmp_path, pid=process.pid, birth=birth - 1)
    took_over_at_once(tmp_path)


def took_over_at_once(folder: Path) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("it waits for signs of life")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "time", SimpleNamespace(**vars(time) | {"sleep": sleep}))
        held = lock.hold(folder)
    assert held is not None
    assert holder(folder)["pid"] == os.getpid()
    assert [path.name for path in folder.iterdir()] == ["lock"]
    held.release()


def _threads() -> int:
    return [thread.name for thread in threading.enumerate()].count("run lock")


def test_a_folder_that_was_deleted_is_held_anew(tmp_path: Path) -> None:
    """In the same process: the first lock's thread takes the second one neither for another run's nor for its own."""
    run = tmp_path / "run"
    others = _threads()  # of tests before
    for _ in range(3):
        held = lock.hold(run)
        assert held is not None
        shutil.rmtree(run)
        again = lock.hold(run)
        assert again is not None
        assert again is not held
        time.sleep(4 * lock.BEAT)  # it ended the process
        assert again.is_mine()
        assert _threads() == others + 1
        again.release()
        assert not run.exists()


ELSEWHERE = {
    "another host": {"host": "far", "machine": ["far", "a boot", "pid:[1]"]},
    "a container": {"machine": [*lock._machine()[:2], "pid:[1]"]},
    "before a reboot": {"machine": [lock._machine()[0], "a boot", "pid:[1]"]},
}


@pytest.mark.parametrize("changes", ELSEWHERE.values(), ids=ELSEWHERE)
def test_on_another_machine_signs_of_life_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Where a process cannot be asked for, its signs of life count, however wrong its clock may be."""
    for ahead in (0.0, 1e6):
        path = leave(tmp_path, **changes)
        end = threading.Event()

        def beat(path: Path = path, ahead: float = ahead, end: threading.Event = end) -> None:
            while not end.wait(0.05):
                os.utime(path, (time.time() + ahead,) * 2)

        beating = threading.Thread(target=beat)
        beating.start()
        try:
            with pytest.raises(ConfigError, match=r"is in use by process "):
                lock.hold(tmp_path)
        finally:
            end.set()
            beating.join()
    leave(tmp_path, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "STALE", 100.0)
        os.utime(path, (time.time() - 101,) * 2)
        took_over_at_once(tmp_path)
    leave(tmp_path, **changes)
    started = time.monotonic()
    held = lock.hold(tmp_path)
    assert held is not None
    assert 0.9 < time.monotonic() - started < 10
    held.release()


def test_requeued_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later start of the same job never waits; another job, or another step of the same start, does."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for start in (0, "none"):
        leave(tmp_path, **ELSEWHERE["another host"], job="77", start=start)
        if start == 0:
            took_over_at_once(tmp_path)
    for job, start in (("78", 0), ("77", 1), ("77", 2)):
        leave(tmp_path, **ELSEWHERE["another host"], job=job, start=start)
        identity = lock._identity()
        assert identity["start"] == 1
        assert lock._lives(holder(tmp_path), identity) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[1]", b"[" * 60000, b'{"pid": "1"}', b'{"pid": 1e99}'])
def test_a_damaged_lock_is_gone_when_nothing_touches_it(tmp_path: Path, content: bytes) -> None:
    """As a crash or a full disk leaves it: gone when nothing touches it."""
    (tmp_path / lock.NAME).write_bytes(content)
    os.utime(tmp_path / lock.NAME, (time.time() - 2,) * 2)
    held = lock.hold(tmp_path)
    assert held is not None
    assert holder(tmp_path)["pid"] == os.getpid()
    held.release()


def slowed(seed: int) -> None:
    """Every step of this process on a file may take long: another may do anything in between."""
    chance = random.Random(seed)

    def slow(call: Callable[..., Any]) -> Callable[..., Any]:
        def later(*arguments: Any, **named: Any) -> Any:
            time.sleep(chance.choice((0.0, 0.0, 0.002, 0.02)))
            result = call(*arguments, **named)
            time.sleep(chance.choice((0.0, 0.0, 0.002, 0.02)))
            return result

        return later

    for owner, name in ((lock, "_read"), *((os, name) for name in ("link", "rename", "replace", "unlink"))):
        setattr(owner, name, slow(getattr(owner, name)))


@pytest.mark.parametrize("delayed", [False, True])
def test_one_of_many(tmp_path: Path, delayed: bool) -> None:
    """Of eight starts over a stale lock one gets it, however long each takes from one step to the next."""
    birth = lock._birth(os.getpid())
    assert birth is not None
    for attempt in range(5):
        leave(tmp_path, birth=birth - 1, token=f"{attempt}")
        begin, done, won = FORK.Event(), FORK.Event(), FORK.SimpleQueue()

        def start(seed: int, begin: Any = begin, done: Any = done, won: Any = won) -> None:
            if delayed:
                slowed(seed)
            begin.wait()
            try:
                lock.hold(tmp_path)
                won.put(os.getpid())
            except ConfigError:
                won.put(None)
            done.wait(20)

        starts = [FORK.Process(target=start, args=(8 * attempt + i,)) for i in range(8)]
        for process in starts:
            process.start()
        begin.set()
        winners = [pid for pid in (won.get() for _ in starts) if pid is not None]
        done.set()
        for process in starts:
            process.join()
        assert len(winners) == 1
        assert holder(tmp_path)["pid"] == winners[0]
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("point", ["read", "replace"])
def test_asleep_while_taking_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """The claimant of a stale lock sleeps for so long that another start breaks its claim and trains."""
    birth = lock._birth(os.getpid())
    assert birth is not None
    leave(tmp_path, birth=birth - 1)
    begun: list[lock.RunLock] = []

    def another() -> None:
        if not begun:
            for claim in tmp_path.glob(".lock.*.claim"):  # its holder looks gone from there
                claim.write_text(json.dumps(json.loads(claim.read_text()) | {"pid": 2**22 + 1}) + "\n")
            begun.append(lock.RunLock(tmp_path / lock.NAME))
            begun[0].acquire(shown="run")

    sleeper = lock.RunLock(tmp_path / lock.NAME)
    if point == "read":
        read = sleeper.read
        monkeypatch.setattr(sleeper, "read", lambda: (read(), another())[0])
    else:
        replace = Path.replace
        monkeypatch.setattr(Path, "replace", lambda path, to: (another(), replace(path, to))[1])
    assert not sleeper.take_over(lock._read(tmp_path / lock.NAME))
    assert not sleeper.is_mine()
    begun[0]._end.set()


def test_claims_of_the_dead(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    """A start that was killed while it took over is in nobody's way; one that stopped is named."""
    birth = lock._birth(os.getpid())
    path = leave(tmp_path, birth=(birth or 0) - 1)
    claim = tmp_path / f".lock.{lock._key(path, lock._read(path))}.claim"
    claim.write_text(json.dumps(lock._identity() | {"token": "dead", "birth": (birth or 0) - 1}) + "\n")
    took_over_at_once(tmp_path)
    leave(tmp_path, birth=(birth or 0) - 1)
    alive = lock._identity() | {"token": "alive", "pid": process.pid, "birth": lock._birth(process.pid)}
    claim.write_text(json.dumps(alive) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "STALE", 0.1)
        with pytest.raises(ConfigError, match=f"is being taken over by process {process.pid} on .*; end it first"):
            lock.hold(tmp_path)
    process.kill()
    process.wait()
    took_over_at_once(tmp_path)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(paths[0]))

    monkeypatch.setattr(os, "link", refuse)
    leave(tmp_path, birth=1.0)
    took_over_at_once(tmp_path)
    held = lock.RunLock(tmp_path / lock.NAME)
    assert held.create()
    assert not lock.RunLock(tmp_path / lock.NAME).create()


@pytest.mark.parametrize("deleted", [False, True])
def test_taken_over_while_asleep(tmp_path: Path, deleted: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """A holder whose lock is another's ends; one whose lock was deleted by hand makes it again."""
    ready, end = FORK.Event(), FORK.Event()

    def sleep() -> None:
        lock.hold(tmp_path)
        ready.set()
        end.wait(20)

    child = FORK.Process(target=sleep)
    child.start()
    ready.wait(20)
    if deleted:
        (tmp_path / lock.NAME).unlink()
        wait_for(lambda: lock.parse(lock._read(tmp_path / lock.NAME)).get("pid") == child.pid)
        end.set()
    else:
        leave(tmp_path)
    child.join(20)
    assert child.exitcode == (0 if deleted else 2)
    if not deleted:
        assert f"was taken over by process {os.getpid()} on " in capfd.readouterr().err


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no folder, or cannot be written to, is named in a line."""
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "run" / "lock").mkdir(parents=True)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "checkpoints").touch()
    for folder, expected in (
        (file, f"output_dir: {file} is not a folder; choose another"),
        (file / "below", f"output_dir: {file}/below is not a folder; choose another"),
        (tmp_path / "dangling", f"output_dir: {tmp_path}/dangling is not a folder; choose another"),
        (tmp_path / "run", f"output_dir: {tmp_path}/run/lock should be a file; choose another output_dir"),
        (tmp_path / "old", f"output_dir: {tmp_path}/old/checkpoints should be a folder; choose another output_dir"),
        (tmp_path / ("x" * 300), f"output_dir: cannot write to {tmp_path}/{'x' * 300} (File name too long); "),
        (Path("/proc/run"), "output_dir: cannot write to /proc/run (No such file or directory); choose another"),
    ):
        with pytest.raises(ConfigError) as caught:
            lock.hold(folder)
        assert str(caught.value).startswith(expected)

    def refuse(path: Any, *arguments: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=rf"^output_dir: cannot write to {tmp_path}/lock \(Permission denied\)"):
        lock.hold(tmp_path)
