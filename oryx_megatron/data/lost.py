"""Characters that a tokenizer leaves out, which no library counts: a BPE without an unknown token."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oryx_megatron.data.corpus import Text
from oryx_megatron.data.tokenizer import HuggingFaceTokenizer, Tokenizer

NAMED = 20
"""Characters that a manifest names, the most frequent ones."""


class LostCharacters:
    """Counts characters without a token. Each is looked at once, as if it stood alone: the cost is that of a set.

    Args:
        tokenizer: One that `leaves_out` characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        backend = tokenizer.backend
        added = {token.content for token in backend.get_added_tokens_decoder().values()}

        @functools.cache
        def is_lost(character: str) -> bool:
            if character in added:
                return False
            text = backend.normalizer.normalize_str(character) if backend.normalizer else character
            pieces = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, (0, 0))]
            # The offsets that the model gives are lengths: it counts on behind what it left out.
            return any(
                sum(token.offsets[1] - token.offsets[0] for token in backend.model.tokenize(piece))
                < len(piece.encode())
                for piece, _ in pieces
            )

        self._is_lost = is_lost
        self._told = False

    def count(self, texts: Iterable[Text]) -> tuple[Counter[str], int]:
        """How often each lost character is in some texts, and in how many documents, of which a text may be a part."""
        found: Counter[str] = Counter()
        documents = 0
        for text in texts:
            if text.first:
                self._told = False
            lost = {c: text.text.count(c) for c in set(text.text) if self._is_lost(c)}
            found.update(lost)
            if lost and not self._told:
                self._told, documents = True, documents + 1
        return found, documents


def summarize_lost(characters: Mapping[str, int], documents: int) -> dict[str, Any]:
    """For a manifest: how many characters were lost in how many documents, and the most frequent ones."""
    most = sorted(characters.items(), key=lambda item: (-item[1], item[0]))[:NAMED]
    return {"characters": sum(characters.values()), "documents": documents, "most": dict(most)}


def add_lost(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """`summarize_lost` of several datasets together; None where none says so."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    most: Counter[str] = Counter()
    for part in known:
        most.update(part["most"])
    total = summarize_lost(most, sum(part["documents"] for part in known))
    return total | {"characters": sum(part["characters"] for part in known)}
