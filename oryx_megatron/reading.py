"""Small files that people and programs hand in, read so that none of them holds a command up or fills its memory."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, BinaryIO

LIMIT = 1 << 20
"""Bytes of the largest config."""


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
    return data.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON as plain data; ValueError for all that is wrong with it, nesting that is too deep included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def reason(error: Exception) -> str:
    """Why a file could not be read, in words on one line, without its name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
