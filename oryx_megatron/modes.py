"""Mode plans: which tokens of a sequence are read by attention and which by the recurrence (docs/model.md).

A plan is the same for all sequences of a microbatch, and for all layers unless it is of `LayerPlans`. Pure Python and
numpy.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from oryx_megatron.config.plans import PlanRuns, chunk_runs, layer_plans, merge_runs, parse_runs, read_plan
from oryx_megatron.config.schema import MixStage, ModesConfig
from oryx_megatron.errors import ConfigError


class Mode(enum.IntEnum):
    """Which mixer reads a token's query."""

    RECURRENT = 0
    ATTENTION = 1


@dataclass(frozen=True)
class Run:
    """Tokens start … stop - 1, all in one mode."""

    start: int
    stop: int
    mode: Mode


@dataclass(frozen=True)
class ModePlan:
    """A mode plan (Oryx, arXiv 2605.28769): modes of the tokens 0 … length - 1, the same in all layers.

    Held as runs: contiguous from 0, none empty, neighbours of different mode.
    Immutable and hashable, so that kernels can cache what they derive from it. ValueError when the runs break the rule.
    """

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        expected = 0
        for i, run in enumerate(self.runs):
            if run.start != expected or run.stop <= run.start:
                raise ValueError(f"run {run} should start at {expected} and not be empty")
            if i and self.runs[i - 1].mode == run.mode:
                raise ValueError(f"run {run} has the mode of the run before it")
            expected = run.stop

    @classmethod
    def _of(cls, runs: PlanRuns) -> ModePlan:
        return cls(tuple(Run(start, stop, Mode(attends)) for start, stop, attends in runs))

    @classmethod
    def uniform(cls, mode: Mode, length: int) -> ModePlan:
        """All tokens in one mode."""
        return cls._of(merge_runs([(0, length, mode == Mode.ATTENTION)]))

    @classmethod
    def from_mask(cls, attention: Sequence[bool] | np.ndarray) -> ModePlan:
        """Plan of a mask [length] that is true where a token attends."""
        mask = np.asarray(attention, dtype=bool)
        edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
        return cls._of(merge_runs((a, b, bool(mask[a])) for a, b in itertools.pairwise(edges) if b > a))

    @classmethod
    def from_chunks(cls, attention: Sequence[bool] | np.ndarray, chunk: int, length: int) -> ModePlan:
        """Plan of one bool per chunk of `chunk` tokens; the last chunk may be cut off by `length`.

        ValueError when the chunks are not as many as the length needs.
        """
        if len(attention) != -(-length // chunk):
            raise ValueError(f"{len(attention)} chunks of {chunk} do not make {length} tokens")
        return cls._of(chunk_runs((bool(a) for a in attention), chunk, length))

    @classmethod
    def parse(cls, spec: str, length: int, *, chunk: int = 256, prompt: int | None = None) -> ModePlan:
        """The plan that a spec such as `ratio:0.25` gives to `length` tokens, the first `prompt` of them given.

        Raises:
            ConfigError: no plan, or none for a text of this length; with the list of forms.
        """
        if length < 0 or chunk < 1:
            raise ConfigError(
                f"mode plan `{spec}`: {length} tokens in chunks of {chunk}; a text has at least 0, a chunk 1"
            )
        return parse_plan(spec, length, chunk=chunk, prompt=prompt)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.runs[-1].stop if self.runs else 0

    @cached_property
    def attention_tokens(self) -> int:
        """Tokens in attention mode."""
        return sum(run.stop - run.start for run in self.attention_runs())

    @property
    def attention_share(self) -> float:
        """Share of the tokens in attention mode; 0 for an empty plan."""
        return self.attention_tokens / self.length if self.runs else 0.0

    @property
    def layer_shares(self) -> float:
        """See `LayerPlans.layer_shares`; one stands for all."""
        return self.attention_share

    def attention_runs(self) -> tuple[Run, ...]:
        """The runs in attention mode."""
        return tuple(run for run in self.runs if run.mode is Mode.ATTENTION)

    def is_attention(self) -> np.ndarray:
        """Mask, bool [length]: true where a token attends."""
        mask = np.zeros(self.length, dtype=bool)
        for run in self.attention_runs():
            mask[run.start : run.stop] = True
        return mask

    def mode_at(self, i: int) -> Mode:
        """Mode of token i, 0 ≤ i < length (IndexError otherwise)."""
        if not 0 <= i < self.length:
            raise IndexError(f"token {i} of a plan of {self.length}")
        return self.runs[bisect.bisect_right(self.runs, i, key=lambda run: run.start) - 1].mode

    def slice(self, start: int, stop: int) -> ModePlan:
        """The plan of tokens start … stop - 1, counted from 0 (IndexError outside the plan)."""
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"tokens {start} to {stop} of a plan of {self.length}")
        return self._of(
            merge_runs((max(r.start, start) - start, min(r.stop, stop) - start, bool(r.mode)) for r in self.runs)
        )

    def extended(self, mode: Mode, n: int) -> ModePlan:
        """This plan with `n` more tokens of `mode` at its end."""
        runs = [(run.start, run.stop, bool(run.mode)) for run in self.runs]
        return self._of(merge_runs([*runs, (self.length, self.length + n, bool(mode))]))

    def tiled(self, n: int) -> ModePlan:
        """This plan `n` times, one after the other."""
        return ModePlan.from_mask(np.tile(self.is_attention(), n))

    @property
    def of_layers(self) -> tuple[ModePlan, ...]:
        """See `LayerPlans.of_layers`; one stands for all."""
        return (self,)

    @property
    def orders(self) -> tuple[ModePlan, ...]:
        """See `LayerPlans.orders`; one stands for all."""
        return (self,)

    @property
    def anywhere(self) -> ModePlan:
        """See `LayerPlans.anywhere`."""
        return self

    def kinds(self) -> np.ndarray:
        """See `LayerPlans.kinds`."""
        return self.is_attention().astype(np.int64)

    def __str__(self) -> str:
        """A spec that `parse_plan` reads back to this plan."""
        if len(self.runs) > 1:
            return "runs:" + ",".join(f"{'ra'[run.mode]}{run.start}-{run.stop}" for run in self.runs)
        return self.runs[0].mode.name.lower() if self.runs else "recurrent"


@dataclass(frozen=True)
class LayerPlans:
    """Plans of the same tokens that differ over the layers of a model. `of` makes one.

    Immutable and hashable, as ModePlan. ValueError when they are of different lengths, or no layer has one.
    """

    layers: tuple[ModePlan | None, ...]
    """The plan of each layer, counted from 0; None: the layer has one mode only and reads no plan."""

    def __post_init__(self) -> None:
        if len({plan.length for plan in self._read}) != 1:
            raise ValueError("the plans of a model's layers should be of one length")

    @classmethod
    def of(cls, plans: Sequence[ModePlan], reads: Sequence[bool]) -> Plan:
        """The plan of each layer, of which those with `reads` have both modes; a ModePlan where these are equal."""
        own = [plan if read else None for plan, read in zip(plans, reads, strict=True)]
        distinct = {plan for plan in own if plan is not None}
        return cls(tuple(own)) if len(distinct) > 1 else next(iter(distinct), plans[0])

    @cached_property
    def _read(self) -> list[ModePlan]:
        return [plan for plan in self.layers if plan is not None]

    @cached_property
    def of_layers(self) -> tuple[ModePlan, ...]:
        """A plan for every layer: where it reads none, that of the nearest layer before it that does, or after it."""
        return _carried(self.layers, self._read[0])

    @cached_property
    def orders(self) -> tuple[ModePlan, ...]:
        """The plan by which the tokens are sorted where a fast mixer of each layer runs (ops/layout.py).

        A layer whose tokens are all in one mode runs in any order; it takes that of its neighbour, so that rows move
        only between layers with different plans of both modes.
        """
        mixed = [plan if 0 < plan.attention_tokens < plan.length else None for plan in self.of_layers]
        return _carried(mixed, next((plan for plan in mixed if plan is not None), self.of_layers[0]))

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self._read[0].length

    @cached_property
    def attention_share(self) -> float:
        """Share of the tokens in attention mode, mean over the layers that read plans."""
        return sum(plan.attention_share for plan in self._read) / len(self._read)

    @cached_property
    def layer_shares(self) -> tuple[float, ...]:
        """Share of the tokens in attention mode of every layer, for arch.py; of `of_layers` where it reads no plan."""
        return tuple(plan.attention_share for plan in self.of_layers)

    def is_attention(self) -> np.ndarray:
        """Mask, bool [layers, 1, length]: true where a token attends, in the form that exports take."""
        return np.stack([plan.is_attention()[None] for plan in self.of_layers])

    @cached_property
    def anywhere(self) -> ModePlan:
        """The plan in which a token attends that attends in some layer."""
        return ModePlan.from_mask(np.any([plan.is_attention() for plan in self._read], axis=0))

    def kinds(self) -> np.ndarray:
        """int64 [length]: 0 where a token recurs in all layers that read plans, 1 where it attends in all, else 2."""
        masks = np.stack([plan.is_attention() for plan in self._read])
        return np.where(masks.all(0), 1, np.where(masks.any(0), 2, 0)).astype(np.int64)

    def slice(self, start: int, stop: int) -> Plan:
        """The plans of tokens start … stop - 1; IndexError outside."""
        return self._map(lambda plan: plan.slice(start, stop))

    def tiled(self, n: int) -> Plan:
        """These plans `n` times, one after the other."""
        return self._map(lambda plan: plan.tiled(n))

    def _map(self, change: Callable[[ModePlan], ModePlan]) -> Plan:
        changed = {plan: change(plan) for plan in self._read}
        return LayerPlans.of([changed[plan] for plan in self.of_layers], [plan is not None for plan in self.layers])

    def __str__(self) -> str:
        """A spec that `plan_for` reads back to these plans."""
        parts, first = [], 0
        for plan, run in itertools.groupby(self.of_layers):
            last = first + len(list(run)) - 1
            parts.append(f"{first}={plan}" if first == last else f"{first}-{last}={plan}")
            first = last + 1
        return "layers:" + ",".join(parts)


def _carried(plans: Iterable[ModePlan | None], first: ModePlan) -> tuple[ModePlan, ...]:
    """Each plan; where there is none, the one before it."""
    found = [first]
    for plan in plans:
        found.append(plan or found[-1])
    return tuple(found[1:])


Plan = ModePlan | LayerPlans
"""What a model reads a text by."""


def plan_for(
    layers: Sequence[bool],
    spec: str,
    length: int,
    *,
    chunk: int,
    prompt: int | None = None,
    characters: Callable[[int], int] | None = None,
) -> Plan:
    """The plan that `spec` gives to a text in a model of these layers, true for those that read plans.

    Otherwise as `parse_plan`; `layers:0-5=PLAN,rest=PLAN` is read here alone.
    """
    read = partial(parse_plan, length=length, chunk=chunk, prompt=prompt, characters=characters)
    return _by_layer(spec, layers, read)


def _by_layer(spec: str, layers: Sequence[bool], read: Callable[[str], ModePlan]) -> Plan:
    """The plan of a spec whose parts, if it has any, `read` makes."""
    parts = layer_plans(spec, len(layers))
    if parts is None:
        return read(spec)
    plans = {part: read(part) for part in dict.fromkeys(parts)}
    return LayerPlans.of([plans[part] for part in parts], layers)


def parse_plan(
    spec: str,
    length: int,
    *,
    chunk: int,
    prompt: int | None = None,
    characters: Callable[[int], int] | None = None,
) -> ModePlan:
    """The plan that `spec` gives to a text of `length` tokens, of which the first `prompt` were given.

    Forms and meaning: `config.plans.parse_runs`. Raises ConfigError with the spec and the list of forms.
    """
    return ModePlan._of(parse_runs(spec, length, chunk=chunk, prompt=prompt, characters=characters))


def draw_plan(
    modes: ModesConfig,
    *,
    seed: int,
    iteration: int,
    microbatch: int,
    length: int,
    documents: Sequence[int] | None = None,
    layers: Sequence[bool] = (),
) -> Plan:
    """Training plan of one microbatch: a pure function of its arguments, so equal on all ranks and after a resume.

    `microbatch` counts over the whole global batch: microbatch m of data-parallel rank r of dp is number m · dp + r,
    the place of its samples in the batch. So the plan belongs to the samples, and is the same under any layout.

    All attention with probability p_attention, all recurrent with p_recurrent; with p_prompt each text is split at a
    chunk drawn for it, and `modes.prompt` gives the plans before and after; else ρ ~ U(0, 1) is drawn and every chunk
    attends with probability ρ (mixed training, arXiv 2605.28769; the other draws are this project's). With p_layers
    each of `modes.layer_groups` groups of neighbouring layers has a ratio and chunks of its own. Chunks count from the
    start of every text: the sequence, or each of `documents`, the cumulative starts [0, …, length]. `modes.schedule`
    replaces the probabilities from its stages' iterations on; `modes.fixed` replaces the draw. `layers` are the
    model's, true for those that read plans.
    """
    bounds = [0, length] if documents is None else list(documents)
    texts = [stop - start for start, stop in itertools.pairwise(bounds)]
    short = documents is not None  # than the tokens that a plan names
    if modes.fixed is not None:
        return _by_layer(
            modes.fixed,
            layers,
            lambda spec: _joined([parse_runs(spec, n, chunk=modes.chunk, shorter=short) for n in texts], bounds),
        )
    now: ModesConfig | MixStage = modes
    for stage in modes.schedule:
        if stage.start <= iteration:
            now = stage
    p_attention, p_recurrent, p_prompt = now.p_attention, now.p_recurrent, now.p_prompt
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, iteration, microbatch))))
    u = rng.random()
    if u < p_attention:
        return ModePlan.uniform(Mode.ATTENTION, length)
    if u < p_attention + p_recurrent:
        return ModePlan.uniform(Mode.RECURRENT, length)
    chunks = [-(-n // modes.chunk) for n in texts]
    if u < p_attention + p_recurrent + p_prompt:
        cuts = [
            min(int(draw * (count + 1)) * modes.chunk, n)
            for draw, count, n in zip(rng.random(len(texts)), chunks, texts)
        ]
        spec = read_plan(modes.prompt)
        return _joined(
            [parse_runs(spec, n, chunk=modes.chunk, prompt=cut, shorter=True) for n, cut in zip(texts, cuts)], bounds
        )

    def mixed() -> ModePlan:
        ratio = rng.random()
        attends = rng.random(sum(chunks)) < ratio
        parts = np.split(attends, np.cumsum(chunks)[:-1])
        return _joined([chunk_runs(part.tolist(), modes.chunk, n) for part, n in zip(parts, texts)], bounds)

    if layers and u < p_attention + p_recurrent + p_prompt + now.p_layers:
        groups = [mixed() for _ in range(modes.layer_groups)]
        return LayerPlans.of([groups[i * len(groups) // len(layers)] for i in range(len(layers))], layers)
    return mixed()


def _joined(texts: Sequence[PlanRuns], bounds: Sequence[int]) -> ModePlan:
    """The plan of texts that follow each other and begin at `bounds`."""
    runs = ((a + start, b + start, attends) for start, text in zip(bounds, texts) for a, b, attends in text)
    return ModePlan._of(merge_runs(runs))
