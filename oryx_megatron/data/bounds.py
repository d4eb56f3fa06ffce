"""Tokenizer files of others, held in bounds: what they may cost, and one line for what their libraries run into.

A file can be damaged or made to harm: a normaliser that doubles its text forty times, a regular expression that takes
for ever, an id of four billion. What can be seen in the file is refused when it is loaded; what cannot is bounded when
it is used.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from oryx_megatron.errors import DataError, first_line

GROWTH = 1000
"""So many times longer than the text may a normaliser's result be; NFKC's can be 18 times."""
LARGEST_ID = 1 << 24
"""Of a token; a row of the embedding each."""
SECONDS, BYTES_PER_SECOND = 30.0, 20_000
"""A library may take this long for a text, and a second more for so many of its bytes; most take a millionth."""
NORMAL_FORMS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18}

T = TypeVar("T")


class TooSlow(DataError):
    """A library gave no result in a time that is far beyond all use."""


def check_charsmap(blob: bytes, path: Path) -> None:
    """Refuse a SentencePiece map of characters that is damaged, or puts very long texts for one. Raises DataError."""
    if not blob:
        return
    size = struct.unpack("<I", blob[:4])[0] if len(blob) >= 4 else len(blob)
    if size > len(blob) - 4 or size % 4:
        raise DataError(f"{path}: its map of characters for the normaliser is damaged")
    _check_growth(max(map(len, blob[4 + size :].split(b"\0"))), path)


def check_config(config: Any, path: Path) -> None:
    """Refuse a tokenizer.json, as parsed, whose ids or normaliser are beyond all bounds. Raises DataError."""
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise DataError(f"{path} is no tokenizer of Hugging Face's `tokenizers`: it has no `model`")
    vocabulary = config["model"].get("vocab")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    added = config.get("added_tokens")
    tokens = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    check_ids((*ids, *tokens), path)
    with contextlib.suppress(AttributeError, TypeError, KeyError):  # the library says what is wrong with the fields
        growth, forms = _growth(config.get("normalizer"))
        _check_growth(growth * forms, path)


def check_ids(ids: Iterable[Any], path: Path) -> None:
    """Refuse ids for which no embedding can have a row. Raises DataError."""
    for number in ids:
        if isinstance(number, int) and not 0 <= number < LARGEST_ID:
            raise DataError(f"{path}: token id {number} is not between 0 and {LARGEST_ID - 1:,}")


def _check_growth(growth: float, path: Path) -> None:
    if growth > GROWTH:
        raise DataError(f"{path}: its normaliser can make a text {growth:.3g} times as long, more than {GROWTH}")


def _growth(step: dict[str, Any] | None) -> tuple[float, float]:
    """How many times longer a normaliser can make a text; normal forms apart: a second one adds nothing."""
    if step is None:
        return 1, 1
    kind = step["type"]
    if kind == "Sequence":
        parts = [_growth(part) for part in step["normalizers"]]
        return math.prod(part[0] for part in parts), max((part[1] for part in parts), default=1)
    if kind == "Replace":
        content = len(step["content"])
        if "String" in step["pattern"]:
            pattern = len(step["pattern"]["String"])
            return (max(1, content / pattern) if pattern else 1 + content), 1
        return max(1, content) + _matches_nothing(step) * content, 1
    if kind == "Precompiled":
        import base64

        blob = base64.b64decode(step["precompiled_charsmap"])
        size = struct.unpack("<I", blob[:4])[0]
        return max(map(len, blob[4 + size :].split(b"\0"))), 1
    return 1, NORMAL_FORMS.get(kind, 4 if kind in ("ByteLevel", "BertNormalizer") else 1)


def _matches_nothing(step: dict[str, Any]) -> bool:
    """Whether the regular expression of a `Replace` can match where there is no character."""
    import tokenizers

    try:
        with _quiet(), one_line("pattern"):
            replace = tokenizers.normalizers.Replace(tokenizers.Regex(step["pattern"]["Regex"]), "x")
            return len(replace.normalize_str("~")) > 1
    except DataError:  # loading says what is wrong with the pattern
        return True


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer library runs into, panics of Rust included, into DataError with `what` before it."""
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {first_line(error)}") from error


def bounded(call: Callable[[], T], size: int, what: str) -> T:
    """The result of a library's call on a text of `size` bytes, or DataError when it fails or takes for ever.

    The call continues in a thread that ends with the process. What Rust prints of a panic is not shown.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            failure.append(error)

    limit = SECONDS + size / BYTES_PER_SECOND
    with _quiet():
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(limit)
    if thread.is_alive():
        raise TooSlow(f"{what}: no result after {limit:.0f} s for {size:,} bytes of text; is its pattern to blame?")
    with one_line(what):
        if failure:
            raise failure[0]
    return outcome[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries write to stderr, and show it unless the calling code fails."""
    if sys.stderr is not None:
        sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        try:
            kept = os.dup(2)
        except OSError:  # nothing is open there
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        held.seek(0)
        if (text := held.read(1 << 16)) and b"panicked at" not in text:
            os.write(2, text)
