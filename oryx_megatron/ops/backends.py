"""Which implementation runs behind each function of ops/: chosen once, at start-up, from KernelsConfig.

A public function is decorated with `dispatched(part)`; its own body is the reference backend. Another backend adds
itself with `register`, in a module that ops/__init__.py imports, and says by `missing` why this machine cannot use it,
by `declines` why it does not serve a workload. `select` applies the configuration; until it is called everything runs
on the reference.

The steps of a mixer are chosen as a whole (`register_steps`): fused ones need kernels for each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import ParamSpec, TypeVar

from oryx_megatron import platform
from oryx_megatron.config.schema import KernelsConfig, ModelConfig
from oryx_megatron.errors import ConfigError

A = ParamSpec("A")
R = TypeVar("R")
PARTS = tuple(field.name for field in fields(KernelsConfig) if field.name not in ("mixer", "graphs", "cache_dir"))


@dataclass(frozen=True)
class Workload:
    """What the kernels of a run must serve."""

    model: ModelConfig
    dtype: str
    """bf16 or fp32"""

    @property
    def recurrence(self) -> str:
        """Function of the model's recurrence."""
        return "ssd" if self.model.mixer == "mamba2" else "gated_delta_rule"


Missing = Callable[[], str | None]
"""Why this machine cannot use something, or None; asked once per selection, may import."""
Declines = Callable[[Workload | None], str | None]
"""Why it does not serve a workload (None: nothing is known), or None."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one function."""

    name: str
    call: Callable
    missing: Missing
    declines: Declines
    rank: int
    """`auto` takes the highest rank that is present; the reference has 0."""

    def unfit(self, work: Workload | None) -> str | None:
        """Why it cannot be used here for `work`, or None."""
        return self.missing() or self.declines(work)


def serves_all(work: Workload | None) -> None:
    """Declines nothing."""


FUSED_RECURRENCE = {"gated_delta_rule": "fla", "ssd": "triton"}
"""Backends that the fused mixer can hand ready gates to."""
_backends: dict[str, dict[str, dict[str, Backend]]] = {part: {} for part in PARTS}
"""part -> function -> backend name -> backend"""
_selected: dict[str, Backend] = {}
"""function -> the backend its calls go to"""
_steps: dict[str, Callable[[Workload | None], str | None]] = {"reference": serves_all}
"""Sets of steps of a mixer, the best one last."""
_selected_steps = "reference"


def dispatched(part: str) -> Callable[[Callable[A, R]], Callable[A, R]]:
    """Make a function the reference backend of `part`; calls of its name go to the selected backend."""

    def decorate(reference: Callable[A, R]) -> Callable[A, R]:
        name = reference.__name__
        register(part, name, "reference", reference, missing=lambda: None, rank=0)

        @functools.wraps(reference)
        def call(*args: A.args, **kwargs: A.kwargs) -> R:
            return _selected[name].call(*args, **kwargs)

        return call

    return decorate


def reference_of(function: Callable[A, R]) -> Callable[A, R]:
    """The reference backend of a `dispatched` function, whatever is selected."""
    return function.__wrapped__  # type: ignore[attr-defined]  # functools.wraps keeps it


def package_on_gpu(package: str) -> Missing:
    """`missing` of a backend that needs this package and a GPU."""
    return lambda: platform.missing_package(package, gpu=True)


def register(
    part: str,
    function: str,
    backend: str,
    call: Callable,
    *,
    missing: Missing,
    rank: int,
    declines: Declines = serves_all,
) -> None:
    """Add an implementation of `function` (same signature and contract as its reference) under the name `backend`."""
    known = _backends[part].setdefault(function, {})
    if backend in known:
        raise ValueError(f"backend {backend} of {function} is registered twice")
    known[backend] = Backend(backend, call, missing, declines, rank)
    if backend == "reference":
        _selected[function] = known[backend]


def register_steps(name: str, *, missing: Missing, declines: Declines) -> None:
    """Add a set of steps that mixers can be composed with; better than those before it."""
    _steps[name] = lambda work: missing() or declines(work)


def selected(function: str) -> str:
    """Name of the backend that calls of `function` go to."""
    return _selected[function].name


def mixer_steps() -> str:
    """Name of the set of steps that mixers are built with."""
    return _selected_steps


def select(kernels: KernelsConfig, work: Workload | None = None) -> None:
    """Choose the backends of all functions, and the mixer's steps, such that they serve `work` (None: any).

    A backend asked for by name must be present and serve at least one function of its part (for recurrences, the
    model's own); the part's other functions then stay on the reference. Raises ConfigError.
    """
    global _selected_steps
    if work is not None and kernels.recurrence not in ("auto", *_backends["recurrence"][work.recurrence]):
        known = ", ".join(sorted(_backends["recurrence"][work.recurrence]))
        raise ConfigError(
            f"kernels.recurrence: {kernels.recurrence} does not serve model.mixer {work.model.mixer}; "
            f"choose auto or one of {known}"
        )
    chosen: dict[str, Backend] = {}
    for part in PARTS:
        chosen |= _choose(part, getattr(kernels, part), work)
    steps = _choose_steps(kernels.mixer, work)
    if work is not None and work.model.has_recurrence and steps == "fused":
        wanted, found = FUSED_RECURRENCE[work.recurrence], chosen[work.recurrence].name
        if wanted != found and kernels.mixer == "fused":
            raise ConfigError(f"kernels.mixer: fused needs kernels.recurrence {wanted}, not {found}")
        if wanted != found:
            steps = "reference"
    _selected.update(chosen)
    _selected_steps = steps


def _choose(part: str, asked: str, work: Workload | None = None) -> dict[str, Backend]:
    functions = _backends[part]
    if asked == "auto":
        best = {}
        for function, known in functions.items():
            ranked = sorted(known.values(), key=lambda backend: -backend.rank)
            best[function] = next(backend for backend in ranked if backend.unfit(work) is None)
        return best
    if not any(asked in known for known in functions.values()):
        raise _unknown(part, asked, {name for known in functions.values() for name in known})
    chosen = {function: known.get(asked, known["reference"]) for function, known in functions.items()}
    for backend in chosen.values():
        if reason := backend.unfit(work):
            raise _unusable(part, asked, reason)
    return chosen


def _choose_steps(asked: str, work: Workload | None) -> str:
    if asked == "auto":
        return next(name for name, unfit in reversed(_steps.items()) if unfit(work) is None)
    if asked not in _steps:
        raise _unknown("mixer", asked, set(_steps))
    if reason := _steps[asked](work):
        raise _unusable("mixer", asked, reason)
    return asked


def _unknown(part: str, asked: str, known: set[str]) -> ConfigError:
    return ConfigError(
        f"kernels.{part}: there is no backend {asked} here; choose auto or one of {', '.join(sorted(known))}"
    )


def _unusable(part: str, asked: str, reason: str) -> ConfigError:
    return ConfigError(f"kernels.{part}: {asked} cannot be used here ({reason}); install it or set auto")


def describe(work: Workload | None = None) -> str:
    """The selection in one line, e.g. `attention=flash4, recurrence=fla, …`; of both recurrences without `work`."""
    names = {part: sorted({_selected[function].name for function in _backends[part]}) for part in PARTS}
    if work is not None:
        names["recurrence"] = [selected(work.recurrence)] if work.model.has_recurrence else []
    names["mixer"] = [_selected_steps]
    return ", ".join(f"{part}={'+'.join(backends)}" for part, backends in names.items() if backends)


@contextmanager
def use(**parts: str) -> Iterator[None]:
    """Select backends of some parts inside a `with` (tests, benchmarks), e.g. `use(attention="reference")`."""
    global _selected_steps
    before, steps = dict(_selected), _selected_steps
    try:
        for part, asked in parts.items():
            if part == "mixer":
                _selected_steps = _choose_steps(asked, None)
            else:
                _selected.update(_choose(part, asked))
        yield
    finally:
        _selected.update(before)
        _selected_steps = steps
