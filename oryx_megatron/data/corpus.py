"""Documents of a corpus, in a fixed order: the standard library's sources, text files, JSON lines, folders of files."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oryx_megatron.errors import DataError

STDLIB = "stdlib"
"""Name of the default corpus: the .py files of the running Python's standard library."""
SOURCE_ENDINGS = (
    *(".bash", ".c", ".cc", ".cfg", ".cpp", ".cs", ".css", ".cu", ".cuh", ".go", ".h", ".hpp", ".html", ".java", ".jl"),
    *(".js", ".json", ".kt", ".lua", ".m", ".md", ".php", ".pl", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".rst"),
    *(".scala", ".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".tsx", ".txt", ".xml", ".yaml", ".yml", ".zig"),
)
"""Endings of files that a folder of source files contributes."""
PACKAGE_FOLDERS = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Document:
    """One text and where it is from."""

    text: str
    place: str
    """File, or file:line, for messages."""


def corpus_files(source: str, endings: Sequence[str] | None = None) -> list[Path]:
    """Files of a corpus in the order of their documents (by path below the source, byte-wise).

    Arguments: `source` is `stdlib`, a file or a folder; `endings` limits a folder's files (default: SOURCE_ENDINGS and
    .jsonl). Raises DataError when the source is missing or has no such file.
    """
    if source == STDLIB:
        root, endings = Path(sysconfig.get_path("stdlib")), (".py",)
    else:
        root = Path(source)
        if root.is_file():
            return [root]
        if not root.is_dir():
            raise DataError(f"input {source} is neither a file, a folder nor `{STDLIB}`")
        endings = tuple(endings) if endings else (*SOURCE_ENDINGS, ".jsonl")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        if source == STDLIB:
            folders[:] = [name for name in folders if name not in PACKAGE_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(endings) and not name.startswith(".")]
    if not found:
        raise DataError(f"input {source} has no file ending in {', '.join(endings)}")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix().encode())


def read_documents(source: str, *, text_key: str = "text", endings: Sequence[str] | None = None) -> Iterator[Document]:
    """Documents of a corpus. A .jsonl file has one per line, under `text_key`; any other file is one document.

    Files of the standard library that are not UTF-8 (test data for other encodings) and empty ones are left out.
    Raises DataError with file and line for text that is not UTF-8, invalid JSON, a missing key or a wrong type.
    """
    for path in corpus_files(source, endings):
        if path.suffix == ".jsonl":
            yield from _json_lines(path, text_key)
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            if source == STDLIB:
                continue
            byte = error.object[error.start]
            raise DataError(f"{path} is not UTF-8: byte {byte:#04x} at offset {error.start}") from None
        if text:
            yield Document(text, str(path))


def _json_lines(path: Path, key: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 (byte {error.start} of the line)") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: invalid JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(record, dict):
                raise DataError(f"{place}: a JSON {type(record).__name__}, not an object with key {key!r}")
            if key not in record:
                keys = ", ".join(map(repr, list(record)[:5])) or "none"
                raise DataError(f"{place}: no key {key!r}; the keys are {keys} (see --text-key)")
            if not isinstance(record[key], str):
                raise DataError(f"{place}: {key!r} is a {type(record[key]).__name__}, not a string")
            if record[key]:
                yield Document(record[key], place)
