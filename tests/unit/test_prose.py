"""Docs in short sentences and whole tables; words of the field everywhere. Commands: test_commands_in_docs.py."""

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


NOT_OURS = {
    r"\b(?:go|goes|going|went|gone)[ _]on\b": "continue, resume",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\b(?:is|are|was|were|be|been) passed over\b": "skip",
    r"\bno word (?:from|of)\b": "did not report",
    r"\bwould buy\b": "provides",
    r"\bcarr(?:y|ies|ied) on\b": "continue",
    r"\bfor want of\b": "without, no",
    r"\bset down\b": "write",
    r"\bfell? to pieces\b": "fail",
}
"""What nobody in this field writes, and the field's term."""
SOURCES = sorted(
    path
    for folder in ("oryx_megatron", "tools", "launch", "benchmarks", "configs", "docs", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sh", ".md", ".yaml", ".html", ".ipynb") and path != Path(__file__).resolve()
)


def test_words_are_the_fields() -> None:
    """Code, comments, messages and pages."""
    assert len(SOURCES) > 300
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}; write: {instead}"
        for path in [*SOURCES, *PAGES]
        for text in [path.read_text(encoding="utf-8")]
        for pattern, instead in NOT_OURS.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]
    assert found == []
    assert all(any(re.search(pattern, text) for pattern in NOT_OURS) for text in ("it goes on", "mended", "go_on"))
