"""Retrieval tasks with exact lengths, drawn by seed: multi-query associative recall, needle in a haystack, phone book.

Each task makes batches of texts in which some tokens are answers that stand earlier in the text. The same batches
train (labels are -100 elsewhere) and evaluate (`score`). Torch and numpy only; nothing is read from disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from oryx_megatron.data.tokenizer import Tokenizer
from oryx_megatron.errors import ConfigError

IGNORED = -100
"""Label of tokens that are not scored."""


@dataclass(frozen=True)
class RetrievalBatch:
    """Texts of one length with answers to find."""

    tokens: Tensor
    """int64 [n, s]"""
    labels: Tensor
    """int64 [n, s]: the token to predict after each, IGNORED where nothing is asked."""
    answers: Tensor
    """int64 [m, 3]: text, first and last + 1 position of the labels that make one answer."""


@dataclass(frozen=True)
class Score:
    """How many answers were found."""

    answers: int
    exact: int
    """Answers of which every token is right."""
    tokens: int
    right_tokens: int

    @property
    def accuracy(self) -> float:
        """Share of answers found in full."""
        return self.exact / self.answers if self.answers else 0.0

    @property
    def token_accuracy(self) -> float:
        """Share of answer tokens found."""
        return self.right_tokens / self.tokens if self.tokens else 0.0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.answers + other.answers,
            self.exact + other.exact,
            self.tokens + other.tokens,
            self.right_tokens + other.right_tokens,
        )


def score(predictions: Tensor, batch: RetrievalBatch) -> Score:
    """Compare the most likely next tokens [n, s] with the labels.

    Answers of several tokens are scored with the true earlier tokens in the text, which for exact match is the same
    as letting the model write greedily.
    """
    asked = batch.labels != IGNORED
    right = (predictions.to(batch.labels.device) == batch.labels) & asked
    exact = sum(bool(right[row, start:stop].all()) for row, start, stop in batch.answers.tolist())
    return Score(len(batch.answers), exact, int(asked.sum()), int(right.sum()))


class RetrievalTask(Protocol):
    """A kind of text with answers in it."""

    @property
    def name(self) -> str:
        """The task's name in reports."""
        ...

    def sample(self, length: int, count: int, seed: int) -> RetrievalBatch:
        """`count` texts of exactly `length` tokens, a function of the arguments alone.

        Raises ConfigError when the length is too small for the task.
        """
        ...


class Codec(Protocol):
    """Pieces of text to token ids."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text."""
        ...


@dataclass(frozen=True)
class Pieces:
    """A tokenizer that reads pieces of a text: without the special tokens that it puts around a whole one."""

    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of a piece."""
        return self.tokenizer.encode_plain([text])[0]


class ByteCodec:
    """UTF-8 bytes as tokens: for models trained on these tasks alone."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(text.encode())


# ------------------------------------------------------------------------------------------------------------ recall


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): pairs first, then their keys again among filler.

    The first half of the vocabulary are keys, the second half values. After the `pairs` key-value pairs every key (or
    `queries` of them) comes once more; the token to predict there is its value. Places are drawn with a power law (most
    soon after the pairs, some late), or among the last `tail` tokens. All other places hold random tokens that are no
    key of this text.
    """

    vocab_size: int = 8192
    pairs: int = 8
    power: float = 0.1
    """Exponent of the gaps between queries; 1 is uniform."""
    queries: int | None = None
    """Keys asked for; None: all. More than `pairs`: drawn again each time, else each once at most."""
    tail: int | None = None
    """Tokens at the end among which queries stand, each place alike; None: anywhere after the pairs, by `power`."""
    name: str = "mqar"

    def sample(self, length: int, count: int, seed: int) -> RetrievalBatch:
        """See RetrievalTask."""
        keys_known, asked = self.vocab_size // 2, self.pairs if self.queries is None else self.queries
        start = 2 * self.pairs
        if length < start + asked or keys_known < 2 * self.pairs:
            raise ConfigError(
                f"{self.name}: {self.pairs} pairs need a length of at least {start + asked} (got {length}) and a "
                f"vocabulary of at least {4 * self.pairs} (got {self.vocab_size})"
            )
        room = length - start if self.tail is None else self.tail
        if not asked <= room <= length - start:
            raise ConfigError(
                f"{self.name}: {asked} queries of {self.pairs} pairs do not fit into the last {room} of {length} tokens"
            )
        rng = _generator(self.name, seed, length)
        known = rng.permuted(np.tile(np.arange(keys_known), (count, 1)), axis=1)
        keys, others = known[:, : self.pairs], known[:, self.pairs :]
        values = np.tile(np.arange(keys_known, self.vocab_size), (count, 1))
        values = rng.permuted(values, axis=1)[:, : self.pairs]
        filler = (count, length - start)
        tokens = np.empty((count, length), np.int64)
        tokens[:, 0:start:2], tokens[:, 1:start:2] = keys, values
        tokens[:, start:] = np.where(
            rng.random(filler) < 0.5,
            np.take_along_axis(others, rng.integers(0, others.shape[1], filler), 1),
            rng.integers(keys_known, self.vocab_size, filler),
        )
        # The largest of log chance + Gumbel noise are a draw without replacement.
        chance = np.zeros(room) if self.tail else (self.power - 1.0) * np.log(np.arange(1, room + 1))
        places = np.argsort(-(chance + rng.gumbel(size=(count, room))), axis=1)[:, :asked]
        where = np.sort(length - room + places, axis=1)
        order = np.argsort(rng.random((count, self.pairs)), axis=1)[:, :asked]
        if asked > self.pairs:
            order = rng.integers(0, self.pairs, (count, asked))
        labels = np.full((count, length), IGNORED, np.int64)
        np.put_along_axis(tokens, where, np.take_along_axis(keys, order, 1), 1)
        np.put_along_axis(labels, where, np.take_along_axis(values, order, 1), 1)
        rows = np.repeat(np.arange(count), asked)
        return _batch(tokens, labels, np.stack((rows, where.ravel(), where.ravel() + 1), 1))


# ------------------------------------------------------------------------------------------------------- text tasks


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words("Ada Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Lea Max Nia Oto Pia Ray Sue Tom Uma Vic Wyn Yan Zoe")
_LAST = _words("Abel Bauer Costa Diaz Evans Fonda Gupta Hahn Ito Jones Khan Lopez Meyer Novak Olsen Perez Quinn Rossi")
_NOUNS = _words("river market garden winter letter engine window mountain teacher station harbour picture kitchen")
_VERBS = _words("follows leaves watches remembers builds carries crosses paints repairs answers visits measures")
_CITIES = _words(
    "Lima Oslo Cairo Quito Tunis Hanoi Perth Turin Dakar Porto Basel Kyoto Delhi Sofia Accra Minsk Paris "
    "Rome Milan Genoa Bonn Essen Ghent Lyon Nice Malmo Turku Riga Vilnius Split Zadar Varna Izmir Adana "
    "Basra Doha Muscat Lahore Patna Pune Agra Dhaka Hue Osaka Nara Busan Wuhan Davao Apia Suva Darwin "
    "Hobart Luanda Lusaka Harare Durban Maputo Lagos Bamako Havana Cusco Bogota Cali Natal Recife"
)


class WordCodec:
    """Words, set phrases, numbers and marks of the tasks below as tokens: for small models trained on these alone.

    A number is one token for every `digits` of its digits.
    """

    def __init__(self, digits: int = 1) -> None:
        self._parts = re.compile(rf"Question:|The secret number of|[A-Z][a-z]+ is|\d{{{digits}}}|[A-Za-z]+|[^\w ]")
        words = {*_FIRST, *_LAST, *_NOUNS, *_VERBS, "The", "the", "near"}
        words |= {"Question:", "The secret number of", *(f"{city} is" for city in _CITIES)}
        numbers = [f"{number:0{digits}}" for number in range(10**digits)]
        self._ids = {word: i for i, word in enumerate([*numbers, *".:\n", *sorted(words)])}
        self.vocab_size = len(self._ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text of these tasks."""
        return [self._ids[part] for part in self._parts.findall(text)]


@dataclass(frozen=True)
class Needle:
    """Facts at drawn depths of a text of plain sentences, asked for at its end."""

    codec: Codec
    digits: int = 5
    depth: float | None = None
    """Where the facts stand, from 0 (start) to 1 (end); None: drawn for every fact."""
    needles: int = 1
    """Facts, each of another city; more than one is RULER's multi-key needle (arXiv 2404.06654)."""
    questions: int = 1
    """How many are asked for, one after the other with the right answers between; more than needles: drawn again."""
    name: str = "needle"

    def sample(self, length: int, count: int, seed: int) -> RetrievalBatch:
        """See RetrievalTask."""
        if not (self.questions >= 1 and 1 <= self.needles <= len(_CITIES)):
            raise ConfigError(
                f"{self.name}: {self.questions} questions about {self.needles} needles; at least one question and "
                f"1 to {len(_CITIES)} needles were expected"
            )
        rng = _generator(self.name, seed, length)
        texts: list[Any] = []
        labels: list[Any] = []
        answers: list[Any] = []
        for row in range(count):
            cities = [_CITIES[i] for i in rng.permutation(len(_CITIES))[: self.needles]]
            numbers = [_number(rng, self.digits) for _ in cities]
            facts = [self._fact(city, number) for city, number in zip(cities, numbers)]
            asked = rng.permutation(self.needles)[: self.questions]
            if self.questions > self.needles:
                asked = rng.integers(0, self.needles, self.questions)
            exam = [self._question(cities[i], numbers[i]) for i in asked]
            *earlier, (last, answer) = exam
            before = [token for question, digits in earlier for token in question + digits + self.codec.encode(".\n")]
            room = length - sum(map(len, facts)) - len(before) - len(last) - len(answer)
            if room < 0:
                raise ConfigError(f"{self.name}: length {length} is too small; {length - room} tokens are needed")
            hay = _filled(lambda: self.codec.encode(_sentence(rng)), room)
            depths = [rng.random() if self.depth is None else self.depth for _ in facts]
            body = hay.with_inserts([(_line_start(hay, round(d * room)), fact) for d, fact in zip(depths, facts)])
            _finish(body + before + last, answer, row, texts, labels, answers)
            start = len(body)
            for question, digits in earlier:
                start += len(question)
                labels[-1][start - 1 : start - 1 + len(digits)] = digits
                answers.append((row, start - 1, start - 1 + len(digits)))
                start += len(digits) + len(self.codec.encode(".\n"))
        return _batch(np.array(texts), np.array(labels), answers)

    def most_questions(self, length: int) -> int:
        """How many questions a text of this length can surely ask."""
        number = "0" * self.digits
        fact = max(len(self._fact(city, number)) for city in _CITIES)
        question = max(sum(map(len, self._question(city, number))) for city in _CITIES) + len(self.codec.encode(".\n"))
        return (length - self.needles * fact) // question

    def _fact(self, city: str, number: str) -> list[int]:
        return self.codec.encode(f"{_secret(city)} {number}.\n")

    def _question(self, city: str, number: str) -> tuple[list[int], list[int]]:
        """Tokens of a question and of its answer."""
        return self.codec.encode(f"Question: {_secret(city)}"), _continuation(self.codec, _secret(city), f" {number}")


def _secret(city: str) -> str:
    return f"The secret number of {city} is"


@dataclass(frozen=True)
class PhoneBook:
    """A list of names with numbers that fills the text, and at its end one name whose number is asked for.

    As in "Repeat After Me" (arXiv 2402.01032), without its examples: models here are base models.
    """

    codec: Codec
    digits: int = 5
    name: str = "phonebook"

    def sample(self, length: int, count: int, seed: int) -> RetrievalBatch:
        """See RetrievalTask."""
        rng = _generator(self.name, seed, length)
        texts: list[Any] = []
        labels: list[Any] = []
        answers: list[Any] = []
        for row in range(count):
            entries: list[tuple[str, str]] = []
            seen: set[str] = set()
            used = 0
            while True:
                who, number = _person(rng, seen), _number(rng, self.digits)
                seen.add(who)
                line = self.codec.encode(f"{who}: {number}\n")
                # Room for the longest question; the rest is filled by an opening line of another kind.
                if (
                    used + len(line) + max(len(self.codec.encode(f"{w}: {n}\n")) for w, n in [*entries, (who, number)])
                    > length
                ):
                    break
                entries.append((who, number))
                used += len(line)
            if not entries:
                raise ConfigError(f"{self.name}: length {length} is too small for one entry and one question")
            who, number = entries[int(rng.integers(len(entries)))]
            lines = [token for name, digits in entries for token in self.codec.encode(f"{name}: {digits}\n")]
            question, answer = self.codec.encode(f"{who}:"), _continuation(self.codec, f"{who}:", f" {number}")
            room = length - len(lines) - len(question) - len(answer)
            opening = _filled(lambda: self.codec.encode(_sentence(rng)), room).tokens
            _finish(opening + lines + question, answer, row, texts, labels, answers)
        return _batch(np.array(texts), np.array(labels), answers)


@dataclass(frozen=True)
class _Filler:
    tokens: list[int]
    starts: tuple[int, ...]
    """Where its lines begin."""

    def with_inserts(self, inserts: Sequence[tuple[int, list[int]]]) -> list[int]:
        """The tokens with others put in where they say."""
        parts, done = [], 0
        for at, tokens in sorted(inserts, key=lambda insert: insert[0]):
            parts += [*self.tokens[done:at], *tokens]
            done = at
        return parts + self.tokens[done:]


def _filled(make: Callable[[], list[int]], room: int) -> _Filler:
    """Exactly `room` tokens of lines, cut at the front so that the last line ends where it should."""
    lines: list[list[int]] = []
    total = 0
    while total < room:
        lines.append(make())
        total += len(lines[-1])
    cut = total - room
    starts = np.maximum(np.cumsum([0, *(len(line) for line in lines)]) - cut, 0).tolist()
    return _Filler([token for line in lines for token in line][cut:], tuple(starts))


def _line_start(hay: _Filler, wanted: int) -> int:
    """The start (or end) of a line nearest to `wanted`."""
    return min(hay.starts, key=lambda start: abs(start - wanted))


def _continuation(codec: Codec, before: str, answer: str) -> list[int]:
    """Tokens of an answer as they follow what stands before it in the text."""
    together, alone = codec.encode(before + answer), codec.encode(before)
    return together[len(alone) :] if together[: len(alone)] == alone else codec.encode(answer)


def _finish(
    text: list[int],
    answer: list[int],
    row: int,
    texts: list[list[int]],
    labels: list[list[int]],
    answers: list[tuple[int, int, int]],
) -> None:
    """Append one text: the question's last token predicts the answer's first, and so on; the last is not put in."""
    start = len(text) - 1
    texts.append(text + answer)
    labels.append([IGNORED] * start + answer + [IGNORED])
    answers.append((row, start, start + len(answer)))


def _batch(tokens: np.ndarray, labels: np.ndarray, answers: Any) -> RetrievalBatch:
    """`answers`: rows of text, first and last + 1 position."""
    return RetrievalBatch(
        torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(np.asarray(answers).reshape(-1, 3))
    )


def _generator(name: str, seed: int, length: int) -> np.random.Generator:
    return np.random.default_rng([seed, length, *name.encode()])


def _pick(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _number(rng: np.random.Generator, digits: int) -> str:
    return "".join(str(digit) for digit in rng.integers(0, 10, digits))


def _person(rng: np.random.Generator, seen: set[str]) -> str:
    """A name not in `seen`; the second initial comes into use when the short ones run out."""
    for attempt in range(10_000):
        middle = (
            "" if attempt < 50 else "".join(chr(65 + int(i)) for i in rng.integers(0, 26, 1 + attempt // 200)) + ". "
        )
        name = f"{_pick(rng, _FIRST)} {middle}{_pick(rng, _LAST)}"
        if name not in seen:
            return name
    raise ConfigError("phonebook: the text is too long for this many different names")


def _sentence(rng: np.random.Generator) -> str:
    return f"The {_pick(rng, _NOUNS)} {_pick(rng, _VERBS)} the {_pick(rng, _NOUNS)} near the {_pick(rng, _NOUNS)}.\n"


def retrieval_task(name: str, codec: Codec) -> RetrievalTask:
    """The task of a name, in its usual form, for a model with this tokenizer. ConfigError lists the names."""
    tasks: dict[str, Callable[[], RetrievalTask]] = {
        "mqar": lambda: AssociativeRecall(codec.vocab_size),
        "needle": lambda: Needle(codec),
        "phonebook": lambda: PhoneBook(codec),
    }
    if name not in tasks:
        raise ConfigError(f"retrieval task `{name}` is unknown; known: {', '.join(tasks)}")
    return tasks[name]()
