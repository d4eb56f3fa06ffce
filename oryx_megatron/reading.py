"""Small files that people and programs hand in, read so that none of them holds a command up or fills its memory."""

from __future__ import annotations

import codecs
import errno
import json
import os
import stat
from typing import Any, BinaryIO

LIMIT = 1 << 20
"""Bytes of the largest config."""
BEGINNINGS = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "gzip, whose name should end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd, whose name should end in .zst",
    b"BZh": "bzip2, whose name should end in .bz2",
    b"\xfd7zXZ\0": "xz, whose name should end in .xz",
    b"PAR1": "parquet, whose name should end in .parquet",
    b"PK\x03\x04": "a zip archive, to be unpacked first",
    b"%PDF-": "a PDF, no text",
}
"""First bytes of files that are no UTF-8 text, and what they are."""


def not_text(data: bytes) -> str:
    """`: this is UTF-16`, …, where the first bytes of a file that is not UTF-8 tell; else empty."""
    return next((f": this is {kind}" for start, kind in BEGINNINGS.items() if data.startswith(start)), "")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading bytes; a pipe or a device, which may block or never end, is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | os.PathLike[str], limit: int = LIMIT) -> str:
    """Text of a UTF-8 file.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `limit` bytes.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        error.reason += not_text(data)
        raise


def parse_json(text: str | bytes) -> Any:
    """JSON as plain data; ValueError for all that is wrong with it, nesting that is too deep included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def reason(error: Exception) -> str:
    """Why a file could not be read, in words on one line, without its name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
