"""Checkpoint folders without a model: what retention and saves may touch, and what a manifest notices."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oryx_megatron.checkpoint import manifest, store
from oryx_megatron.checkpoint.manifest import Manifest, file_digest, read_manifest, write_manifest
from oryx_megatron.checkpoint.retention import to_remove
from oryx_megatron.errors import CheckpointError, ClosedCheckpointError, NewerCheckpointError


def checkpoint(root: Path, iteration: int) -> Path:
    """A checkpoint of one file."""
    folder = root / f"iteration_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / "common.pt").write_text("state")
    facts = Manifest(iteration, 0, {}, {}, {}, {}, [], {}, None, {"common.pt": file_digest(folder / "common.pt")})
    write_manifest(folder, facts)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_retention_leaves_what_is_not_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links are neither followed nor removed nor counted; files that someone put into a checkpoint stay."""
    root, archive = tmp_path / "checkpoints", tmp_path / "archive"
    for iteration in range(1, 8):
        checkpoint(root, iteration)
    for iteration in (1, 7):
        shutil.move(root / f"iteration_000000{iteration}", archive / str(iteration))
        (root / f"iteration_000000{iteration}").symlink_to(archive / str(iteration))
    shutil.move(root / "iteration_0000002" / "common.pt", archive / "large")
    (root / "iteration_0000002" / "common.pt").symlink_to(archive / "large")
    (root / "iteration_0000003" / "notes.txt").write_text("mine")
    (root / "iteration_0000004" / "hf").mkdir()
    (root / "iteration_0000004" / "hf" / "model").write_text("mine")
    told: set[str] = set()
    removed = store.apply_retention(root, 1, 0, told=told)
    assert [store.iteration_of(folder) for folder in removed] == [2, 3, 4, 5]
    assert names(root) == [f"iteration_000000{iteration}" for iteration in (1, 3, 4, 6, 7)]
    assert names(archive / "1") == names(archive / "7") == ["common.pt", "manifest.json"]
    assert (archive / "large").read_text() == "state"
    assert names(root / "iteration_0000003") == ["notes.txt"]
    assert names(root / "iteration_0000004") == ["hf"]
    assert (root / "iteration_0000004" / "hf" / "model").read_text() == "mine"
    for words in ("0000001 stays: it is a link", "0000003 stays: it holds notes.txt", "0000004 stays: it holds hf"):
        assert caplog.text.count(words) == 1
    store.apply_retention(root, 1, 0, told=told)
    assert caplog.text.count("stays") == 4


def test_retention_of_a_protected_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays whole, the others go, and it is said once."""
    for iteration in range(1, 5):
        checkpoint(tmp_path, iteration)
    unlink = Path.unlink

    def refuse(path: Path, *arguments: Any, **keywords: Any) -> None:
        if path.parent.name == "iteration_0000002":
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "unlink", refuse)
    told: set[str] = set()
    for _ in range(2):
        store.apply_retention(tmp_path, 1, 0, told=told)
        assert names(tmp_path) == ["iteration_0000002", "iteration_0000004"]
        assert names(tmp_path / "iteration_0000002") == ["common.pt", "manifest.json"]
    assert caplog.text.count("iteration_0000002 stays: [Errno 1] Operation not permitted") == 1


def test_retention_of_damaged_and_newer_ones(tmp_path: Path) -> None:
    """What a damaged manifest does not name goes when only a checkpoint has such a name; a newer version's stays."""
    for iteration in range(1, 5):
        checkpoint(tmp_path, iteration)
    (tmp_path / "iteration_0000001" / "manifest.json").write_text("{")
    (tmp_path / "iteration_0000002" / "manifest.json").write_text("{")
    (tmp_path / "iteration_0000002" / "mine").touch()
    newer = json.loads((tmp_path / "iteration_0000003" / "manifest.json").read_text())
    (tmp_path / "iteration_0000003" / "manifest.json").write_text(json.dumps(newer | {"format": 2, "more": 1}))
    store.apply_retention(tmp_path, 1, 0)
    assert names(tmp_path) == ["iteration_0000002", "iteration_0000003", "iteration_0000004"]
    assert names(tmp_path / "iteration_0000002") == ["mine"]
    assert names(tmp_path / "iteration_0000003") == ["common.pt", "manifest.json"]


def test_retention_of_renamed_ones(tmp_path: Path) -> None:
    """A checkpoint under the name of another step is not the newest, takes no place of those kept, and stays."""
    for iteration in range(1, 6):
        checkpoint(tmp_path, iteration)
    shutil.copytree(tmp_path / "iteration_0000002", tmp_path / "iteration_0000030")
    (tmp_path / "iteration_0000003").rename(tmp_path / "iteration_0000000")
    assert store.find_checkpoint(tmp_path).name == "iteration_0000005"
    assert store.find_checkpoint(tmp_path / "iteration_0000030").name == "iteration_0000030"
    with pytest.raises(CheckpointError, match=r"iteration_0000030 is the checkpoint of iteration 2, renamed or copied"):
        store.read_own(tmp_path / "iteration_0000030")
    store.apply_retention(tmp_path, 2, 0)
    assert names(tmp_path) == [f"iteration_{number:07d}" for number in (0, 4, 5, 30)]


def test_an_export_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a folder of transformers.*make one: oryx convert from-hf"):
        store.find_checkpoint(tmp_path)


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not damaged: a run that skipped the checkpoint would do its steps again, and replace it."""
    folder = checkpoint(tmp_path, 1)
    whole = read_manifest(folder)

    def refuse(path: Path, *arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "file_digest", refuse)
    with pytest.raises(
        ClosedCheckpointError, match=r"iteration_0000001/common.pt: Permission denied; allow reading it"
    ):
        store.damaged_files(folder, whole)
    monkeypatch.setattr(manifest, "read_text", refuse)
    with pytest.raises(ClosedCheckpointError, match=r"iteration_0000001/manifest.json: Permission denied; allow"):
        store.read_own(folder)


@pytest.mark.parametrize("there", ["link", "with notes", "newer", "plain", "file", "renamed"])
def test_a_checkpoint_that_is_there_already(tmp_path: Path, caplog: pytest.LogCaptureFixture, there: str) -> None:
    """A save replaces a checkpoint of its iteration, but nothing else of that name."""
    root, final = tmp_path / "checkpoints", tmp_path / "checkpoints" / "iteration_0000005"
    if there == "file":
        root.mkdir()
        final.write_text("mine")
    else:
        checkpoint(root, 5)
    if there == "link":
        shutil.move(final, tmp_path / "archive")
        final.symlink_to(tmp_path / "archive")
    elif there == "with notes":
        (final / "notes.txt").write_text("mine")
    elif there == "renamed":
        checkpoint(root, 4).rename(root / "kept")
        shutil.rmtree(final)
        (root / "kept").rename(final)
    elif there == "newer":
        (final / "manifest.json").write_text(json.dumps({"format": 2}))
    writing = store.begin(root, 5)
    (writing / "new").touch()
    assert store.commit(writing) == final
    assert names(final) == ["new"]
    kept = root / "iteration_0000005.old"
    assert names(root) == ["iteration_0000005", *([] if there == "plain" else [kept.name])]
    if there == "link":
        assert kept.readlink() == tmp_path / "archive"
        assert names(tmp_path / "archive") == ["common.pt", "manifest.json"]
    elif there == "file":
        assert kept.read_text() == "mine"
    elif there != "plain":
        assert len(names(kept)) == (3 if there == "with notes" else 2)
    assert ("is now" in caplog.text) == (there != "plain")


def killed_after(renames: int, root: Path) -> None:
    """Save iteration 5 once more in a process that dies right after so many renames, as by kill -9."""
    if (child := os.fork()) == 0:
        rename, done = Path.rename, 0

        def count(path: Path, target: Path) -> Path:
            nonlocal done
            found = rename(path, target)
            done += 1
            if done == renames:
                os._exit(9)
            return found

        Path.rename = count  # type: ignore[method-assign,assignment]
        try:
            save(root, 5, "new")
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 9


def save(root: Path, iteration: int, content: str) -> Path:
    """As a run does, of one file."""
    writing = store.begin(root, iteration)
    (writing / "common.pt").write_text(content)
    files = {"common.pt": file_digest(writing / "common.pt")}
    write_manifest(writing, Manifest(iteration, 0, {}, {}, {}, {}, [], {}, None, files))
    return store.commit(writing)


def newest(root: Path) -> tuple[int, str]:
    """Iteration and content of what a resume and the tools take, which must be whole."""
    found = store.find_checkpoint(root.parent)
    assert found == store.list_folders(root)[-1]
    facts = store.read_own(found)
    assert not store.damaged_files(found, facts)
    return facts.iteration, (found / "common.pt").read_text()


@pytest.mark.parametrize("notes", [False, True])
@pytest.mark.parametrize("renames", [1, 2, 3])
def test_a_kill_while_a_checkpoint_is_replaced(tmp_path: Path, renames: int, notes: bool) -> None:
    """At every moment one of that iteration is found, and later saves tidy up."""
    root = tmp_path / "checkpoints"
    save(root, 4, "earlier")
    save(root, 5, "old")
    if notes:
        (root / "iteration_0000005" / "notes.txt").write_text("mine")
    killed_after(renames, root)
    assert newest(root) == (5, "new")
    save(root, 5, "newer")
    assert newest(root) == (5, "newer")
    kept = ["iteration_0000005.old"] if notes else []
    assert names(root) == ["iteration_0000004", "iteration_0000005", *kept]
    if notes:
        assert (root / kept[0] / "common.pt").read_text() == "old"


def test_a_kill_while_a_replaced_checkpoint_is_replaced_again(tmp_path: Path) -> None:
    """Kills at the first rename, again and again: the newest of several names of one iteration counts."""
    root = tmp_path / "checkpoints"
    save(root, 5, "old")
    for _ in range(3):
        killed_after(1, root)
        assert newest(root) == (5, "new")
    assert names(root) == [f"iteration_{5:0{digits}d}" for digits in (10, 9, 8, 7)]
    removed = [folder.name for folder in store.apply_retention(root, 1, 0)]
    assert removed == [f"iteration_{5:0{digits}d}" for digits in (7, 8, 9)]
    save(root, 5, "newer")
    assert names(root) == ["iteration_0000005"]


def test_a_save_that_is_being_written_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another process's is left alone until that process ends; this one's own earlier save is a leftover."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            store.begin(tmp_path, 2)
            os.write(write, b"x")
            signal.pause()
        finally:
            os._exit(0)
    os.read(read, 1)
    assert store.begin(tmp_path, 2) == tmp_path / ".writing_0000002.1"
    assert store.begin(tmp_path, 3) == tmp_path / ".writing_0000003"
    assert names(tmp_path) == [".writing_0000002", ".writing_0000003"]
    assert ".writing_0000002 stays: another process writes it" in caplog.text
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    store.begin(tmp_path, 4)
    assert names(tmp_path) == [".writing_0000004"]


def test_what_is_no_leftover_of_a_save_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders that only begin like one, and files that no save writes."""
    for name in (".writing_notes", ".writing_0000001", ".writing_0000002", ".writing_replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / ".writing_0000002" / "thesis.tex").write_text("mine")
    for name in ("__0_0.distcp", ".metadata.tmp", "common.pt"):
        (tmp_path / ".writing_0000001" / name).touch()
    store.begin(tmp_path, 3)
    assert names(tmp_path) == [".writing_0000002", ".writing_0000003", ".writing_notes"]
    assert ".writing_0000002 stays: it holds thesis.tex, which no save wrote" in caplog.text
    assert ".writing_notes stays: it has not the name of a save" in caplog.text


def test_leftovers_that_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed save left and cannot be removed, even under the very name, does not fail the next."""
    (tmp_path / ".writing_0000001").mkdir()
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "mine").touch()
    (tmp_path / ".writing_0000002").symlink_to(tmp_path / "archive")
    assert store.begin(tmp_path, 2) == tmp_path / ".writing_0000002.1"
    assert not (tmp_path / ".writing_0000001").exists()
    assert names(tmp_path / "archive") == ["mine"]

    def refuse(path: Path, *arguments: Any, **keywords: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    writing = store.begin(tmp_path, 2)
    assert writing == tmp_path / ".writing_0000002.2"
    assert store.commit(writing) == tmp_path / "iteration_0000002"
    assert "cannot be removed ([Errno 13] Permission denied" in caplog.text


def test_manifest_of_another_version(tmp_path: Path) -> None:
    """A newer one is refused as that; one of the first version, without a checksum, is read."""
    folder = checkpoint(tmp_path, 3)
    fields = json.loads((folder / "manifest.json").read_text())
    for changes in ({"format": 2}, {"format": 99, "samples": 1}, {"format": 2, "checksum": "x"}):
        (folder / "manifest.json").write_text(json.dumps(fields | changes))
        with pytest.raises(NewerCheckpointError, match=r"manifest.json: format \d+ is of a newer version, this one"):
            read_manifest(folder)
    del fields["checksum"]
    (folder / "manifest.json").write_text(json.dumps(fields))
    assert read_manifest(folder).iteration == 3


def damaged_manifests(fields: dict[str, Any]) -> Iterator[str]:
    """Every key and every value changed, one at a time."""
    for name, value in fields.items():
        rest = {key: other for key, other in fields.items() if key != name}
        if name != "checksum":  # its absence is an older version's
            yield json.dumps(rest)
            yield json.dumps(rest | {f"{name}x": value})
        for other in (None, "x", -1, 1.5, [], [1], {"x": 1}, True):
            if other != value and not (name == "checksum" and other is None):
                yield json.dumps(rest | {name: other})
    text = json.dumps(fields)
    yield from (
        "",
        text[:-1],
        text + "}",
        f"[{text}]",
        "null",
        "[" * 100_000,
        text.replace("common", "comm\0n"),
        "\ufeff" + text,
    )
    yield text.replace('"iteration": 3', '"iteration": 4')
    yield text.replace('"iteration": 3', '"iteration": 3, "iteration": 4')
    yield text.replace("common.pt", "../common.pt")


def test_damaged_manifest(tmp_path: Path) -> None:
    """Any change is noticed."""
    folder = checkpoint(tmp_path, 3)
    fields = json.loads((folder / "manifest.json").read_text())
    for text in damaged_manifests(fields):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"^\S+/manifest.json is damaged \(.*use another checkpoint$"
        ) as error:
            read_manifest(folder)
        assert "\n" not in str(error.value)


def test_damaged_manifest_of_the_first_version(tmp_path: Path) -> None:
    """Without a checksum: keys that are missing or unknown, and values of the wrong type."""
    folder = checkpoint(tmp_path, 3)
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["checksum"]
    for name, value in fields.items():
        rest = {key: other for key, other in fields.items() if key != name}
        wrong = [rest | {f"{name}x": value}, *(rest | {name: other} for other in (True, 1.5, [1], {"x": 1}))]
        for changed in wrong[: 4 if name in ("config", "rng", "data", "layout", "guard", "init_from") else 5]:
            (folder / "manifest.json").write_text(json.dumps(changed))
            with pytest.raises(CheckpointError, match=r"manifest.json is damaged \("):
                read_manifest(folder)


def test_formatted_anew(tmp_path: Path) -> None:
    """Another order of keys and other spaces change nothing."""
    folder = checkpoint(tmp_path, 3)
    fields = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(dict(reversed(fields.items()))))
    assert read_manifest(folder).iteration == 3


def test_what_retention_removes() -> None:
    """All but the newest whole ones, multiples, listed steps and the best; a damaged one among the newest stays too."""
    names = [f"iteration_{iteration:07d}" for iteration in range(12, 0, -1)]
    asked: list[int] = []

    def whole(name: str) -> bool:
        asked.append(store.iteration_of(Path(name)))
        return asked[-1] != 11

    removed = to_remove(names, 2, 4, steps=(3, 99), best="iteration_0000006", whole=whole)
    assert [store.iteration_of(Path(name)) for name in removed] == [9, 7, 5, 2, 1]
    assert asked == [12, 11, 10]  # files of older ones are not looked at
    assert list(to_remove(names, 99, 0, steps=(), best=None, whole=lambda _: True)) == []
