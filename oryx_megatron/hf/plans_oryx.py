"""The grammar of mode plan specs: text to runs. Pure Python: training reads plans by it, and every export ships it.

A spec says which tokens of a text attend and which recur. A run is (start, stop, attends), in tokens, `stop` excluded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

PlanRuns = tuple[tuple[int, int, bool], ...]

FORMS = (
    "attention, recurrent, prefix:N, last:N, ratio:R, every:K, runs:a0-256,r256-512, prompt:PLAN,new:PLAN, router:R, "
    "layers:0-5=PLAN,rest=PLAN (N tokens, R from 0 to 1, every K-th chunk; runs also by share or to the end: "
    "runs:a0-25%,r25%-end; layers from 0, also 3, 6-end, even, odd)"
)

KINDS = ("attention", "recurrent", "prefix:", "last:", "ratio:", "every:", "runs:", "prompt:", "router:", "layers:")
"""How each form begins."""

_EDGE = r"\d+(?:\.\d+)?%|\d+c?|end"
_RUN = re.compile(rf"([ar])({_EDGE})-({_EDGE})")
_RATIO = re.compile(r"\d+\.?\d*|\.\d+")
_PART = re.compile(r"(?:^|,)\s*([^,=]*?)\s*=")
_LAYERS = re.compile(r"(\d{1,6})(?:-(\d{1,6}|end))?")


_SHOWN = 160
"""Characters of a plan in an error."""


def _named_plan(spec: str) -> str:
    """As errors name it: plans that were made by a program may have thousands of runs."""
    return f"mode plan `{spec if len(spec) <= _SHOWN else spec[: _SHOWN - 1] + '…'}`"


def routed_share(spec: str) -> float | None:
    """Share R of `router:R`; None for every other plan. ValueError for an R that is no number from 0 to 1."""
    kind, _, value = spec.strip().partition(":")
    if kind != "router":
        return None
    if not _RATIO.fullmatch(value.strip()) or Fraction(value.strip()) > 1:
        raise _wrong(spec, f"`{value}` is not a number from 0 to 1")
    return float(value)


def split_layers(spec: str) -> list[tuple[str, str]] | None:
    """The parts of `layers:0-5=PLAN,rest=PLAN` as written: which layers, and their plan. None for every other plan.

    ValueError for `layers:` without parts.
    """
    kind, colon, value = spec.strip().partition(":")
    if kind != "layers" or not colon:
        return None
    found = list(_PART.finditer(value))
    if not found or found[0].start():
        raise _wrong(spec, "`layers:` needs parts like 0-5=attention")
    ends = [match.start() for match in found[1:]] + [len(value)]
    return [(match[1], value[match.end() : end].strip()) for match, end in zip(found, ends)]


def layer_plans(spec: str, layers: int) -> tuple[str, ...] | None:
    """Plan of each of a model's layers, for `layers:0-5=PLAN,rest=PLAN`; None for every other plan.

    A part names a layer (`3`), a range with both its ends (`0-5`, `6-end`), `even` or `odd` layers counted from 0, or
    the `rest`. Raises ValueError unless every layer is named once, and for a plan that no single layer can have.
    """

    wrong = partial(_wrong, spec)
    parts = split_layers(spec)
    if parts is None:
        return None
    if not layers:
        raise wrong("no model is known here whose layers it could name")
    plans: dict[int, str] = {}
    names: dict[int, str] = {}
    for name, plan in sorted(parts, key=lambda part: part[0] == "rest"):
        if plan.startswith(("layers:", "router:")):
            kind = plan.partition(":")[0]
            raise wrong(f"the part `{name}` cannot be a plan `{kind}:`, which is for all layers")
        for layer in _named(name, layers, [i for i in range(layers) if i not in plans], wrong):
            if layer in plans:
                raise wrong(f"layer {layer} is named twice, by `{names[layer]}` and `{name}`")
            plans[layer], names[layer] = plan, name
    if missing := [i for i in range(layers) if i not in plans]:
        which = f"layer {missing[0]} has" if len(missing) == 1 else f"layers {missing[0]} to {missing[-1]} have"
        if len(missing) not in (1, missing[-1] - missing[0] + 1):
            which = f"{len(missing)} of the {layers} layers, {missing[0]} the first of them, have"
        raise wrong(f"{which} no plan; name every layer, or add rest=PLAN")
    return tuple(plans[i] for i in range(layers))


def _named(name: str, layers: int, unnamed: list[int], wrong: Callable[[str], ValueError]) -> Iterable[int]:
    """The layers that one part of `layers:` names."""
    if name in ("even", "odd"):
        return range(name == "odd", layers, 2)
    if name == "rest":
        if not unnamed:
            raise wrong(f"`rest` is no layer: the other parts name all {layers}")
        return unnamed
    match = _LAYERS.fullmatch(name)
    if match is None:
        raise wrong(f"`{name}` names no layers; write 3, 0-5, 6-end, even, odd or rest")
    first = int(match[1])
    last = first if match[2] is None else layers - 1 if match[2] == "end" else int(match[2])
    if max(first, last) >= layers:
        raise wrong(f"layer {max(first, last)} of `{name}` is not there: the model has {layers}, 0 to {layers - 1}")
    if last < first:
        raise wrong(f"`{name}` ends before it begins")
    return range(first, last + 1)


def merge_runs(runs: Iterable[tuple[int, int, bool]]) -> PlanRuns:
    """Drop empty runs and join neighbours of one mode."""
    merged: list[tuple[int, int, bool]] = []
    for start, stop, attends in runs:
        if stop <= start:
            continue
        if merged and merged[-1][2] == attends:
            start = merged.pop()[0]
        merged.append((start, stop, attends))
    return tuple(merged)


CHUNKS = 1 << 20
"""Most chunks that a plan is drawn up for."""
DIGITS = 18
"""Of a number of tokens."""


def chunk_runs(attends: Iterable[bool], chunk: int, length: int) -> PlanRuns:
    """Runs of a plan given per chunk of `chunk` tokens; the last chunk ends at `length`."""
    return merge_runs((i * chunk, min((i + 1) * chunk, length), bool(a)) for i, a in enumerate(attends))


def parse_runs(
    spec: str,
    length: int,
    *,
    chunk: int,
    prompt: int | None = None,
    shorter: bool = False,
    characters: Callable[[int], int] | None = None,
) -> PlanRuns:
    """Runs of the plan that `spec` gives to a text of `length` tokens.

    `ratio:R` spreads the attention chunks evenly: chunk i attends when floor((i+1)R) > floor(iR); `every:K` lets
    every K-th chunk attend, which is `ratio:1/K`. A last chunk may be shorter than `chunk`. Edges of `runs:` are
    tokens, a share of the text (`25%`, rounded down to whole tokens), its `end`, or characters (`120c`): `characters`
    gives the number of tokens that the first so many characters of the text make, and only `c` needs it. `prompt` is
    the number of tokens given before generation; only `prompt:…,new:…` needs it. `shorter`: the N of `prefix:N` and
    `last:N` may be more than the text has, for a default plan, which meets texts of any length.
    Raises ValueError, with the spec and the list of forms, for what is no plan or does not fit the text.
    """
    text = _Text(spec=spec, length=length, chunk=chunk, prompt=prompt, shorter=shorter, characters=characters)
    chunks = -(-length // chunk)
    if chunks > CHUNKS and spec.strip().startswith(("ratio", "every")):
        raise ValueError(f"{_named_plan(spec)}: {length} tokens are {chunks} chunks of {chunk}, more than {CHUNKS}")
    kind, colon, value = spec.strip().partition(":")
    value = value.strip()
    if kind in ("attention", "recurrent") and not colon:
        return merge_runs([(0, length, kind == "attention")])
    if kind == "prefix":
        count = text.tokens(value)
        return merge_runs([(0, count, True), (count, length, False)])
    if kind == "last":
        count = text.tokens(value)
        return merge_runs([(0, length - count, False), (length - count, length, True)])
    if kind == "ratio":
        if not _RATIO.fullmatch(value) or Fraction(value) > 1:
            raise _wrong(spec, f"`{value}` is not a number from 0 to 1")
        ratio = Fraction(value)  # exact: 0.29 * 100 chunks are 29, not 28
        return chunk_runs((int((i + 1) * ratio) > int(i * ratio) for i in range(chunks)), chunk, length)
    if kind == "every":
        every = text.whole(value, 1)
        return chunk_runs(((i + 1) % every == 0 for i in range(chunks)), chunk, length)
    if routed_share(spec) is not None:
        why = "a router chooses by the text, which is not known here; use it where a trained model reads a text"
        raise _wrong(spec, why)
    if kind == "layers":
        raise _wrong(spec, "`layers:` goes around all other forms, and only where a model's layers are known")
    if kind == "runs":
        return text.explicit_runs(value)
    if kind == "prompt":
        return text.prompt_runs(value)
    near = difflib.get_close_matches(kind, KINDS, 1, 0.7)
    raise _wrong(spec, f"unknown form; did you mean `{near[0]}`?" if near else "unknown form")


@dataclass(frozen=True, kw_only=True)
class _Text:
    """What a plan is read for, and how its parts are read. Arguments as of `parse_runs`."""

    spec: str
    length: int
    chunk: int
    prompt: int | None
    shorter: bool
    characters: Callable[[int], int] | None

    def whole(self, text: str, least: int) -> int:
        """A whole number."""
        if not text.isdecimal() or len(text) > DIGITS or int(text) < least:
            raise _wrong(self.spec, f"`{text}` is not a whole number of at least {least}")
        return int(text)

    def tokens(self, text: str) -> int:
        """The N of `prefix:N` and `last:N`."""
        count = self.whole(text, 0)
        if count > self.length and not self.shorter:
            raise _wrong(self.spec, f"{count} tokens are more than the {self.length} of the text")
        return min(count, self.length)

    def edge(self, text: str, before: int) -> int:
        """An edge of a run, in tokens; `before` is the edge before it."""
        if text.isdecimal():
            return self.whole(text, 0)
        if text.endswith("%") and (len(text) > DIGITS or Fraction(text[:-1]) > 100):
            raise _wrong(self.spec, f"`{text}` is more than the whole text")
        if self.shorter and not self.length:  # a default plan and no text: only the form is checked
            return before
        if text.endswith("%"):
            return int(Fraction(text[:-1]) * self.length / 100)
        if text.endswith("c"):
            if self.characters is None:
                why = f"`{text}`: characters count only where there is a text, as in `generate`"
                raise _wrong(self.spec, why)
            return self.characters(self.whole(text[:-1], 0))
        return self.length

    def explicit_runs(self, value: str) -> PlanRuns:
        """Runs of `runs:a0-256,r256-512`."""
        runs: list[tuple[int, int, bool]] = []
        for part in value.split(","):
            match = _RUN.fullmatch(part.strip())
            if match is None:
                raise _wrong(self.spec, f"`{part.strip()}` is no run like a0-256, r25%-end or r256-512")
            expected = runs[-1][1] if runs else 0
            start = self.edge(match[2], expected)
            stop = self.edge(match[3], start)
            if stop < start or (stop == start and (match[2] + match[3]).isdecimal()):
                raise _wrong(self.spec, f"run `{part.strip()}` is empty")
            if start != expected:
                why = f"run `{part.strip()}` does not start at {expected}, where the one before it ends"
                raise _wrong(self.spec, why)
            runs.append((start, stop, match[1] == "a"))
        if self.shorter and not self.length:  # a default plan and no text: only the form is checked
            return ()
        if runs[-1][1] != self.length:
            raise _wrong(self.spec, f"its runs end at {runs[-1][1]}, the text at {self.length}")
        return merge_runs(runs)

    def prompt_runs(self, value: str) -> PlanRuns:
        """Runs of `prompt:PLAN,new:PLAN`."""
        before, comma, after = value.partition(",new:")
        if not comma:
            raise _wrong(self.spec, "`prompt:PLAN` needs `,new:PLAN` after it")
        if "prompt:" in value:
            raise _wrong(self.spec, "a prompt plan cannot hold another")
        if self.prompt is None:
            raise _wrong(self.spec, "there is no prompt here, only generate has one; use one of the other forms")
        if self.prompt > self.length:
            why = f"the prompt of {self.prompt} tokens is longer than the text of {self.length}"
            raise _wrong(self.spec, why)
        first = parse_runs(before, self.prompt, chunk=self.chunk, shorter=self.shorter, characters=self.characters)
        second = parse_runs(after, self.length - self.prompt, chunk=self.chunk, shorter=self.shorter)
        shifted = ((start + self.prompt, stop + self.prompt, attends) for start, stop, attends in second)
        return merge_runs([*first, *shifted])


def _wrong(spec: str, why: str) -> ValueError:
    return ValueError(f"{_named_plan(spec)}: {why}; a plan is one of {FORMS}")
