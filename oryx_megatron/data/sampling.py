"""The text that a tokenizer is trained and measured on: every document, or a sample spread evenly over the corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oryx_megatron.data.corpus import (
    Bad,
    LeftOut,
    Reading,
    ReadOptions,
    Text,
    check_share,
    describe,
    may_skip,
    plan,
    read,
    summarize_left_out,
)
from oryx_megatron.errors import DataError

NAMED = 3
"""Bad documents that an error names."""


@dataclass
class TrainingText:
    """A corpus to train on. What `texts` gives, and what it leaves out, is counted."""

    inputs: Sequence[str]
    options: ReadOptions
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with bad input: stop at the first, or leave it out and count it."""
    max_bad: float = 0.01
    """With `skip`: largest share of documents that may be bad, and of input in files that cannot be read to the end."""
    sample_bytes: int | None = None
    """Bytes of text to take at most, as many from every part of the corpus as its share of the input; None: all."""
    every: int = 0
    """Every so many documents one is held out; 0: none."""
    outputs: Sequence[str | Path] = ()
    """Files that the command writes: they are no input."""
    left_out: list[LeftOut] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    """Documents and files of the training text that cannot be used."""
    documents: int = 0
    bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Raises DataError when an input is missing."""
        self.units = plan(self.inputs, self.options, left_out=self.left_out, outputs=self.outputs)
        self.size = sum(segment.size for unit in self.units for segment in unit)

    def texts(self, *, held_out: bool = False) -> Iterator[Text]:
        """Documents to train on, or those held out, in the order of the corpus; a sample cuts the last of a part.

        Raises DataError with file and line for input that is not usable (see `on_error`).
        """
        taken = position = documents = unread = 0
        bad: list[Bad] = []
        dropped: Counter[str] = Counter()
        segments = [segment for unit in self.units for segment in unit]
        for ordinal, segment in enumerate(segments):
            position += segment.size
            quota = None if self.sample_bytes is None else self.sample_bytes * position // max(self.size, 1)
            if quota is not None and taken >= quota and segment.size:
                continue
            reading = Reading()
            # A part of a very long document counts as a document here.
            number = ordinal
            for item in read([segment], self.options, reading):
                if isinstance(item, Bad):
                    if self.on_error == "stop" and not may_skip(item, self.inputs):
                        raise DataError(f"{describe(item)}; --on-error skip leaves such input out")
                    bad.append(item)
                    unread += item.unread
                    continue
                documents += 1
                number += 1
                if (self.every != 0 and number % self.every == 0) != held_out:
                    continue
                text = item if quota is None else _cut(item, quota - taken)
                taken += len(text.data)
                if text.data:
                    yield text
                if quota is not None and taken >= quota:
                    break
            dropped += reading.dropped
        if self.on_error == "skip":
            counts = Counter(item.reason for item in bad)
            first = [describe(item) for item in bad if item.reason != "empty"][:NAMED]
            hint = f"Fix them or raise --max-bad. The first: {'; '.join(first)}"
            check_share(counts, documents, unread, self.size, self.max_bad, hint)
        if not held_out:
            self.bad, self.dropped, self.documents, self.bytes = bad, dropped, documents, taken

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the text, once it was read."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "sample_bytes": self.sample_bytes,
            "held_out": self.every,
            "skipped": dict(sorted(Counter(item.reason for item in self.bad).items())),
            "left_out": summarize_left_out(self.left_out),
            "dropped": dict(sorted(self.dropped.items())),
        }

    def list_of_bad(self) -> list[dict[str, Any]]:
        """A record for every document and file that was left out, as in PREFIX.skipped.jsonl."""
        return [*(item.record() for item in self.bad), *(item.record() for item in self.left_out)]


def _cut(text: Text, size: int) -> Text:
    """The beginning of a text, of `size` bytes at most."""
    if len(text.data) <= size:
        return text
    shorter = text.data[:size].decode(errors="ignore")
    return Text(shorter, shorter.encode(), text.place, text.first)
