"""Mode plan specs of configs and command lines, with this project's errors; the grammar is in hf/plans_oryx.py."""

from __future__ import annotations

from oryx_megatron.errors import ConfigError
from oryx_megatron.hf import plans_oryx
from oryx_megatron.hf.plans_oryx import FORMS, PlanRuns, chunk_runs, merge_runs

__all__ = ["FORMS", "PlanRuns", "chunk_runs", "merge_runs", "parse_runs"]


def parse_runs(spec: str, length: int, *, chunk: int, prompt: int | None = None) -> PlanRuns:
    """`plans_oryx.parse_runs`; raises ConfigError."""
    try:
        return plans_oryx.parse_runs(spec, length, chunk=chunk, prompt=prompt)
    except ValueError as error:
        raise ConfigError(str(error)) from None
