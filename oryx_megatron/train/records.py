"""Lines of JSON that a run left in its folder, as a crash, a disk or another program may have left them. No torch.

A line of which something known has the wrong type is damaged: it is left out, and counted so that the reader can say
so once. What is not known is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oryx_megatron.reading import open_regular, parse_json

Check = Callable[[Any], bool]


@dataclass
class Records:
    """What a file of lines holds."""

    lines: list[dict[str, Any]]
    damaged: int = 0
    first: int = 0
    """Number of the first damaged line, from 1; 0: none."""

    def damage(self) -> str | None:
        """What was left out, in words; None when nothing was."""
        if not self.damaged:
            return None
        return f"left out {self.damaged} damaged line{'s' * (self.damaged > 1)}, the first is line {self.first}"


def read_records(path: Path, parse: Callable[[bytes], dict[str, Any] | None]) -> Records:
    """Lines of a file; none when it is missing. OSError when it cannot be read or is no regular file."""
    found = Records([])
    try:
        with open_regular(path) as file:
            content = file.read()
    except FileNotFoundError:
        return found
    texts = content.split(b"\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        if (line := parse(text)) is not None:
            found.lines.append(line)
        else:
            found.damaged += 1
            found.first = found.first or number
    return found


def parse_record(text: bytes, needs: Mapping[str, Check], may: Mapping[str, Check]) -> dict[str, Any] | None:
    """An object that has all fields of `needs`, and those of `may` only as they should be; else None."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict):
        return None
    whole = all(name in line and check(line[name]) for name, check in needs.items())
    return line if whole and all(check(line[name]) for name, check in may.items() if name in line) else None


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_whole(value: Any) -> bool:
    """A whole number from 0 up that 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """A number; NaN and infinities too, which losses can be."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def is_amount(value: Any) -> bool:
    """A finite number from 0 up."""
    return is_number(value) and math.isfinite(value) and value >= 0


def is_table(value: Any) -> bool:
    """Rows of one length of numbers."""
    return (
        isinstance(value, list)
        and len({len(row) if isinstance(row, list) and row else 0 for row in value} | {0}) == 2
        and all(isinstance(row, list) and row and all(map(is_number, row)) for row in value)
    )


def is_numbers(value: Any) -> bool:
    """A list of numbers."""
    return isinstance(value, list) and all(map(is_number, value))


def is_flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def is_losses(value: Any) -> bool:
    """Names with numbers."""
    return isinstance(value, dict) and all(map(is_number, value.values()))
