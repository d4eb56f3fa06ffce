"""Names as they are, wherever they are shown: terminals, Markdown and pictures take some characters for orders."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from logging import WARNING, Formatter, LogRecord, StreamHandler, basicConfig
from typing import Any

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|$&~#])")


def shown(value: object) -> str:
    r"""Text for a terminal or a line of a file: control characters, line breaks too, are written as `\x1b`."""
    text = str(value)
    return text if text.isprintable() else "".join(map(_visible, text))


def shown_lines(text: str) -> str:
    """Lines for a terminal, each as `shown`."""
    return "\n".join(map(shown, text.split("\n")))


def number_of(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `2 microbatches`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('ch') else 's'}"


def markdown(value: object) -> str:
    """Text inside of Markdown, which is rendered as it is."""
    return _MARKDOWN.sub(r"\\\1", shown(value))


def code(value: object) -> str:
    """Text as a span of code in Markdown, also in a cell of a table."""
    text = shown(value).replace("|", r"\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def plain_texts(figure: Any) -> None:
    """Have matplotlib show titles, legends and notes of a figure as they are: a `$` begins no mathematics."""
    texts = [*figure.texts]
    for axes in figure.axes:
        legend = axes.get_legend()
        texts += [axes.title, *axes.texts, *(legend.get_texts() if legend is not None else ())]
    for text in texts:
        text.set_parse_math(False)


class LineFormatter(Formatter):
    """Formats log messages, each on one line."""

    def formatMessage(self, record: LogRecord) -> str:
        """See base class."""
        return shown(super().formatMessage(record))


def log_lines() -> None:
    """Write log messages to stderr from WARNING on, a line each."""
    handler = StreamHandler()
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    basicConfig(level=WARNING, handlers=[handler])


_HIDDEN = ("Cc", "Cs", "Zl", "Zp")
"""Kinds of characters: control, half a surrogate pair (in names of another encoding), ends of lines and paragraphs."""
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
"""Marks that change the direction of what follows."""


def _visible(character: str) -> str:
    if unicodedata.category(character) in _HIDDEN or character in _TURNING:
        return character.encode("unicode_escape").decode()
    return character


def left_out_lines(facts: Mapping[str, Any], width: int, listed: str) -> list[str]:
    """What of a corpus was not used: `dropped`, `skipped` and `left_out` of a manifest.

    Args:
        facts: The manifest, or what has these keys.
        width: Columns of the names in front.
        listed: The file that names everything.
    """
    lines = [
        f"  {title:<{width}}{', '.join(f'{n:,} {between}{what}' for what, n in facts[key].items())}"
        for title, key, between in (("dropped", "dropped", "× "), ("left out", "skipped", ""))
        if facts[key]
    ]
    for reason, files in facts["left_out"].items():
        lines.append(f"  {'files left out':<{width}}{files['files']:,} {reason} ({files['bytes'] / 1e6:,.1f} MB)")
        lines += [f"  {'':<{width}}  {shown(name)}" for name in files["first"][:3]]
    if facts["skipped"] or facts["left_out"]:
        lines.append(f"  {'':<{width}}see {listed}")
    return lines
