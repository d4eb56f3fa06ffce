"""Mode plan specs of configs and command lines, with this project's errors; the grammar is in hf/plans_oryx.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from oryx_megatron.errors import ConfigError
from oryx_megatron.hf import plans_oryx
from oryx_megatron.hf.plans_oryx import FORMS, PlanRuns, chunk_runs, merge_runs
from oryx_megatron.paths import expand
from oryx_megatron.reading import read_text, reason

__all__ = [
    "FORMS",
    "HELP",
    "PlanRuns",
    "attention_share",
    "chunk_runs",
    "layer_plans",
    "merge_runs",
    "parse_runs",
    "read_plan",
]

_EDGE = r"(?:\d+(?:\.\d+)?%|\d+c?|end)"
_RUNS = re.compile(rf"[ar]{_EDGE}-{_EDGE}(\s*,\s*[ar]{_EDGE}-{_EDGE})*,?")
HELP = (
    "mode plan: attention, recurrent, prefix:N, last:N, ratio:R, every:K, runs:a0-256,r256-end, prompt:PLAN,new:PLAN, "
    "layers:0-5=PLAN,rest=PLAN, router:R, file:PATH; N in tokens, R a share of the chunks (router: tokens), "
    "K-th chunks, runs also as 25%% of the text, layers also as 3, 6-end, even or odd"
)
"""The forms, for --help of options that take one."""


def read_plan(spec: str) -> str:
    """The plan that a file holds, of `file:PATH`, also as a part of `layers:`; any other spec as it is.

    The file is text: one plan, or runs such as `a0-256` or parts such as `0-5=PLAN`, one a line or between commas. `#`
    begins a comment. It names no other file.
    Raises ConfigError for a file that cannot be read or holds no plan.
    """
    kind, _, path = spec.strip().partition(":")
    if kind == "layers" and "=file:" in spec.replace(" ", ""):
        return "layers:" + ",".join(f"{name}={read_plan(plan)}" for name, plan in _parts(spec))
    if kind.strip() != "file":
        return spec
    path = expand(path.strip(), f"mode plan `{spec}`")
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"mode plan `{spec}`: {path} cannot be read: {reason(error)}") from None
    text = text.removeprefix("\ufeff")
    found = ((number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1))
    lines = {number: line for number, line in found if line}

    def wrong(why: str, number: int | None = None) -> ConfigError:
        return ConfigError(f"mode plan `{spec}`: {path}{'' if number is None else f':{number}:'} {why}")

    if not lines:
        raise wrong("holds no plan; write one, or runs such as a0-256, one a line")
    top, first = next(iter(lines.items()))
    if len(lines) > 1 and (form := re.match(r"(layers|runs)\s*:", first)):  # a spec that continues in the next line
        first = lines[top] = first[form.end() :].strip()
    if re.match(r"[\w-]+\s*=", first):
        for number, line in lines.items():
            if "=" not in line:
                raise wrong(f"`{line:.60}` is no part like 0-5=attention", number)
            if "=file:" in line.replace(" ", ""):
                raise wrong(f"`{line:.60}` names another file; write the plan itself", number)
        return "layers:" + ",".join(line.rstrip(",") for line in lines.values())
    if len(lines) == 1 and not _RUNS.fullmatch(first):
        if "file:" in first:
            raise wrong("names another file; write the plan itself")
        return first
    before = "0"
    for number, line in lines.items():
        if not _RUNS.fullmatch(line):
            raise wrong(f"`{line:.60}` is no run like a0-256 or r256-512", number)
        for run in re.split(r"\s*,\s*", line.rstrip(",")):
            start, stop = run[1:].split("-")
            if {start[-1:], before[-1:]} <= set("0123456789") and int(start) != int(before):
                raise wrong(f"run `{run}` does not start at {before}, where the one before it ends", number)
            before = stop
    return "runs:" + ",".join(line.rstrip(",") for line in lines.values())


def _parts(spec: str) -> list[tuple[str, str]]:
    try:
        return plans_oryx.split_layers(spec) or []
    except ValueError as error:
        raise ConfigError(str(error)) from None


def layer_plans(spec: str, layers: int) -> tuple[str, ...] | None:
    """`plans_oryx.layer_plans` of a spec or of `file:PATH`; raises ConfigError."""
    try:
        return plans_oryx.layer_plans(read_plan(spec), layers)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def attention_share(spec: str, length: int, *, chunk: int, layers: Sequence[bool] = ()) -> float:
    """Share of a text's tokens in attention mode, mean over the `layers` that read plans; ConfigError for no plan."""
    shares = shares_of_layers(spec, length, chunk=chunk, layers=layers)
    read = [share for share, reads in zip(shares, layers) if reads] or shares
    return sum(read) / len(read)


def shares_of_layers(spec: str, length: int, *, chunk: int, layers: Sequence[bool] = ()) -> list[float]:
    """Share of a text's tokens in attention mode in each of a model's `layers`, in one without; ConfigError."""
    parts = layer_plans(spec, len(layers)) or (spec,) * max(1, len(layers))
    runs = {part: parse_runs(part, length, chunk=chunk) for part in dict.fromkeys(parts)}
    tokens = {part: sum(stop - start for start, stop, attends in found if attends) for part, found in runs.items()}
    return [tokens[part] / length for part in parts]


def parse_runs(
    spec: str,
    length: int,
    *,
    chunk: int,
    prompt: int | None = None,
    shorter: bool = False,
    characters: Callable[[int], int] | None = None,
) -> PlanRuns:
    """`plans_oryx.parse_runs` of a spec or of `file:PATH`; raises ConfigError."""
    spec = read_plan(spec)
    try:
        return plans_oryx.parse_runs(spec, length, chunk=chunk, prompt=prompt, shorter=shorter, characters=characters)
    except ValueError as error:
        raise ConfigError(str(error)) from None
