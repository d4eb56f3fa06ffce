"""Docs in short sentences and whole tables. Their commands: test_commands_in_docs.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST = 30
"""Words of a sentence."""
END = re.compile(r"(?<=[.!?:])[\"'”)\]*`]*\s+(?=[\"'“(\[*`A-ZΑ-Ω0-9_]|\w)")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs, list items, headings and table cells, without code blocks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if re.match(r"\s{4,}\S", line) and not block:  # an indented code block
            continue
        starts_item = re.match(r"\s*(?:[-*]|\d+\.)\s", line)
        if not line.strip() or line.startswith(("#", "|", ":::", "<")) or starts_item:
            if block:
                yield " ".join(block)
            block = []
        if line.startswith("|"):
            yield from (cell.strip() for cell in re.split(r"(?<!\\)\|", line) if cell.strip(" -:"))
        elif line.strip() and not line.startswith((":::", "<")):
            block.append(re.sub(r"^\s*(?:[-*]|\d+\.|#+)\s+", "", line).strip())


def sentences(text: str) -> Iterator[str]:
    """Sentences; a colon ends one too, since what follows stands by itself."""
    for paragraph in paragraphs(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
        plain = re.sub(r"`[^`]*`", "code", plain)
        yield from (sentence for sentence in END.split(plain) if sentence.strip())


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_sentences_are_short(page: Path) -> None:
    long = [sentence for sentence in sentences(page.read_text(encoding="utf-8")) if len(words(sentence)) > LONGEST]
    assert long == []


def test_the_test_sees_long_sentences() -> None:
    long = " ".join(["word"] * 31)
    text = f"# Title\n\nShort. {long}.\n\n    {long}\n\n- {long}\n\n| {long} | a |\n|---|---|\n\n```\n{long}\n```\n"
    assert sum(len(words(sentence)) > LONGEST for sentence in sentences(text)) == 3
    assert len(list(sentences("One. Two! Three? Four: five; six."))) == 5


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tables_are_whole(page: Path) -> None:
    """Each begins with a header, and its rows have as many cells; a table cut in two is shown as text."""
    for table in re.findall(r"(?:^ *\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert re.fullmatch(r" *\|(?: *:?-+:? *\|)+", table.splitlines()[1]), table
        assert len(set(cells)) == 1, table
