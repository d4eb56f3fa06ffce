#!/usr/bin/env python
"""Real text from the Python packages of this machine: to train on, and held-out code, documentation and prose.

    python benchmarks/fidelity/texts.py --tokenizer tokenizers/stdlib-8k --out data/texts

Writes the indexed datasets OUT/train, OUT/code, OUT/docs and OUT/prose. Packages are held out whole, chosen by their
names. Of these, code is .py and .pyi; documentation .md, .rst, .txt and the descriptions of distributions (METADATA);
prose the paragraphs of sentences in both, docstrings of code. A held-out file that the training text has as well is
dropped, and so is a held-out paragraph that the training documents have.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TextIO

from oryx_megatron.cli import main_guard
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
CODE, DOCS = (".py", ".pyi"), (".md", ".rst", ".txt")
SIZES = range(200, 1_000_000)
"""Bytes of a file that is taken."""
WORDS = 40
"""Of a paragraph of prose, at least."""
PLAIN = re.compile(r"[A-Za-z ,.;:'\"()\-]")
LEGAL = re.compile(r"licen[sc]e|copyright|warrant", re.IGNORECASE)
"""The same few texts everywhere."""
KINDS = ("code", "docs", "prose")


class File(NamedTuple):
    """One file to read."""

    path: Path
    package: str
    held_out: bool


class Found(NamedTuple):
    """What one file gave."""

    kind: str
    held_out: bool
    text: str
    prose: tuple[str, ...]
    """Paragraphs; of training code, none."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--folders", type=Path, nargs="*", help="instead of the installed packages")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of packages (default: %(default)s)")
    parser.add_argument("--most", type=float, default=400e6, help="bytes of training text (default: %(default)s)")
    parser.add_argument("--most-held-out", type=float, default=4e6, help="bytes of each kind (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    sizes = gather(
        list(files(arguments.folders or installed(), arguments.held_out)),
        arguments.out,
        most={"train": arguments.most, **dict.fromkeys(KINDS, arguments.most_held_out)},
        processes=arguments.processes,
    )
    if missing := [name for name in ("train", *KINDS) if not sizes[name]]:
        raise DataError(f"the packages give no {missing[0]}; try another --held-out or --folders")
    for name in ("train", *KINDS):
        source, prefix = arguments.out / f"{name}.jsonl", arguments.out / name
        command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source), "--quiet"]
        command += ["--tokenizer", arguments.tokenizer, "--output", str(prefix), "--overwrite"]
        processes = arguments.processes if name == "train" else 1
        subprocess.run([*command, "--processes", str(processes)], check=True, stdout=subprocess.DEVNULL)
        source.unlink()
        tokens = json.loads(prefix.with_suffix(".json").read_text())["tokens"]
        print(f"{name}: {sizes[name] / 1e6:.1f} MB, {tokens / 1e6:.2f} M tokens", flush=True)
    return 0


def installed() -> list[Path]:
    """Folders of this Python's packages and its standard library."""
    found = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib", "stdlib")]
    homes = Counter(Path(str(each.locate_file(""))) for each in metadata.distributions())
    found += [home for home, count in homes.items() if count > 2]  # not that of a checkout
    return [folder for folder in dict.fromkeys(path.resolve() for path in found) if folder.is_dir()]


def files(folders: list[Path], share: float) -> Iterator[File]:
    """All files of known kinds, by package in the order of their names' hashes: an arbitrary one, always the same."""
    packages = {entry for folder in folders for entry in folder.iterdir() if _is_package(entry)}
    for entry in sorted(packages, key=lambda entry: (_hash(_name(entry)), str(entry))):
        held_out = _hash(_name(entry)) < share
        inside = [entry] if entry.is_file() else sorted(entry.rglob("*"))
        for path in inside:
            if path.suffix.lower() in CODE + DOCS or path.name == "METADATA":
                yield File(path, _name(entry), held_out)


def _is_package(entry: Path) -> bool:
    hidden = entry.name.startswith((".", "__"))
    return not hidden and entry.name not in ("site-packages", "dist-packages", "test", "tests")


def _name(entry: Path) -> str:
    """Of a package or of its distribution, alike where they have one name."""
    return re.split(r"-\d|\.", entry.name)[0].lower().replace("-", "_")


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def read(file: File) -> Found | None:
    """The text of a file, without what is not part of it; None where it is no text or too short or long."""
    kind = "code" if file.path.suffix.lower() in CODE else "docs"
    try:
        if file.path.stat().st_size not in SIZES or file.path.is_symlink():
            return None
        text = file.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if kind == "docs":
        if file.path.name == "METADATA":
            text = text.partition("\n\n")[2]
        if file.path.suffix == ".txt" and not list(paragraphs(text)):
            return None  # a list of names
        if LEGAL.search(file.path.name):
            return None
    if len(text.encode()) not in SIZES or "\0" in text:
        return None
    sources = [text] if kind == "docs" else docstrings(text) if file.held_out else []
    return Found(kind, file.held_out, text, tuple(found for source in sources for found in paragraphs(source)))


def docstrings(code: str) -> list[str]:
    """Docstrings of a module, its classes and functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [found for node in ast.walk(tree) if isinstance(node, kinds) and (found := ast.get_docstring(node))]


def paragraphs(text: str) -> Iterator[str]:
    """Those that are sentences: WORDS words or more, hardly anything but letters and punctuation, a full stop."""
    for block in re.split(r"\n\s*\n", text):
        joined = " ".join(block.split())
        if joined.count(" ") + 1 < WORDS or not joined.endswith(".") or LEGAL.search(joined):
            continue
        if len(PLAIN.findall(joined)) >= 0.97 * len(joined):
            yield joined


def gather(found: list[File], out: Path, *, most: dict[str, float], processes: int) -> Counter[str]:
    """Write NAME.jsonl of training text and of each kind; returns their bytes. No text is written twice."""
    known: set[bytes] = set()
    sizes: Counter[str] = Counter()

    def fresh(text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()[:16]
        old = digest in known
        known.add(digest)
        return not old

    ordered = sorted(found, key=lambda file: file.held_out)  # training text first: it wins
    with multiprocessing.Pool(processes) as pool, ExitStack() as stack:
        written = {name: stack.enter_context(_json_lines(out / f"{name}.jsonl")) for name in ("train", *KINDS)}

        def write(name: str, text: str) -> None:
            if sizes[name] < most[name]:
                sizes[name] += len(text.encode())
                written[name].write(json.dumps({"text": text}) + "\n")

        for one in pool.imap(read, ordered, chunksize=32):
            if one is None or not fresh(one.text):
                continue
            if one.held_out:
                write(one.kind, one.text)
                if told := [paragraph for paragraph in one.prose if fresh(paragraph)]:
                    write("prose", "\n\n".join(told) + "\n")
            else:
                write("train", one.text)
                for paragraph in one.prose:
                    fresh(paragraph)
    return sizes


@contextmanager
def _json_lines(path: Path) -> Iterator[TextIO]:
    with replacing(path) as temporary, temporary.open("w") as file:
        yield file


if __name__ == "__main__":
    sys.exit(main())
