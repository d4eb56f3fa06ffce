#!/usr/bin/env python
"""The planner's speeds beside those that were measured, and the constants that would fit best.

    python benchmarks/planner_error.py
    python benchmarks/planner_error.py runs/layouts/layouts.json --fit launch_seconds.gdn collective

Reads the kept results of benchmarks/results and those that are given, of layout_list.py, layouts.py and
train_throughput.py. `--fit` changes the named constants of oryx_megatron/planner_costs.py until the squares of the
relative errors are least, and prints them: copy what should hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layout_cases import HYBRIDS, PEER, parse_layout

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_model
from oryx_megatron.config.plans import attention_share
from oryx_megatron.errors import ConfigError
from oryx_megatron.planner import Cluster, Estimate, Work, estimate, layout_of
from oryx_megatron.planner_costs import COSTS, MEMORY_GIB, Costs

RESULTS = Path(__file__).resolve().parent / "results"
SWIGLU_AGAIN = (
    *("h100-graphs.json", "h100-graphs-more.json", "h100-launched.json", "h100x2-layouts.json"),
    *("h200-throughput.json", "h200-mamba.json", "h200x2-layouts.json"),
    *("h100x2-layouts-all.json", "h100-long.json"),
    *("h100x4-graphs.json", "h100x4-layouts.json", "h100-recompute.json"),
)
"""Measured when ours computed SwiGLU's output again in bf16: layouts of theirs without recompute are `swiglu`."""
KEPT = (
    *SWIGLU_AGAIN,
    *("h200-throughput-quiet.json", "h200-graphs.json", "h200x2-layouts-graphs.json", "h200-recompute.json"),
)
"""What the planner is held to."""
GATHERED_TWICE = ("h100x2-layouts.json", "h200x2-layouts.json")
"""Measured when mixers gathered their input twice under tensor parallelism: those layouts of theirs are left out."""
PEERS = {PEER: "1.4b-transformer"}
SKIPPED = ("mamba", "hybrid", *HYBRIDS)
"""megatron-core's own models, of which the planner knows nothing."""


@dataclass(frozen=True)
class Measured:
    """One speed, and what the planner is asked for it."""

    source: str
    card: str
    model: str
    layout: str
    gpus: int
    sequence: int
    batch: int
    micro: int
    share: float
    """Of attention tokens."""
    graphs: bool
    fp8: str
    tokens_per_second: float
    peak_gib: float | None
    """What torch's allocator held, where that was measured."""

    @cached_property
    def _asked(self) -> tuple[Any, ...]:
        model, parallel = load_model(PEERS.get(self.model, self.model)), parse_layout(self.layout, self.gpus)
        work = Work(self.sequence, self.batch, self.share, graphs=self.graphs, fp8=self.fp8)
        split = layout_of(model, work, parallel, self.micro, self.gpus)
        again = parallel.recompute == "none" and self.model not in PEERS and self.source in SWIGLU_AGAIN
        recompute = "swiglu" if again else parallel.recompute
        return model, Cluster.of(self.card, self.gpus), work, split, self.micro, recompute

    def planned(self, costs: Costs = COSTS) -> Estimate:
        """What the planner says."""
        return estimate(*self._asked, costs=costs)

    def error(self, costs: Costs = COSTS) -> float:
        """Of the planned speed, relative to the measured one."""
        return self.planned(costs).tokens_per_second / self.tokens_per_second - 1

    def name(self) -> str:
        """In words."""
        precision = "bf16" if self.fp8 == "none" else self.fp8
        how = "graphs" if self.graphs else "launched"
        return (
            f"{self.card} {self.gpus} × {self.model} {self.layout}, {self.sequence} × {self.micro} of {self.batch}, "
            f"{self.share:.2f} attention, {precision}, {how}"
        )


def read(path: Path) -> list[Measured]:
    """The results of a file; ConfigError where it is none of these commands'."""
    try:
        found = json.loads(path.read_text())
        results = found if isinstance(found, list) else found["results"]
        named = path.name
        card = found["versions"]["gpu"] if isinstance(found, dict) and "versions" in found else path.name.split("x2")[0]
        rows = [_row(named, card, result.get("found", result)) for result in results]
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: no results of layout_list.py, layouts.py or train_throughput.py: {error}") from None
    return [row for row in rows if row is not None]


def _row(source: str, card: str, r: dict[str, Any]) -> Measured | None:
    card = card_of(r.get("card") or card)
    if r.get("optimizer", "adamw") != "adamw":  # the planner's times are AdamW's
        return None
    if r.get("compiled_for_any_width"):  # a fault of the benchmark: docs/performance.md
        return None
    if "case" in r:  # train_throughput.py: one GPU, one microbatch
        which, _, _ = r["case"].partition("/")
        if which in SKIPPED:
            return None
        return Measured(
            source, card, which if which in PEERS else f"1.4b-{which}", "data=1", 1, r["sequence"], r["batch"],
            r["batch"], r["attention_share"], bool(r.get("graphs")),
            "none" if r["precision"] == "bf16" else r["precision"], r["tokens_per_second"], r.get("peak_gib"),
        )  # fmt: skip
    if r["model"] in SKIPPED:
        return None
    # Earlier results of layouts.py do not say what was asked of all of them.
    sequence, plan = r.get("sequence") or 2048, r.get("plan") or "ratio:0.5"
    share = 1.0 if r["model"] in PEERS else attention_share(plan, sequence, chunk=256)
    return Measured(
        source, card, r["model"], r["layout"], r.get("gpus") or 2, sequence, r.get("batch") or 32, r["micro"], share,
        r.get("graphs", False), r.get("fp8", "none"), r["tokens_per_second"], r.get("peak_gib"),
    )  # fmt: skip


def card_of(name: str) -> str:
    """The planner's name of a card."""
    card = next((card for card in MEMORY_GIB if card in name.lower()), None)
    if card is None:
        raise ValueError(f"the planner knows {', '.join(MEMORY_GIB)}, not {name!r}")
    return card


def kept() -> list[Measured]:
    """All that the planner is held to."""
    rows = [row for name in KEPT for row in read(RESULTS / name)]
    return [row for row in rows if row.source not in GATHERED_TWICE or "tensor" not in row.layout]


def changed(costs: Costs, name: str, factor: float) -> Costs:
    """With one constant multiplied; `launch_seconds.gdn` is one of a table."""
    field, _, key = name.partition(".")
    value = getattr(costs, field, None)
    if value is None or (isinstance(value, dict) and key not in value) or (key and not isinstance(value, dict)):
        raise ConfigError(f"--fit {name}: is no constant of planner_costs.py, as linear_share or launch_seconds.gdn")
    new: Any = value | {key: value[key] * factor} if isinstance(value, dict) else value * factor
    return dataclasses.replace(costs, **{field: new})


def fit(rows: Sequence[Measured], names: Sequence[str]) -> Costs:
    """Constants whose squared errors are least, one after the other by ever smaller factors."""

    def loss(costs: Costs) -> float:
        return sum(math.log1p(row.error(costs)) ** 2 for row in rows)

    costs, step = COSTS, 1.2
    best = loss(costs)
    while step > 1.005:
        better = False
        for name in names:
            for factor in (step, 1 / step):
                other = changed(costs, name, factor)
                if (found := loss(other)) < best - 1e-9:
                    costs, best, better = other, found, True
        step = step if better else math.sqrt(step)
    return costs


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Compare, and fit; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results beside the kept ones")
    parser.add_argument("--alone", action="store_true", help="those that are given, without the kept ones")
    parser.add_argument("--fit", nargs="+", default=[], metavar="CONSTANT", help="of planner_costs.py")
    arguments = parser.parse_args(argv)
    rows = [] if arguments.alone else kept()
    rows += [row for path in arguments.files for row in read(path)]
    costs = fit(rows, arguments.fit) if arguments.fit else COSTS
    errors = [(row.error(costs), row) for row in rows]
    for error, row in sorted(errors, key=lambda pair: -abs(pair[0])):
        print(f"{error:+7.1%}  {row.tokens_per_second:>9,.0f}  {row.name()} ({row.source})")
    within = sum(abs(error) <= 0.15 for error, _ in errors)
    print(f"{len(errors)} measured, {within} within 15 %, mean {sum(abs(e) for e, _ in errors) / len(errors):.1%}")
    for name in arguments.fit:
        field, _, key = name.partition(".")
        was, now = (getattr(c, field)[key] if key else getattr(c, field) for c in (COSTS, costs))
        print(f"{name}: {was:.4g} → {now:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
