"""Object storage: what a Remote does, its errors in one line, the bounded cache, the lock of a run."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from oryx_megatron import storage
from oryx_megatron.checkpoint import find_checkpoint, store
from oryx_megatron.checkpoint.manifest import Manifest, file_digest, write_manifest
from oryx_megatron.checkpoint.remote import RemoteCheckpoints
from oryx_megatron.errors import ConfigError, OryxError
from oryx_megatron.storage import BLOCK, Ranges, Remote, StorageError
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train import lock
from oryx_megatron.train.remote import RemoteLock, RunFiles


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    monkeypatch.setattr(storage, "_held", {})
    monkeypatch.setattr(storage, "_settings", storage._Settings())
    yield tmp_path / "cache"
    for descriptor in storage._held.values():
        os.close(descriptor)


@pytest.fixture(params=["memory", "file"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "file":
        return Remote(f"file://{tmp_path}/bucket")
    return Remote(f"memory://{tmp_path.name}-{os.getpid()}")


def test_remote_files_are_written_listed_read_and_removed(bucket: Remote, tmp_path: Path) -> None:
    assert bucket.files() == {}
    assert (bucket / "a").read() is None
    assert (bucket / "a").size() is None
    assert (bucket / "a").version() is None
    (bucket / "x" / "a").write(b"0123456789")
    (bucket / "b").write(b"b", new=True)
    with pytest.raises(FileExistsError):
        (bucket / "b").write(b"c", new=True)
    assert bucket.files() == {"x/a": 10, "b": 1}
    assert (bucket / "x").files() == {"a": 10}
    assert (bucket / "b").read() == b"b"
    assert (bucket / "x/a").read_range(3, 7) == b"3456"
    first = (bucket / "b").version()
    time.sleep(0.01)
    (bucket / "b").write(b"d")
    assert (bucket / "b").version() != first
    (bucket / "x/a").download(tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"0123456789"
    (tmp_path / "up").write_bytes(b"up")
    (bucket / "new/up").upload(tmp_path / "up")
    assert (bucket / "new/up").read() == b"up"
    (bucket / "new/up").remove()
    (bucket / "new/up").remove()
    assert set(bucket.files()) == {"x/a", "b"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]


def upload_checkpoint(url: str, root: Path, content: str, *, killed_at: int | None = None) -> None:
    """A save of iteration 5 by one rank, which ends as if killed before so many changes of the storage."""
    checkpoints = RemoteCheckpoints.__new__(RemoteCheckpoints)  # without ranks
    checkpoints.remote, checkpoints.root = Remote(url), root
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        if killed_at is not None:
            changes = itertools.count()
            for name in ("upload", "remove"):
                act = getattr(Remote, name)

                def act_until(remote: Remote, *arguments: Path, act: Callable[..., None] = act) -> None:
                    if next(changes) == killed_at:
                        raise KeyboardInterrupt
                    act(remote, *arguments)

                patch.setattr(Remote, name, act_until)
        checkpoints.target = checkpoints.begin(5)
        folder = store.begin(root, 5)
        (folder / "__0_0.distcp").write_text(content)
        facts = {"__0_0.distcp": file_digest(folder / "__0_0.distcp")}
        write_manifest(folder, Manifest(5, 0, {}, {}, {}, {}, [], {}, None, facts))
        checkpoints.upload(folder, facts)
        checkpoints.publish(folder, ["manifest.json"])
    shutil.rmtree(root)


def test_a_kill_while_a_checkpoint_is_replaced(bucket: Remote, tmp_path: Path, cache: Path) -> None:
    """Whatever was uploaded or removed by then: the earlier or the new checkpoint of the iteration is found, whole."""
    found = []
    for killed_at in range(7):
        url = f"{bucket}/{killed_at}"
        upload_checkpoint(f"{url}/checkpoints", tmp_path / "here", "old")
        upload_checkpoint(f"{url}/checkpoints", tmp_path / "here", "new", killed_at=killed_at)
        copy = find_checkpoint(url)
        assert not store.damaged_files(copy, store.read_own(copy))
        found.append((copy / "__0_0.distcp").read_text())
        upload_checkpoint(f"{url}/checkpoints", tmp_path / "here", "newer")
        assert len({name.partition("/")[0] for name in Remote(f"{url}/checkpoints").files()}) == 1
        assert (find_checkpoint(url) / "__0_0.distcp").read_text() == "newer"
    assert found == ["old", "old", *["new"] * 5]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://bucket/x", "gs://bucket/x: gs:// needs the package gcsfs: pip install gcsfs"),
        ("abfs://bucket/x", "abfs:// needs the package adlfs: pip install adlfs"),
        ("foo://bucket/x", "foo:// is no storage that fsspec knows"),
    ],
)
def test_storage_that_fails_is_named_in_one_line(url: str, said: str) -> None:
    for action in (Remote(url).read, lambda: Remote(url).write(b"")):
        with pytest.raises(StorageError, match=said) as error:
            action()
        assert "\n" not in str(error.value)
    assert isinstance(error.value, OryxError)
    assert isinstance(error.value, OSError)
    assert error.value.strerror == str(error.value) == str(pickle.loads(pickle.dumps(error.value)))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("Access Denied"), r"access denied \(Access Denied\); ask for permission"),
        (FileNotFoundError("The specified bucket does not exist"), "no such bucket or file"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"), "no valid credentials"),
        (type("EndpointConnectionError", (Exception,), {})("Could not connect"), "the storage does not answer"),
        (TimeoutError(), "the storage does not answer"),
        (RuntimeError("first line\nsecond line"), "first line$"),
    ],
)
def test_what_a_library_says(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    calls = []

    def fail(*arguments: object, **keywords: object) -> None:
        calls.append(arguments)
        raise error

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(StorageError, match=f"^memory://b/x cannot be read: {said}"):
        Remote("memory://b/x").read_range(0, 1)
    assert len(calls) == (1 if isinstance(error, (PermissionError, FileNotFoundError)) else storage.ATTEMPTS)


def test_a_name_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    found = {f"/b/{name}": {"size": 1} for name in ("x", "../y", "a/../../y", "a//b", ".")}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: found)
    assert Remote("memory://b").files() == {"x": 1}


# ------------------------------------------------------------------------------------------------------------ cache


def test_cache_folder_and_size_come_from_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.cache_folder() == cache
    assert storage.cache_bytes() == 100 * 10**9
    monkeypatch.setenv(storage.CACHE_GB, "0.5")
    assert storage.cache_bytes() == 5 * 10**8
    for text in ("x", "-1", "0", "inf", "nan"):
        monkeypatch.setenv(storage.CACHE_GB, text)
        with pytest.raises(ConfigError, match="ORYX_CACHE_GB"):
            storage.cache_bytes()
    storage.use_cache("/elsewhere", 2.0)
    assert (storage.cache_folder(), storage.cache_bytes()) == (Path("/elsewhere"), 2 * 10**9)


def _hold(kind: str, url: str, ready: multiprocessing.Queue, end: multiprocessing.Queue) -> None:
    storage._held.clear()
    folder = storage.entry(kind, url)
    (folder / "file").write_bytes(b"x" * 1000)
    ready.put(str(folder))
    end.get()


def test_the_least_recently_used_goes(cache: Path) -> None:
    """But nothing that a process uses, this one or another."""
    context = multiprocessing.get_context("fork")
    ready, end = context.Queue(), context.Queue()
    process = context.Process(target=_hold, args=("models", "s3://b/other", ready, end))
    process.start()
    theirs = Path(ready.get())
    folders = []
    for number in range(4):
        folder = storage.entry("checkpoints", f"s3://b/{number}")
        (folder / "file").write_bytes(b"x" * 1000)
        os.utime(storage._lock_file(folder), (number, number))
        folders.append(folder)
    assert len({folder.name for folder in folders}) == 4
    for folder in folders[:3]:
        os.close(storage._held.pop(folder))  # as when their process has ended
    os.close(storage._held.pop(folders[3]))
    storage.entry("checkpoints", "s3://b/0")  # used again
    storage.use_cache(None, 3000e-9)
    storage.make_room(0)
    assert [folder.exists() for folder in folders] == [True, False, False, True]
    storage.make_room(10**6)
    assert [folder.exists() for folder in folders] == [True, False, False, False]
    assert theirs.exists()
    end.put(None)
    process.join()
    storage.make_room(10**6)
    assert not theirs.exists()


def test_fetch(bucket: Remote) -> None:
    """Copies of the wrong size or content are made again, what cannot be had right is named."""
    for name in ("a", "b", "c"):
        (bucket / name).write(name.encode() * 5)
    folder = storage.entry("models", bucket.url)
    (folder / "a").write_bytes(b"wrong")
    (folder / "b").write_bytes(b"bb")
    sums = {"a": "ed968e840d10d2d313a870bc131a4e2c311d7ad09bdf32b3418147221f51a6e2"}
    assert storage.fetch(bucket, folder, {"a": 5, "b": 5, "c": 6, "d": 1}, whole=storage.sha256_is(sums)) == ["c", "d"]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in "ab"} == {
        "a": b"aaaaa",
        "b": b"bbbbb",
    }
    with storage.alone(folder), open(folder.with_name(f".{folder.name}.busy")) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_ranges(bucket: Remote, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range is right, at the edges of blocks too; what was read is not fetched again; damage is."""
    data = np.random.default_rng(0).bytes(3 * BLOCK + 1001)
    (bucket / "x.bin").write(data)
    asked = []
    monkeypatch.setattr(
        Remote,
        "read_range",
        lambda self, a, b: asked.append((a, b)) or data[a:b],  # type: ignore[func-returns-value]
    )
    ranges = Ranges(bucket / "x.bin", len(data), "v1")
    edges = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, len(data) - 1, len(data)]
    for start in edges:
        for stop in edges:
            if start <= stop:
                assert ranges.read(start, stop) == data[start:stop]
    assert sorted(asked)[0][0] == 0
    assert sum(stop - start for start, stop in asked) == len(data)
    again = pickle.loads(pickle.dumps(ranges))
    asked.clear()
    assert again.read(5, len(data)) == data[5:]
    assert asked == []
    block = next(iter(again.folder.iterdir()))
    block.write_bytes(b"\0" * block.stat().st_size)
    assert Ranges(bucket / "x.bin", len(data), "v1").read(0, len(data)) == data
    assert len(asked) == 1
    asked.clear()
    Ranges(bucket / "x.bin", len(data), "v2").read(0, 1)  # another content
    assert asked == [(0, BLOCK)]
    with pytest.raises(ValueError, match="outside"):
        ranges.read(0, len(data) + 1)
    storage.use_cache(None, 1.5 * BLOCK / 1e9)
    storage.make_room(0)
    assert storage._bytes_in(cache / "blocks") <= 1.5 * BLOCK
    assert Ranges(bucket / "x.bin", len(data), "v1").read(0, len(data)) == data


def test_a_file_that_was_replaced(bucket: Remote) -> None:
    (bucket / "x.bin").write(b"short")
    with pytest.raises(StorageError, match="gave 5 bytes for 100: it was replaced"):
        Ranges(bucket / "x.bin", 100, "v1").read(0, 100)


# ------------------------------------------------------------------------------------------------------ lock, files


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteLock, "beat", 0.05)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 0.5)


def _leave(bucket: Remote, **changes: object) -> None:
    identity = lock._identity() | {"token": "another's", "machine": ["elsewhere"], "host": "elsewhere", "pid": 7}
    (bucket / "lock").write(json.dumps(identity | changes).encode())


def _take(bucket: Remote, folder: Path) -> lock.RunLock | None:
    return lock.hold(folder, lambda: RemoteLock(bucket / "lock"))


@pytest.mark.usefixtures("quick")
def test_lock(bucket: Remote, tmp_path: Path) -> None:
    held = _take(bucket, tmp_path / "run")
    assert held is not None
    first = (bucket / "lock").read()
    assert json.loads(first or b"")["pid"] == os.getpid()
    deadline = time.monotonic() + 60
    while (bucket / "lock").read() == first:  # it beats
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release()
    assert (bucket / "lock").read() is None
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("quick")
def test_a_lock_left_behind(bucket: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a machine that is gone: taken over when it did not change for a while. By one that lives: refused."""
    _leave(bucket)
    held = _take(bucket, tmp_path / "run")
    assert json.loads((bucket / "lock").read() or b"")["pid"] == os.getpid()
    assert held is not None
    held.release()
    _leave(bucket)
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(lock, "STALE", 60.0)
    if bucket.url.startswith("file:"):
        other = context.Process(target=_beat, args=(bucket,))
        other.start()
        with pytest.raises(ConfigError, match=f"^output_dir: {bucket} is in use by process 7 on elsewhere"):
            _take(bucket, tmp_path / "run")
        other.kill()
        other.join()
        assert not (tmp_path / "run").exists()
    _leave(bucket, machine=lock._machine(), birth=lock._birth(os.getpid()), pid=os.getpid())
    with pytest.raises(ConfigError, match="in use by process"):
        _take(bucket, tmp_path / "run")


def _beat(bucket: Remote) -> None:
    for number in range(1000):
        _leave(bucket, beat=number)
        time.sleep(0.05)


@pytest.mark.usefixtures("quick")
def test_a_lock_on_storage_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^output_dir: foo://b/lock: foo:// is no storage that fsspec knows"):
        _take(Remote("foo://b"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_files_of_a_run(
    bucket: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (bucket / "metrics.jsonl").write(b"1\n2\n")
    (bucket / "events.jsonl").write(b"a\nb\n")
    (bucket / "faults/batch.json").write(b"{}")
    (bucket / "checkpoints/x").write(b"large")
    (bucket / "lock").write(b"{}")
    (folder / "metrics.jsonl").write_bytes(b"1\n2\n3\n")  # this process wrote more before it died
    (folder / "events.jsonl").write_bytes(b"a\nc\n")  # another run continued since
    (folder / "requeue").write_bytes(b"old")
    files = RunFiles(bucket.url, folder, 1000.0)
    files.pull()
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"metrics.jsonl": b"1\n2\n3\n", "events.jsonl": b"a\nb\n", "faults/batch.json": b"{}"}
    (folder / "requeue").write_bytes(b"new")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "y").touch()
    (folder / ".config.tmp").touch()
    (folder / "lock").write_bytes(b"mine")
    files.on_start(tiny_run(), 0)
    files.on_checkpoint("x")
    while (bucket / "requeue").read() != b"new":
        time.sleep(0.01)
    assert (bucket / "metrics.jsonl").read() == b"1\n2\n3\n"
    (folder / "requeue").unlink()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"4\n")
    real = Remote.upload
    monkeypatch.setattr(Remote, "upload", lambda self, path: (_ for _ in ()).throw(StorageError(f"{self} is gone")))
    files.push()
    files.push()
    assert [record.message.partition(";")[0] for record in caplog.records] == [f"{bucket}/metrics.jsonl is gone"]
    monkeypatch.setattr(Remote, "upload", real)
    files.on_end()
    assert (bucket / "metrics.jsonl").read() == b"1\n2\n3\n4\n"
    names = {"metrics.jsonl", "events.jsonl", "faults/batch.json", "checkpoints/x", "lock"}
    assert set(bucket.files()) == names
    assert (bucket / "lock").read() == b"{}"
