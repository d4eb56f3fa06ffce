"""Small file helpers: digests, JSON, and outputs that appear under their name only when whole.

One rule for every command that writes: what exists is replaced only where it is recognised as an earlier output of the
same kind and the user said --overwrite; an input is never an output (`check_output`, `appearing`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from oryx_megatron.atomic import exchange
from oryx_megatron.atomic import replacing as replacing  # offered here too, with what commands need beside them
from oryx_megatron.atomic import sync as sync
from oryx_megatron.atomic import temporary_name as temporary_name
from oryx_megatron.errors import NO_ROOM, DataError, OryxError
from oryx_megatron.reading import parse_json, read_text

MARK = "oryx_megatron output"
"""Stands in every picture and page written here, so that a later run knows it as ours."""
LARGEST_JSON = 1 << 28
"""Bytes; no JSON file of ours comes near."""
LISTING = ".oryx-files.json"
"""In a folder that a command made: its files, so that only what the command wrote is ever replaced."""


def sha256_of(path: str | Path) -> str:
    """sha256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError when it cannot be read or is no JSON object."""
    try:
        value = parse_json(read_text(path, LARGEST_JSON))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically. Names that are not UTF-8 become \\udcXX escapes, which reading turns back."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def shard_prefix(prefix: str | Path, shard: tuple[int, int]) -> Path:
    """Name of a shard's dataset."""
    number, count = shard
    return Path(prefix) if count == 1 else Path(f"{prefix}-{number:05d}-of-{count:05d}")


def same_file(left: str | Path, right: str | Path) -> bool:
    """Whether two names are of one file: through links, hard links, and letter case where that does not count."""
    try:
        return os.path.samefile(left, right)
    except (OSError, ValueError):
        return False


def check_output(
    path: str | Path,
    *,
    ours: Callable[[Path], bool],
    overwrite: bool,
    inputs: Iterable[str | Path] = (),
    error: type[OryxError] = DataError,
) -> None:
    """Refuse an output that would replace an input, what is not ours, or, without `overwrite`, anything.

    Arguments: `ours` tells whether an existing file is an earlier output of this kind. Raises `error`.
    """
    path = Path(path)
    for source in inputs:
        if same_file(path, source):
            raise error(f"the output {path} is the input {source}; choose another name")
    if not os.path.lexists(path):
        return
    if os.path.isdir(path):
        raise error(f"the output {path} is a folder; name a file")
    if not (os.path.isfile(path) and ours(path)):
        raise error(f"{path} exists and is not an earlier output of this command; choose another name or move it away")
    if not overwrite:
        raise error(f"{path} exists already; choose another name or pass --overwrite")


def check_folder_output(
    target: str | Path, *, overwrite: bool, inputs: Iterable[str | Path] = (), error: type[OryxError] = DataError
) -> None:
    """As `check_output`, for a folder that `appearing` makes: every file in it must be one that was written then."""
    target = Path(target)
    if target.name in ("", ".."):
        raise error(f"the output {str(target)!r} is no name for a new folder")
    for source in map(Path, inputs):
        inside = [source, *(folder for folder in Path(os.path.realpath(source)).parents)]
        if any(same_file(target, folder) for folder in inside):
            raise error(f"the output {target} is, or holds, the input {source}; choose another name")
    if not os.path.lexists(target):
        return
    if os.path.islink(target) or not os.path.isdir(target):
        raise error(f"{target} exists and is not a folder that this command made; choose another name")
    if not overwrite:
        raise error(f"{target} exists already; choose another name or pass --overwrite")
    if foreign := _foreign(target):
        raise error(f"{target} holds {foreign}; choose another name or move it away")


def _foreign(target: Path) -> str | None:
    """What in a folder is not as `appearing` left it; None when nothing."""
    if not any(target.iterdir()):
        return None
    try:
        listed = read_json(target / LISTING)["files"]
        found = _listed(target)
    except (DataError, KeyError):
        return f"files of which nothing tells that this command wrote them (no {LISTING})"
    except OSError as error:
        return f"what cannot be read ({error.strerror})"
    for name, facts in found.items():
        if name not in listed:
            return f"{name}, which this command did not write"
        if listed[name] != facts:
            return f"{name}, which was changed since this command wrote it"
    return None


def _listed(folder: Path) -> dict[str, list[Any]]:
    """Size of every file below a folder, and sha256 of the smaller ones; links and other things by their kind."""
    found: dict[str, list[Any]] = {}
    for here, folders, names in os.walk(folder):
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(here, name)))]:
            path = Path(here, name)
            status = path.lstat()
            if path == folder / LISTING:
                continue
            small = stat.S_ISREG(status.st_mode) and status.st_size < 1 << 24
            key = str(path.relative_to(folder))
            found[key] = [stat.S_IFMT(status.st_mode), status.st_size, sha256_of(path) if small else None]
    return found


@contextlib.contextmanager
def appearing(
    target: str | Path,
    *,
    overwrite: bool,
    inputs: Iterable[str | Path] = (),
    error: type[OryxError] = DataError,
) -> Iterator[Path]:
    """A folder under a temporary name that becomes `target` when all went well. Raises `error`."""
    target, inputs = Path(target), tuple(inputs)
    check_folder_output(target, overwrite=overwrite, inputs=inputs, error=error)
    folder = temporary_name(target)
    try:
        folder.mkdir(parents=True)
    except OSError as failure:
        raise error(f"cannot write {target}: {failure.strerror}") from failure
    try:
        yield folder
        write_json(folder / LISTING, {"files": _listed(folder)})
        for path in [*(path for path in folder.rglob("*") if path.is_file()), folder]:
            sync(path)
        # It may have been made or changed meanwhile.
        check_folder_output(target, overwrite=overwrite, inputs=inputs, error=error)
        if not target.exists():
            folder.rename(target)
        elif not exchange(folder, target):  # else `folder` is the old one now
            old = temporary_name(target)
            target.rename(old)
            try:
                folder.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old)
        sync(target.parent)
    except OSError as failure:
        if failure.errno not in NO_ROOM:
            raise
        raise error(f"cannot write {target}: {failure.strerror}") from failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mark(ending: str) -> dict[str, str]:
    """`metadata` for matplotlib's savefig that names us in the file, where its format has a place for it."""
    if ending == "png":
        return {"Software": MARK}
    return {"Creator": MARK} if ending in ("svg", "pdf", "ps", "eps") else {}


def is_marked(path: Path) -> bool:
    """Whether a picture or page was written here."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            file.seek(max(os.fstat(file.fileno()).st_size - (1 << 16), 0))
            return MARK.encode() in head or MARK.encode() in file.read()
    except OSError:
        return False


def has_keys(*keys: str) -> Callable[[Path], bool]:
    """A test whether a file is a JSON object with these keys, for `check_output`."""

    def test(path: Path) -> bool:
        try:
            return set(keys) <= set(read_json(path))
        except DataError:
            return False

    return test


def is_skipped_list(path: Path) -> bool:
    """Whether a file is a PREFIX.skipped.jsonl as preprocessing writes it: what was left out, and why."""
    try:
        with open(path, "rb") as file:
            return is_skipped_line(file.readline(1 << 20))
    except OSError:
        return False


def is_skipped_line(line: bytes) -> bool:
    """Whether a line says what was left out of a dataset, and why."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and set(record) >= {"place", "reason", "detail"} and "text" not in record
