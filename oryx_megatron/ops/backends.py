"""Which implementation runs behind each function of ops/: chosen once, at start-up, from KernelsConfig.

A public function is decorated with `dispatched(part)`; its own body is the reference backend. Another backend adds
itself with `register`, in a module that ops/__init__.py imports, and says by `missing` why it cannot serve on this
machine. `select` applies the configuration; until it is called everything runs on the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import ParamSpec, TypeVar

from oryx_megatron.config.schema import KernelsConfig, ModelConfig
from oryx_megatron.errors import ConfigError

A = ParamSpec("A")
R = TypeVar("R")
PARTS = tuple(field.name for field in fields(KernelsConfig) if field.name not in ("graphs", "cache_dir"))


@dataclass(frozen=True)
class Backend:
    """One implementation of one function."""

    name: str
    call: Callable
    missing: Callable[[], str | None]
    """Why this machine cannot use it, or None; asked once per selection, may import."""
    rank: int
    """`auto` takes the highest rank that is present; the reference has 0."""


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


FUSED_RECURRENCE = {"gated_delta_rule": "fla", "ssd": "triton"}
"""Backends that the fused mixer can hand ready gates to."""
_workload: Workload | None = None
_backends: dict[str, dict[str, dict[str, Backend]]] = {part: {} for part in PARTS}
"""part -> function -> backend name -> backend"""
_selected: dict[str, Backend] = {}
"""function -> the backend its calls go to"""


def dispatched(part: str) -> Callable[[Callable[A, R]], Callable[A, R]]:
    """Make a function the reference backend of `part`; calls of its name go to the selected backend."""

    def decorate(reference: Callable[A, R]) -> Callable[A, R]:
        name = reference.__name__
        register(part, name, "reference", reference, missing=lambda: None, rank=0)

        @functools.wraps(reference)  # also gives `__wrapped__`, the reference itself
        def call(*args: A.args, **kwargs: A.kwargs) -> R:
            return _selected[name].call(*args, **kwargs)

        return call

    return decorate


def register(
    part: str, function: str, backend: str, call: Callable, *, missing: Callable[[], str | None], rank: int
) -> None:
    """Add an implementation of `function` (same signature and contract as its reference) under the name `backend`."""
    known = _backends[part].setdefault(function, {})
    if backend in known:
        raise ValueError(f"backend {backend} of {function} is registered twice")
    known[backend] = Backend(backend, call, missing, rank)
    if backend == "reference":
        _selected[function] = known[backend]


def workload() -> Workload | None:
    """What `select` was last told to serve; None when nothing is known, for instance in tests of single kernels."""
    return _workload


def selected(function: str) -> str:
    """Name of the backend that calls of `function` go to."""
    return _selected[function].name


def select(kernels: KernelsConfig, work: Workload | None = None) -> None:
    """Choose the backends of all functions, such that they serve `work`.

    A backend asked for by name must be present and serve at least one function of its part (for recurrences, the
    model's own); the part's other functions then stay on the reference. Raises ConfigError.
    """
    global _workload
    _workload = work
    if work is not None and kernels.recurrence not in ("auto", *_backends["recurrence"][work.recurrence]):
        known = ", ".join(sorted(_backends["recurrence"][work.recurrence]))
        raise ConfigError(
            f"kernels.recurrence: {kernels.recurrence} does not serve model.mixer {work.model.mixer}; "
            f"choose auto or one of {known}"
        )
    chosen: dict[str, Backend] = {}
    for part in PARTS:
        chosen |= _choose(part, getattr(kernels, part))
    if work is not None and work.model.has_recurrence and chosen["mixer_steps"].name == "fused":
        wanted, found = FUSED_RECURRENCE[work.recurrence], chosen[work.recurrence].name
        if wanted != found and kernels.mixer == "fused":
            raise ConfigError(f"kernels.mixer: fused needs kernels.recurrence {wanted}, not {found}")
        if wanted != found:
            chosen["mixer_steps"] = _backends["mixer"]["mixer_steps"]["reference"]
    _selected.update(chosen)


def _choose(part: str, asked: str) -> dict[str, Backend]:
    functions = _backends[part]
    if asked == "auto":
        best = {}
        for function, known in functions.items():
            ranked = sorted(known.values(), key=lambda backend: -backend.rank)
            best[function] = next(backend for backend in ranked if backend.missing() is None)
        return best
    if not any(asked in known for known in functions.values()):
        present = sorted({name for known in functions.values() for name in known})
        raise ConfigError(
            f"kernels.{part}: there is no backend {asked} here; choose auto or one of {', '.join(present)}"
        )
    chosen = {function: known.get(asked, known["reference"]) for function, known in functions.items()}
    for backend in chosen.values():
        if reason := backend.missing():
            raise ConfigError(f"kernels.{part}: {asked} cannot be used here ({reason}); install it or set auto")
    return chosen


def describe() -> str:
    """The selection in one line, e.g. `attention=flash4, recurrence=fla, …`; of both mixers while no model is known."""
    names = {part: sorted({_selected[function].name for function in _backends[part]}) for part in PARTS}
    if _workload is not None:
        names["recurrence"] = [selected(_workload.recurrence)] if _workload.model.has_recurrence else []
    return ", ".join(f"{part}={'+'.join(backends)}" for part, backends in names.items() if backends)


@contextmanager
def use(**parts: str) -> Iterator[None]:
    """Select backends of some parts inside a `with` (tests, benchmarks), e.g. `use(attention="reference")`."""
    before = dict(_selected)
    try:
        for part, asked in parts.items():
            _selected.update(_choose(part, asked))
        yield
    finally:
        _selected.update(before)
