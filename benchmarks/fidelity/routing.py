#!/usr/bin/env python
"""Which tokens of real text should attend? The router of a run against other policies, on held-out text.

    python benchmarks/fidelity/routing.py RUN --out routing/gdn-1.json
    python benchmarks/fidelity/routing.py --summarize routing

RUN is a finished run with both modes. `data.validation` names the sets to compare on; without it, that is validation
text beyond what thresholds are from. Trains the run's router (`oryx router`), then writes the loss of every set under
every policy and share, those of 10 % first; an entry is written as soon as it is known. `--summarize` makes routing.md,
routing.csv and routing.png of all results in a folder.

Policies decide token by token and without looking ahead, except the last one. Where one can be given a share, so many
tokens of the run's own validation text lie above its threshold.

- router: the product's, `router:R`;
- learned: a linear model of the token, the two before it, whether each occurred before, and the entropy of the
  recurrent prediction, fitted to what attention gained in training text;
- entropy: where the recurrent prediction is least certain; seen: where the token occurred before; seen+entropy: of
  those the least certain;
- ratio, random: the same shares without looking at the text;
- oracle: where attention gains most, which takes the next token to know.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experiment as ex

from oryx_megatron.cli import main_guard
from oryx_megatron.errors import ConfigError

SHARES = (0.1, 0.05, 0.25, 0.02)
"""Of attention tokens, in order of worth."""
POLICIES = ("router", "oracle", "random", "learned", "entropy", "seen+entropy", "ratio")
"""That can be given a share, in order of worth."""
AT = 0.1
"""The share at which policies are compared."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", help="run folder")
    parser.add_argument("--out", type=Path, help="result (JSON)")
    parser.add_argument("--texts", type=int, default=64, help="texts of each set (default: %(default)s)")
    parser.add_argument("--router", nargs="*", default=[], metavar="name=value", help="options of `oryx router`")
    parser.add_argument("--summarize", type=Path, metavar="FOLDER", help="only make tables and plot of its results")
    arguments = parser.parse_args(argv)
    if arguments.summarize is not None:
        sys.stdout.write(summarize(arguments.summarize))
        return 0
    if arguments.run is None or arguments.out is None:
        raise ConfigError("give a run folder and --out, or --summarize")
    compare(arguments.run, arguments.out, arguments.texts, ex.parse_overrides(arguments.router))
    return 0


# ------------------------------------------------------------------------------------------------------------ a run


def compare(run: str, out: Path, texts: int, options: dict[str, Any]) -> None:
    """Train the router of a run and write what every policy loses on its validation sets."""
    from text_policies import Sets, policies

    from oryx_megatron import parallel
    from oryx_megatron.eval import router_training as router
    from oryx_megatron.eval.generation import load_for_inference
    from oryx_megatron.hf.router import load_router

    begun = time.time()
    chosen = router.RouterConfig(**options)
    rows, path = router.train_router(run, chosen, overwrite=True)
    assert path is not None  # one process
    parallel.destroy()
    model = load_for_inference(run)
    made, _ = load_router(path)
    result: dict[str, Any] = {
        "model": model.run.model.name,
        "seed": model.run.seed,
        "iteration": model.manifest.iteration,
        "router": dataclasses.asdict(chosen) | {"seconds": time.time() - begun},
        "router_bytes": path.stat().st_size,
        "rows": [],
        "finished": False,
    }
    print(router.table(rows), flush=True)
    sets = Sets(model, texts, training=min(chosen.texts, 1024), held_out=chosen.held_out)
    for policy, share, choose in policies(sets, made, POLICIES, SHARES):
        for name in sets.names:
            result["rows"].append({"policy": policy, "wanted": share, "set": name, **sets.loss(name, choose)})
        result["seconds"] = time.time() - begun
        ex.write_json(out, result)
    result["finished"] = True
    ex.write_json(out, result)


# ---------------------------------------------------------------------------------------------------------- summary


@dataclass(frozen=True)
class Point:
    """One policy at one share, on one set or on all."""

    share: float
    nats: float
    """Per token."""
    bits: float
    """Per byte."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Results in a folder, by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if result.get("rows")]


def curve(result: dict[str, Any], policy: str, sets: Sequence[str]) -> list[Point]:
    """Points of a policy by share, over some sets weighted by their tokens and bytes; none where one set is missing."""
    points = []
    of_policy = [row for row in result["rows"] if row["policy"] == policy and row["set"] in sets]
    for wanted in dict.fromkeys(row["wanted"] for row in of_policy):
        rows = [row for row in of_policy if row["wanted"] == wanted]
        if len(rows) < len(sets):
            continue
        tokens, size = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
        nats = sum(row["loss"] * row["tokens"] for row in rows)
        share = sum(row["share"] * row["tokens"] for row in rows) / tokens
        points.append(Point(share, nats / tokens, nats / math.log(2) / size))
    return sorted(points, key=lambda point: point.share)


def closed(result: dict[str, Any], policy: str, sets: Sequence[str]) -> list[tuple[float, float]]:
    """(share, part of the gap between all recurrence and all attention that the policy closes), by share."""
    (recurrent,), (attention,) = (curve(result, mode, sets) for mode in ("recurrent", "attention"))
    gap = recurrent.nats - attention.nats
    return [(point.share, (recurrent.nats - point.nats) / gap) for point in curve(result, policy, sets)]


def closed_at(points: Sequence[tuple[float, float]], share: float, *, end: bool = False) -> float | None:
    """Part of the gap closed at exactly this share, between the two nearest points; None outside of them.

    `end`: all attention, which closes all of it, is a point too.
    """
    for (low, before), (high, after) in itertools.pairwise([(0.0, 0.0), *points, *([(1.0, 1.0)] if end else [])]):
        if low <= share <= high and high > low:
            return before + (after - before) * (share - low) / (high - low)
    return None


def _sets_of(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["set"] for row in result["rows"]))


def _whole(result: dict[str, Any]) -> bool:
    modes = [[row["set"] for row in result["rows"] if row["policy"] == mode] for mode in ("recurrent", "attention")]
    return sorted(modes[0]) == sorted(modes[1]) == sorted(_sets_of(result))


def _rows_of(results: list[dict[str, Any]]) -> Iterator[tuple[str, list[str], str, list[dict[str, Any]]]]:
    """Model, sets, policy, results: everything that a table has a row for."""
    for model in dict.fromkeys(result["model"] for result in results):
        some = [result for result in results if result["model"] == model]
        names = _sets_of(some[0])
        for sets in ([names] if len(names) > 1 else []) + [[name] for name in names]:
            for policy in (*POLICIES, "seen"):
                yield model, sets, policy, some


def summarize(folder: Path) -> str:
    """Write routing.md, routing.csv and routing.png of a folder's results; returns the first."""
    results = [result for result in read_results(folder) if _whole(result)]
    if not results:
        raise ConfigError(f"{folder}: holds no results")
    lines = [
        "# Routing on held-out text",
        "",
        "Part of the gap in loss between all recurrence (0 %) and all attention (100 %) that is closed when "
        f"{AT:.0%} of the tokens attend, mean (lowest to highest) over seeds. `seen` has a share of its own.",
        "",
        "| model | seeds | text | recurrent, bits per byte | attention | " + " | ".join(POLICIES) + " | seen |",
        "|---|---|---|---|---|" + "---|" * (len(POLICIES) + 1),
    ]
    cells: dict[tuple[str, str], list[str]] = {}
    for model, sets, policy, some in _rows_of(results):
        name = "all" if len(sets) > 1 else sets[0]
        if (model, name) not in cells:
            ends = [ex.spread([curve(r, mode, sets)[0].bits for r in some]) for mode in ("recurrent", "attention")]
            cells[model, name] = [model, str(len(some)), name, *ends]
        if policy == "seen":
            found = [(share, part) for r in some for share, part in closed(r, policy, sets)]
            told = (
                f"{statistics.mean(part for _, part in found):.0%} at {statistics.mean(s for s, _ in found):.0%}"
                if found
                else ""
            )
        else:
            parts = [part for r in some if (part := closed_at(closed(r, policy, sets), AT)) is not None]
            told = _percent(parts)
        cells[model, name].append(told)
    lines += ["| " + " | ".join(row) + " |" for row in cells.values()]
    shares = sorted(SHARES)
    lines += [
        "",
        "The same at other shares, all text.",
        "",
        f"| model | policy | {' | '.join(f'{x:.0%}' for x in shares)} |",
    ]
    lines.append(f"|---|---|{'---|' * len(shares)}")
    for model, sets, policy, some in _rows_of(results):
        if policy == "seen" or sets != _sets_of(some[0]):
            continue
        by_seed = [closed(r, policy, sets) for r in some]
        at_shares = [[part for c in by_seed if (part := closed_at(c, share, end=True)) is not None] for share in shares]
        lines.append(f"| {model} | {policy} | {' | '.join(map(_percent, at_shares))} |")
    text = "\n".join(lines) + "\n"
    ex.write_text(folder / "routing.md", text)
    ex.write_text(folder / "routing.csv", _csv(results))
    plot(results, folder / "routing.png")
    return text


def _percent(parts: Sequence[float]) -> str:
    if not parts:
        return ""
    spread = f" ({min(parts):.0%} to {max(parts):.0%})" if len(parts) > 1 else ""
    return f"{statistics.mean(parts):.0%}{spread}"


def _csv(results: list[dict[str, Any]]) -> str:
    lines = ["model,seed,text,policy,wanted,share,nats_per_token,bits_per_byte"]
    for result in results:
        for row in result["rows"]:
            bits = row["loss"] * row["tokens"] / math.log(2) / row["bytes"]
            wanted = "" if row["wanted"] is None else row["wanted"]
            lines.append(
                f"{result['model']},{result['seed']},{row['set']},{row['policy']},{wanted},{row['share']:.4f},"
                f"{row['loss']:.5f},{bits:.5f}"
            )
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte against the share of attention tokens: a panel per model, lines of means over seeds."""
    from retrieval import figure, legend_below

    models = list(dict.fromkeys(result["model"] for result in results))

    def draw(panels: Any) -> None:
        for axes, model in zip(panels, models, strict=True):
            some = [result for result in results if result["model"] == model]
            sets = _sets_of(some[0])
            ends = [statistics.mean(curve(r, m, sets)[0].bits for r in some) for m in ("recurrent", "attention")]
            for level, name in zip(ends, ("all recurrent", "all attention"), strict=True):
                axes.axhline(level, color="grey", lw=0.8, ls=":")
                beside = ("axes fraction", "data")
                axes.annotate(name, (1.01, level), xycoords=beside, va="center", fontsize=7, color="grey")
            for number, policy in enumerate((*POLICIES, "seen")):
                curves = [found for result in some if (found := curve(result, policy, sets))]
                if not curves:
                    continue
                length = min(map(len, curves))
                means = [
                    (statistics.mean(c[i].share for c in curves), statistics.mean(c[i].bits for c in curves))
                    for i in range(length)
                ]
                joined = means if policy == "seen" else [(0.0, ends[0]), *means, (1.0, ends[1])]
                style = {"ls": "none", "marker": "s"} if policy == "seen" else {"marker": "o"}
                width = 2 if policy == "router" else 1
                axes.plot(*zip(*joined, strict=True), ms=3, lw=width, color=f"C{number}", label=policy, **style)
            axes.set(title=f"{model}: {', '.join(sets)}", xlabel="share of attention tokens")
            axes.set_xscale("symlog", linthresh=0.02, linscale=0.5)
            axes.set_xlim(-0.003, 1.3)
            shares = sorted(SHARES)
            axes.set_xticks([0, *shares, 1], ["0", *(f"{share:.0%}" for share in shares), "all"])
            axes.grid(alpha=0.3)
            legend_below(axes)
        panels[0].set_ylabel("bits per byte")

    figure(path, len(models), draw)


if __name__ == "__main__":
    sys.exit(main())
