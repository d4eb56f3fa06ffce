"""Damaged copies of an artefact, and what its reader makes of each.

A target is a valid folder of files and a function that reads it. `fuzz` makes damaged copies, each a function of the
seed and its number, reads every copy in a process of its own, and sorts the outcomes:
- detected: one line of our error classes (errors.OryxError);
- harmless: the same value as the undamaged folder gives;
- failed: a traceback of another class, another value, a hang, or a process that died.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from oryx_megatron.errors import OryxError

ODD: tuple[Any, ...] = (None, True, -1, 0, 1 << 70, 0.5, float("nan"), "", "x", "../x", [], [0], {}, {"x": 0}, [[]] * 3)
"""What takes the place of a value in JSON."""


@dataclass(frozen=True)
class Target:
    """Something that is read from files."""

    name: str
    read: Callable[[Path], Any]
    """Reads a folder and gives a value that compares with ==; must pickle. Called in a forked process."""
    files: Sequence[str] = ("**/*",)
    """Patterns of the files to damage."""


@dataclass
class Outcomes:
    """Outcomes by kind."""

    name: str
    detected: int = 0
    harmless: int = 0
    failures: list[str] = field(default_factory=list)
    """What was damaged and what came of it, one line each (a traceback follows)."""

    @property
    def variants(self) -> int:
        return self.detected + self.harmless + len(self.failures)

    def __str__(self) -> str:
        counts = f"{self.detected:4d} detected  {self.harmless:4d} harmless  {len(self.failures):3d} failed"
        return f"{self.name:<24} {self.variants:4d} variants: {counts}"


def fuzz(target: Target, folder: Path, variants: int, *, seed: int = 0, timeout: float = 30.0) -> Outcomes:
    """Read `variants` damaged copies of `folder`.

    Args:
        target: How it is read.
        folder: Undamaged; it is not touched. Its reader must succeed.
        variants: Number of copies; the first of them are the same for any number.
        seed: Another seed gives other damage.
        timeout: Seconds until a reader counts as hanging.

    Raises:
        RuntimeError: the undamaged folder cannot be read.
    """
    report = Outcomes(target.name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        copy = Path(place) / folder.name
        shutil.copytree(folder, copy, symlinks=True)
        kind, expected = _read(target, copy, timeout)
        if kind != "value":
            raise RuntimeError(f"{target.name}: the undamaged folder cannot be read: {expected}")
        for number in range(variants):
            shutil.rmtree(copy)
            shutil.copytree(folder, copy, symlinks=True)
            what = damage(copy, target.files, random.Random(f"{target.name} {seed} {number}"))
            kind, found = _read(target, copy, timeout)
            if kind == "line":
                report.detected += 1
            elif kind == "value" and _same(found, expected):
                report.harmless += 1
            else:
                found = f"another value: {str(found)[:300]}" if kind == "value" else found
                report.failures.append(f"{target.name} variant {number} (seed {seed}), {what}: {found}")
    return report


def damage(folder: Path, patterns: Sequence[str], draw: random.Random) -> str:
    """Damage one file of a folder; gives what was done."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    path = draw.choice(paths)
    ways = [_flip, _truncate, _zero, _append, _delete, _overwrite]
    if path.suffix in (".json", ".jsonl", ".yaml"):
        ways += [_swap] * 6
    what = draw.choice(ways)(path, draw)
    return f"{path.relative_to(folder)}: {what}"


def _flip(path: Path, draw: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    places = [draw.randrange(len(raw)) for _ in range(draw.choice((1, 1, 3)))] if raw else []
    for place in places:
        raw[place] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)
    return f"bits flipped at bytes {places}"


def _truncate(path: Path, draw: random.Random) -> str:
    raw = path.read_bytes()
    size = draw.choice((0, len(raw) // 2, max(len(raw) - 1, 0), draw.randrange(len(raw) + 1)))
    path.write_bytes(raw[:size])
    return f"cut to {size} of {len(raw)} bytes"


def _zero(path: Path, draw: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    start = draw.randrange(len(raw) + 1)
    stop = min(len(raw), start + draw.choice((1, 8, 512, len(raw) // 2)))
    raw[start:stop] = bytes(stop - start)
    path.write_bytes(raw)
    return f"bytes {start} to {stop} zeroed"


def _overwrite(path: Path, draw: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    start = draw.randrange(len(raw) + 1)
    stop = min(len(raw), start + draw.choice((2, 4, 64, 4096)))
    raw[start:stop] = draw.randbytes(stop - start)
    path.write_bytes(raw)
    return f"bytes {start} to {stop} overwritten"


def _append(path: Path, draw: random.Random) -> str:
    more = draw.choice((b"\0", b"}", b" ", b"\n", draw.randbytes(64), path.read_bytes()))
    with path.open("ab") as file:
        file.write(more)
    return f"{len(more)} bytes appended"


def _delete(path: Path, _: random.Random) -> str:
    path.unlink()
    return "deleted"


def _swap(path: Path, draw: random.Random) -> str:
    """Another type, no value, or another name somewhere in a JSON or YAML file, or in a line of JSON."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    number = draw.randrange(len(lines)) if path.suffix == ".jsonl" and lines else None
    try:
        if path.suffix == ".yaml":
            value = yaml.safe_load(text)
        else:
            value = json.loads(text if number is None else lines[number])
    except ValueError:
        return _flip(path, draw)
    places = list(_places(value))
    if not places:
        path.write_text("[]")
        return "[]"
    parent, key = draw.choice(places)
    way = draw.choice(("odd", "odd", "number", "remove", "rename"))
    if way == "remove":
        del parent[key]
    elif way == "rename" and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    elif way == "number" and isinstance(parent[key], int | float):
        parent[key] += draw.choice((-1, 1, 0.5))
    else:
        parent[key] = draw.choice(ODD)
        way = f"made {parent[key]!r}"
    written = yaml.safe_dump(value, sort_keys=False) if path.suffix == ".yaml" else json.dumps(value)
    if number is not None:
        lines[number] = written + "\n"
        written = "".join(lines)
    path.write_text(written, encoding="utf-8")
    return f"{'' if number is None else f'line {number + 1}, '}{key!r}: {way}"


def _places(value: Any) -> Any:
    """Every container with every key of it, depth first."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _read(target: Target, folder: Path, timeout: float) -> tuple[str, Any]:
    """`value` and what was read, `line` and an error's message, or `failure` and a description."""
    context: Any = multiprocessing.get_context("fork")  # what the reader imports is there already
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(target, folder, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(timeout):
            return "failure", f"hangs: no answer in {timeout:g} s"
        return here.recv()
    except EOFError:
        process.join()
        return "failure", f"the process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        here.close()


def _child(target: Target, folder: Path, answer: Any) -> None:
    try:
        answer.send(("value", target.read(folder)))
    except OryxError as error:
        text = str(error)
        lines = text.strip() and "\n" not in text
        answer.send(("line", text) if lines else ("failure", f"not one line: {text!r}"))
    except BaseException:  # noqa: BLE001 - whatever it is, the report shows it
        answer.send(("failure", traceback.format_exc()))


def _same(found: Any, expected: Any) -> bool:
    return type(found) is type(expected) and bool(found == expected)
