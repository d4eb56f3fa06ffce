"""Bounds of single numbers: written at their fields in schema.py, read by validation and by the reference."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass
from typing import Any

from oryx_megatron.errors import ConfigError

_FEW = 5
"""Numbers of a range from 1 on that are listed one by one."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number, for `Annotated[int, Range(…)]`; a number is always finite."""

    ge: float | None = None
    """At least."""
    gt: float | None = None
    """Above."""
    le: float | None = None
    """At most."""
    lt: float | None = None
    """Below."""
    what: str = ""
    """Name of such numbers, for messages."""

    def holds(self, value: float) -> bool:
        """Whether `value` lies within."""
        return self._above(value) and self._below(value) and math.isfinite(value)

    def _above(self, value: float) -> bool:
        return (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)

    def _below(self, value: float) -> bool:
        return (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)

    def why_not(self, value: float) -> str | None:
        """`should be …` for a number outside, with the bound that it breaks; else None."""
        if self.holds(value):
            return None
        low, high = self._low(whole=isinstance(value, int)), self._high()
        if isinstance(value, int) and low and high and not self._listed():  # limits far apart: the broken one alone
            return f"should {high if self._above(value) else low}"
        if low and high:
            return f"should be {self.what + ' ' if self.what else ''}{self.words()}"
        return f"should {low or high}" + ("" if math.isfinite(value) else " and finite")

    def _low(self, *, whole: bool) -> str:
        if self.ge == 0:
            return "not be negative"
        if self.ge == 1 and whole:
            return "be above 0"
        return f"be at least {_shown(self.ge)}" if self.ge is not None else _after("be above", self.gt)

    def _high(self) -> str:
        return f"be at most {_shown(self.le)}" if self.le is not None else _after("be below", self.lt)

    def _listed(self) -> list[int]:
        """The whole numbers within, where they are few."""
        if not self.ge or self.le is None or self.le - self.ge >= _FEW:
            return []
        return list(range(int(self.ge), int(self.le) + 1))

    def words(self) -> str:
        """The range for messages and the reference, e.g. `at least 0 and below 1`."""
        if self.ge is not None and self.le is not None:
            if values := self._listed():
                return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
            return f"from {_shown(self.ge)} to {_shown(self.le)}"
        low = f"at least {_shown(self.ge)}" if self.ge is not None else _after("above", self.gt)
        high = f"at most {_shown(self.le)}" if self.le is not None else _after("below", self.lt)
        return " and ".join(words for words in (low, high) if words)


def _after(words: str, bound: float | None) -> str:
    return "" if bound is None else f"{words} {_shown(bound)}"


def _shown(bound: float | None) -> str:
    if bound == 2**32:
        return "2³²"
    return str(bound)


def range_of(hint: Any) -> Range | None:
    """Bounds in a field's type (with its annotations), also of `X | None`, and those of each number of a list."""
    found = next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Range)), None)
    if found is None and (type(None) in typing.get_args(hint) or typing.get_origin(hint) is tuple):
        return next(filter(None, map(range_of, typing.get_args(hint))), None)
    return found


@functools.cache
def ranges(cls: Any) -> dict[str, Range]:
    """Field → bounds, of the fields of a config class that have any."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {field.name: range_of(hints[field.name]) for field in dataclasses.fields(cls)}
    return {name: bounds for name, bounds in found.items() if bounds is not None}


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first number of a config object, or of those inside it, that is out of its bounds."""
    cls: type = type(config)
    dot, bounds = f"{prefix}." if prefix else "", ranges(cls)
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{dot}{field.name}"
        if field.name in bounds and value is not None:
            numbers = (
                {f"{name}[{i}]": one for i, one in enumerate(value)} if isinstance(value, tuple) else {name: value}
            )
            for place, number in numbers.items():
                if why := bounds[field.name].why_not(number):
                    raise ConfigError(f"{place}: {number} {why}")
        _check_inside(value, name)


def _check_inside(value: Any, name: str) -> None:
    if dataclasses.is_dataclass(value):
        check_ranges(value, name)
    elif isinstance(value, tuple):
        for i, one in enumerate(value):
            _check_inside(one, f"{name}[{i}]")
    elif isinstance(value, dict):
        for key, one in value.items():
            _check_inside(one, f"{name}.{key}")
